package main

import (
	"strings"
	"testing"
)

// Options that cannot hold together are refused before anything is opened.
func TestConfinementOptions(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--untrusted -c /dev/nbd0 disk", "--untrusted and --connect exclude each other"},
		{"--sandbox=on -c /dev/nbd0 disk", "--sandbox and --connect exclude each other"},
		{"--user=0 -c /dev/nbd0 disk", "--user and --connect exclude each other"},
		{"--untrusted -L", "--untrusted is for serving an image"},
		{"--untrusted -d /dev/nbd0", "--untrusted is for serving an image"},
		{"--untrusted --backing=same-dir disk", "--untrusted and --backing exclude each other"},
		{"--untrusted --backing-dir=/tmp disk", "--untrusted and --backing-dir exclude each other"},
		{"--user=0 --run true disk", "--user and --run exclude each other"},
		{"--sandbox=maybe disk", "--sandbox=maybe is none of auto, on, off"},
		{"--user=no-such-user disk", "unknown user no-such-user"},
		{"--user=12345678 disk", "give a group too"},
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(tt.args)...)...)
		if o.Code != 1 || o.Stdout != "" || !strings.Contains(o.Stderr, tt.want) {
			t.Errorf("%s: %+v, want %q", tt.args, o, tt.want)
		}
	}
	for _, tt := range []struct {
		args    string
		sandbox string
	}{{"--untrusted -f raw disk", "on"}, {"--untrusted --sandbox=off -f raw disk", "off"}, {"disk", ""}} {
		o := newServeOptions()
		operands, err := scan(o.flags, strings.Fields(tt.args))
		if err == nil {
			err = o.check(operands)
		}
		if err != nil || o.confinement.sandbox != tt.sandbox {
			t.Errorf("%s: sandbox %q, %v", tt.args, o.confinement.sandbox, err)
		}
	}
}
