package nbd

import (
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestURI(t *testing.T) {
	for _, c := range []struct {
		uri  string
		want URI
		text string // what String gives, if not uri
	}{
		{"nbd://example.com", URI{Network: "tcp", Address: "example.com:10809"}, "nbd://example.com/"},
		{"nbd://example.com:10810/disk", URI{Network: "tcp", Address: "example.com:10810", Export: "disk"}, ""},
		{"nbd://example.com//disk", URI{Network: "tcp", Address: "example.com:10809", Export: "/disk"}, ""},
		{"nbd://example.com/hello%20world", URI{Network: "tcp", Address: "example.com:10809", Export: "hello world"}, ""},
		{"nbd://example.com/a%3Fb%23c%25d", URI{Network: "tcp", Address: "example.com:10809", Export: "a?b#c%d"}, ""},
		{"nbd://[::1]/", URI{Network: "tcp", Address: "[::1]:10809"}, ""},
		{"nbd://[::1]:1/x", URI{Network: "tcp", Address: "[::1]:1", Export: "x"}, ""},
		{"nbd:///x", URI{Network: "tcp", Address: "localhost:10809", Export: "x"}, "nbd://localhost/x"},
		{"nbd+unix:///?socket=/tmp/nbd.sock", URI{Network: "unix", Address: "/tmp/nbd.sock"}, ""},
		{"nbd+unix:///disk?socket=nbd.sock", URI{Network: "unix", Address: "nbd.sock", Export: "disk"}, ""},
		{"nbd+unix:////disk?socket=s", URI{Network: "unix", Address: "s", Export: "/disk"}, ""},
		{"nbd+unix:///?socket=%00abstract", URI{Network: "unix", Address: "@abstract"}, ""},
		{"nbd+unix:///?socket=@file", URI{Network: "unix", Address: "./@file"}, "nbd+unix:///?socket=./%40file"},
		{"nbd+unix:///?socket=a%20b%26c", URI{Network: "unix", Address: "a b&c"}, "nbd+unix:///?socket=a+b%26c"},
		{"nbds://alice@host/x?tls-type=psk", URI{TLS: true, Network: "tcp", Address: "host:10809", User: "alice", Export: "x",
			TLSQuery: url.Values{"tls-type": {"psk"}}}, ""},
		{"nbds+unix://alice@/x?socket=s", URI{TLS: true, Network: "unix", Address: "s", User: "alice", Export: "x"}, ""},
		{"nbd+vsock:///", URI{Network: "vsock", Address: "2:10809"}, "nbd+vsock://2/"},
		{"nbd+vsock://3:4000000000/x", URI{Network: "vsock", Address: "3:4000000000", Export: "x"}, ""},
		{"nbd://h/?x-try=1", URI{Network: "tcp", Address: "h:10809"}, "nbd://h/"},
	} {
		got, err := ParseURI(c.uri)
		if err != nil {
			t.Errorf("%s: %v", c.uri, err)
			continue
		}
		if d := cmp.Diff(c.want, *got); d != "" {
			t.Errorf("%s: -want +got\n%s", c.uri, d)
		}
		if c.text == "" {
			c.text = c.uri
		}
		if s := got.String(); s != c.text {
			t.Errorf("%s: String gives %s, want %s", c.uri, s, c.text)
		}
	}
}

func TestURIRefused(t *testing.T) {
	for uri, why := range map[string]string{
		"":                                     "scheme",
		"disk.img":                             "scheme",
		"http://host/":                         "scheme",
		"nbdx://host/":                         "scheme",
		"nbds+ssh://host/":                     "scheme",
		"nbd:host":                             "no //",
		"nbd://host:99999/":                    "99999",
		"nbd://host/#part":                     "fragment",
		"nbd://host/?socket=/s":                "socket",
		"nbd://host/?tls-typ=psk":              "tls-typ",
		"nbd://::":                             "colon",
		"nbd://[::%25\xe1]/":                   "zone",
		"nbd://a:b:1/":                         "colon",
		"nbd://a:secret@host/":                 "password",
		"nbd://host/%00":                       "NUL",
		"nbd+unix:///x":                        "socket",
		"nbd+unix://host/?socket=s":            "host",
		"nbd+unix:///?socket=a&socket=b":       "twice",
		"nbd+unix:///?socket=a%00b":            "socket",
		"nbd+vsock://host/":                    "context id",
		"nbd+vsock://2:4294967296/":            "4294967296",
		"nbd://h/" + strings.Repeat("x", 4097): "4097",
	} {
		u, err := ParseURI(uri)
		if err == nil {
			t.Errorf("%s: accepted as %+v", uri, u)
		} else if !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v; want it to speak of %s", uri, err, why)
		}
	}
}

func FuzzURL(f *testing.F) {
	for _, s := range []string{"nbd://h:1/x", "nbds+unix://u@/e?socket=%00s&tls-hostname=h", "nbd+vsock://2:3/", "nbd://[fe80::1%25eth0]/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q: parsed as %+v, printed as %q: %v", s, u, u.String(), err)
		}
		if d := cmp.Diff(u, again); d != "" {
			t.Fatalf("%q: printed as %q: -first +second\n%s", s, u.String(), d)
		}
	})
}
