package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// scanned is what a command line means: the options in order, then operands.
func scanned(args ...string) string {
	o := newServeOptions()
	var seen []string
	operands, err := scan(o.flags, args)
	if err != nil {
		return err.Error()
	}
	for _, name := range []string{"port", "read-only", "persistent", "format", "shared", "export-name", "stdio", "run", "backing", "backing-dir", "vsock"} {
		if f := o.flags.Lookup(name); f.Changed {
			seen = append(seen, name+"="+f.Value.String())
		}
	}
	return strings.Join(append(seen, operands...), " ")
}

func TestScan(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"disk", "disk"},
		{"-p 1 disk", "port=1 disk"},
		{"-p1 disk", "port=1 disk"},
		{"-p=1 disk", "port==1 disk"},
		{"--port 1 disk", "port=1 disk"},
		{"--port=1 disk", "port=1 disk"},
		{"disk -r", "read-only=true disk"},
		{"-rt disk", "read-only=true persistent=true disk"},
		{"-rtp 1 disk", "port=1 read-only=true persistent=true disk"},
		{"-trp1 -fraw disk", "port=1 read-only=true persistent=true format=raw disk"},
		{"-- -r", "-r"},
		{"-r -- disk -t", "read-only=true disk -t"},
		{"- -r", "read-only=true -"},
		{"--port= disk", "port= disk"},
		{"--port -r disk", "port=-r disk"},
		{"--po=1 disk", "port=1 disk"},
		{"--pe disk", "persistent=true disk"},
		{"--read disk", "read-only=true disk"},
		// An abbreviation of ours never shadows one of qemu-nbd's.
		{"--stdio disk", "stdio=true disk"},
		{"--std disk", "stdio=true disk"},
		{"--ru true disk", "run=true disk"},
		{"--v disk", "option '--v' is ambiguous; possibilities: '--version' '--verbose'"},
		{"--vs disk", "vsock=true disk"},
		{"--ba any disk", "option '--ba' is ambiguous; possibilities: '--backing' '--backing-dir'"},
		{"--backing any disk", "backing= disk"},
		{"--backing-d /x disk", "backing-dir= disk"},
		{"--b 1.2.3.4 disk", "option '--b' is ambiguous; possibilities: '--bind' '--bitmap'"},
		{"--s disk", "option '--s' is ambiguous; possibilities: '--socket' '--snapshot' '--shared' '--selinux-label'"},
		{"--s=3 disk", "option '--s=3' is ambiguous; possibilities: '--socket' '--snapshot' '--shared' '--selinux-label'"},
		{"--foo=3", "unrecognized option '--foo=3'"},
		{"-Z", "invalid option -- 'Z'"},
		{"-\xff", "invalid option -- '\xff'"},
		{"-p", "option requires an argument -- 'p'"},
		{"--port", "option '--port' requires an argument"},
		{"--fork=3", "option '--fork' doesn't allow an argument"},
		{"--read=3", "option '--read-only' doesn't allow an argument"},
	} {
		if got := scanned(strings.Fields(test.args)...); got != test.want {
			t.Errorf("%s:\n got %s\nwant %s", test.args, got, test.want)
		}
	}
}

func FuzzScan(f *testing.F) {
	f.Add("-p\x001\x00--read\x00disk\x00-B\x00b")
	f.Add("--image-opts\x00driver=raw,file.filename=a,,b")
	f.Fuzz(func(t *testing.T, line string) {
		scan(newServeOptions().flags, strings.Split(line, "\x00")) // must not panic
	})
}

func TestKeyValues(t *testing.T) {
	for _, test := range []struct{ in, implied, want string }{
		{"driver=raw,file.filename=a", "file", "driver=raw|file.filename=a"},
		{"disk.raw", "file", "file=disk.raw"},
		{"a,,b,driver=raw", "file", "file=a,b|driver=raw"},
		{"file.filename=a,,b,,c,driver=raw", "file", "file.filename=a,b,c|driver=raw"},
		{"file.filename=a,", "file", "file.filename=a"},
		{"file.filename=a=b", "file", "file.filename=a=b"},
		{"driver=raw,read-only", "file", "driver=raw|read-only=on"},
		{"read-only", "", "read-only=on"},
		{"driver=raw,noread-only,node-name", "file", "driver=raw|read-only=off|de-name=off"},
		{"nocow=on,nocow,nofile", "", "nocow=on|cow=off|file=off"},
		{"nodisk.raw", "file", "file=nodisk.raw"},
		{"", "file", ""},
		{",", "file", "file="},
		{"file.filename=,driver=raw", "file", "file.filename=|driver=raw"},
	} {
		var got []string
		for _, p := range keyValues(test.in, test.implied) {
			got = append(got, p.Key+"="+p.Value)
		}
		if diff := cmp.Diff(test.want, strings.Join(got, "|")); diff != "" {
			t.Errorf("%s: %s", test.in, diff)
		}
	}
}

func FuzzKeyValues(f *testing.F) {
	f.Add("driver=raw,file.filename=a,,b", "file")
	f.Fuzz(func(t *testing.T, s, implied string) {
		if n := len(keyValues(s, implied)); n > len(s) {
			t.Errorf("%d options out of %d bytes", n, len(s))
		}
	})
}

func TestCInt(t *testing.T) {
	for _, test := range []struct {
		in   string
		want int64
		ok   bool
	}{
		{"10", 10, true}, {"0x10", 16, true}, {"010", 8, true}, {" 7", 7, true}, {"+7", 7, true}, {"-7", -7, true}, {"0", 0, true},
		{"", 0, false}, {"1M", 0, false}, {"1_0", 0, false}, {"0b1", 0, false}, {"0o7", 0, false}, {"08", 0, false},
		{"4294967296", 0, false},
	} {
		got, err := cInt(test.in, 32)
		if (err == nil) != test.ok || test.ok && got != test.want {
			t.Errorf("%q: %d, %v", test.in, got, err)
		}
	}
}
