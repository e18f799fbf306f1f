package image

import (
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

func TestParseName(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, url, shown, format string
		params                   []Param
	}{
		{"disk.img", wd + "/disk.img", "", "", nil},
		{"/a/disk.img", "/a/disk.img", "", "", nil},
		{"./a:b", wd + "/./a:b", "", "", nil},
		{"dir/a:b", wd + "/dir/a:b", "", "", nil},
		{"/a/../link/..//x", "/a/../link/..//x", "", "", nil}, // as the kernel takes it
		{"with space%20", wd + "/with space%20", "", "", nil},
		{"file:disk.img", wd + "/disk.img", "disk.img", "", nil},
		{"file:a:b", wd + "/a:b", "./a:b", "", nil},
		{"file:///a/b%20c", "///a/b%20c", "///a/b%20c", "", nil}, // not decoded, as in QEMU
		{"http://h/x?y=1", "http://h/x?y=1", "", "", nil},
		{"nbd:localhost:10809", "nbd:localhost:10809", "", "", nil},
		{`json:{"driver":"qcow2","file":{"driver":"file","filename":"/a/b"}}`, "/a/b", "/a/b", "qcow2", nil},
		{`json:{"file.filename":"/a/b"}`, "/a/b", "/a/b", "", nil},
		{`json:{"file.filename":"b"}`, wd + "/b", "b", "", nil},
		{`json:{"file.filename":"file:b"}`, wd + "/file:b", wd + "/file:b", "", nil}, // a path, whatever it looks like
		{`json:{"driver":"file","filename":"/a/b"}`, "/a/b", "/a/b", "raw", nil},
		{`json:{"driver":"host_device","filename":"/a/b"}`, "/a/b", "/a/b", "raw", nil},
		{`json:{"driver":"raw","offset":512,"size":"1024","file.filename":"/a"}`, "/a", "json", "raw", []Param{{"offset", "512"}, {"size", "1024"}}},
		{`json:{"driver":"qcow2","lazy-refcounts":true,"file":{"filename":"/a"}}`, "/a", "json", "qcow2", []Param{{"lazy-refcounts", "on"}}},
		{`json:{"driver":"qcow2","node-name":"top","file":{"filename":"/a","node-name":"f"}}`, "/a", "/a", "qcow2", nil},
		{`json:{"driver":"raw","file":{"driver":"http","url":"http://h/x"}}`, "http://h/x", "json", "raw", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src, err := parseName(tt.name)
			if err != nil {
				t.Fatal(err)
			}
			want := &url.URL{Scheme: "file", Path: tt.url}
			if !strings.HasPrefix(tt.url, "/") {
				if want, err = url.Parse(tt.url); err != nil {
					t.Fatal(err)
				}
			}
			if *src.url != *want {
				t.Errorf("URL %#v, not %#v", src.url, want)
			}
			shown := tt.shown
			if shown == "" || shown == "json" {
				shown = tt.name
			}
			if src.name != shown {
				t.Errorf("shown as %q, not %q", src.name, shown)
			}
			if src.format != tt.format || !slices.Equal(src.params, tt.params) {
				t.Errorf("format %q %v, not %q %v", src.format, src.params, tt.format, tt.params)
			}
		})
	}
}

func TestParseNameRefuses(t *testing.T) {
	for name, says := range map[string]string{
		"":                                   "requires a file name",
		"file:":                              "requires a file name",
		"a\x00b":                             "zero byte",
		"http://h:x/":                        "invalid port",
		"json:":                              "unexpected EOF",
		"json:{":                             "unexpected EOF",
		"json:{bad":                          "invalid character",
		`json:"x"`:                           "Invalid JSON object",
		`json:[]`:                            "Invalid JSON object",
		`json:{} x`:                          "follows",
		"json:{\"file.filename\":\"a\xff\"}": "invalid UTF-8",
		`json:{}`:                            "either driver or file",
		`json:{"driver":"raw"}`:              "must be specified",
		`json:{"driver":"raw","file":"n"}`:   "node-name='n'",
		`json:{"file.filename":"a","file":{"filename":"b"}}`:                                            "twice",
		`json:{"driver":"raw","driver":"qcow2","file.filename":"a"}`:                                    "twice",
		`json:{"driver":null,"file.filename":"a"}`:                                                      "null",
		`json:{"driver":"raw","x":[1],"file.filename":"a"}`:                                             "list",
		`json:{"driver":"raw","file":{"driver":"qcow2","file":{"filename":"a"}}}`:                       "qcow2",
		`json:{"driver":"qcow2","file":{"driver":"raw","size":"x","file":{"filename":"a"}}}`:            "expects a non-negative number",
		`json:{"driver":"qcow2","file":{"driver":"raw","size":513,"file":{"filename":"a"}}}`:            "not multiple of 512",
		`json:{"driver":"qcow2","file":{"driver":"raw","x":1,"file":{"filename":"a"}}}`:                 "option 'x'",
		`json:{"driver":"qcow2","file":{"driver":"raw"}}`:                                               "requires a file name",
		`json:{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"raw","file.filename":"a"}}}`:   "raw",
		`json:{"driver":"qcow2","file":{"driver":"nbd","host":"h"}}`:                                    "nbd",
		`json:{"driver":"qcow2","file":{"filename":"a","x":1}}`:                                         "option 'x'",
		`json:{"driver":"qcow2","file":{"filename":"a"},"backing":{"driver":"raw"}}`:                    "backing",
		`json:{"driver":"qcow2","file":{"filename":"a"},"backing":"b"}`:                                 "backing",
		`json:{"driver":"qcow2","file":{"filename":"a","backing":null}}`:                                "null",
		`json:{"driver":"qcow2","file":{"filename":"a"},"read-only":"maybe"}`:                           "expects 'on' or 'off'",
		`json:{"driver":"qcow2","file":{"filename":"a","locking":"x"}}`:                                 "invalid parameter value: x",
		`json:{"driver":"raw","file":{"driver":"http","url":"ftp://h/x"}}`:                              "not a URL of http",
		"json:" + strings.Repeat(`{"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":`, 100000): "nested too deep",
	} {
		_, err := parseName(name)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.80q: %v, without %q", name, err, says)
		}
	}
}

func TestNameOptions(t *testing.T) {
	src, err := parseName(`json:{"driver":"raw","read-only":true,"force-share":"on","cache":{"direct":true},"file":{"filename":"/a"}}`)
	if err != nil {
		t.Fatal(err)
	}
	if !src.readOnly || !src.noLock || !src.direct || len(src.params) != 0 {
		t.Errorf("%+v", src)
	}
	src, err = parseName(`json:{"file":{"filename":"/a","locking":"off","read-only":"on","cache.direct":"on"}}`)
	if err != nil {
		t.Fatal(err)
	}
	if !src.readOnly || !src.noLock || !src.direct {
		t.Errorf("%+v", src)
	}
	src, err = parseName(`json:{"driver":"file","filename":"/a","locking":"off","read-only":"on","cache.direct":"on"}`)
	if err != nil {
		t.Fatal(err)
	}
	if !src.readOnly || !src.noLock || !src.direct || len(src.params) != 0 {
		t.Errorf("%+v", src)
	}
	for options, alone := range map[string]bool{``: false, `,"backing":null`: true, `,"backing":""`: true} {
		src, err = parseName(`json:{"driver":"qcow2","file.filename":"/a"` + options + `}`)
		if err != nil || src.alone != alone || src.name != "/a" {
			t.Errorf("%s: %+v, %v", options, src, err)
		}
	}
	for node, want := range map[string][2]int64{`"driver":"raw"`: {0, -1}, `"driver":"raw","offset":512`: {512, -1}, `"driver":"raw","offset":"1k","size":2048`: {1024, 2048}} {
		name := `json:{"driver":"qcow2","file":{` + node + `,"file":{"driver":"file","filename":"/a"}}}`
		src, err = parseName(name)
		if err != nil || !src.part || [2]int64{src.begin, src.length} != want || src.url.Path != "/a" || src.format != "qcow2" || src.name != name {
			t.Errorf("%s: %+v, %v", name, src, err)
		}
	}
}

func TestNodeName(t *testing.T) {
	name, err := NodeName([]Param{{"driver", "raw"}, {"file.filename", `/a "b" <c>`}, {"offset", "512"}})
	if err != nil {
		t.Fatal(err)
	}
	src, err := parseName(name)
	if err != nil {
		t.Fatal(err)
	}
	if src.url.Path != `/a "b" <c>` || src.format != "raw" || !slices.Equal(src.params, []Param{{"offset", "512"}}) {
		t.Errorf("%s means %+v", name, src)
	}
	if _, err := NodeName([]Param{{"a", "1"}, {"a", "2"}}); err == nil {
		t.Error("an option twice is accepted")
	}
	// It would be another file's.
	if name, err := NodeName([]Param{{"driver", "raw"}, {"file.filename", "a\xff"}}); err == nil {
		t.Errorf("a name that JSON cannot hold is %q", name)
	}
}

type named struct {
	storage.Store
	url *url.URL
}

func (n named) Info() storage.Info { return storage.Info{URL: n.url} }

func TestResolve(t *testing.T) {
	for _, tt := range []struct {
		from, base, ref string
		url, shown      string
	}{
		{"/dir/top", "dir/top", "base", "/dir/base", "dir/base"},
		{"/dir/top", "top", "base", "/dir/base", "base"},
		{"/dir/top", "dir/top", "../base", "/dir/../base", "dir/../base"},
		{"/dir/top", "dir/top", "/abs/base", "/abs/base", "/abs/base"},
		{"/dir/top", "dir/top", "sub/a:b", "/dir/sub/a:b", "dir/sub/a:b"},
		{"/a:b/top", "/a:b/top", "base", "/a:b/base", "/a:b/base"},
		{"/dir/top", "dir/top", "file:/x", "/x", "/x"},
		{"/dir/top", "dir/top", "http://h/x", "http://h/x", "http://h/x"},
		{"http://u:p@h/d/top?q", "http://h/d/top", "base", "http://u:p@h/d/base", "http://u:xxxxx@h/d/base"},
	} {
		u, err := url.Parse(tt.from)
		if err != nil {
			t.Fatal(err)
		}
		if u.Scheme == "" {
			u.Scheme = "file"
		}
		src, err := resolve(named{url: u}, tt.base, tt.ref)
		if err != nil {
			t.Errorf("%q in %q: %v", tt.ref, tt.from, err)
			continue
		}
		got := src.url.String()
		if src.url.Scheme == "file" {
			got = src.url.Path
		}
		if got != tt.url || src.name != tt.shown {
			t.Errorf("%q in %q is %q, shown as %q; not %q, %q", tt.ref, tt.from, got, src.name, tt.url, tt.shown)
		}
	}
	if _, err := resolve(named{}, "", "base"); err == nil {
		t.Error("a relative name in an image without a name is resolved")
	}
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"a", "file:a", "http://h/", `json:{"driver":"raw","file":{"filename":"a"}}`, `json:{"file.filename":"a","x":[1]}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		src, err := parseName(name)
		if err == nil && (src.url == nil || src.name == "") {
			t.Errorf("%q: %+v", name, src)
		}
	})
}
