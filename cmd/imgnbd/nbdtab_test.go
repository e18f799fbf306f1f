package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const nbdtab = `# devices
nbd0 host.example disk

/dev/nbd1	host  "x"  port=1000,bs=1024,conns=4,timeout=30,persist,swap,no_optgo,_local=1,nothing # why
  nbd2 /run/s disk unix,tls,tlshostname=h,certfile=c,keyfile=k,cacertfile=a
nbd1 other disk
`

func TestParseNBDTab(t *testing.T) {
	for name, want := range map[string]*clientOptions{
		"nbd0": {device: "/dev/nbd0", host: "host.example", export: "disk", port: "10809", connections: 1},
		"nbd1": {device: "/dev/nbd1", host: "host", export: `"x"`, port: "1000", connections: 4, blockSize: 1024,
			timeout: 30 * time.Second, persist: true, swap: true, noGo: true},
		"nbd2": {device: "/dev/nbd2", host: "/run/s", export: "disk", port: "10809", connections: 1, unix: true,
			tls: true, tlsHost: "h", cert: "c", key: "k", ca: "a"},
	} {
		var messages bytes.Buffer
		got, err := parseNBDTab(newUI("imgnbd", nil, nil, &messages), strings.NewReader(nbdtab), name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(clientOptions{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		warning := ""
		if name == "nbd1" {
			warning = "imgnbd: warning: unknown option 'nothing' found in nbdtab file\n"
		}
		if messages.String() != warning {
			t.Errorf("%s: %q", name, &messages)
		}
	}
	for text, want := range map[string]string{
		nbdtab:                       "there is no line for nbd9",
		"":                           "there is no line for nbd9",
		"nbd0 host":                  "line 1: DEVICE HOST EXPORT [OPTIONS] is expected, not 2 fields",
		"nbd0 host x a b":            "not 5 fields",
		"nbd9 host x bs=1k":          "line 1: bs=1k: not a number",
		"nbd9 host x conns":          "line 1: conns: not a number",
		"nbd9 host x timeout=-1":     "not a number",
		strings.Repeat("x", 100_000): "token too long",
	} {
		if _, err := parseNBDTab(newUI("imgnbd", nil, nil, nil), strings.NewReader(text), "nbd9"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.30q: %v, want %s", text, err, want)
		}
	}
}
