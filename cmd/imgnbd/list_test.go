package main

import (
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

func listed(l nbd.Listed, extended bool) string {
	var b strings.Builder
	writeListed(&b, &l, extended)
	return b.String()
}

func TestListIsPrintable(t *testing.T) {
	got := listed(nbd.Listed{
		ExportInfo: nbd.ExportInfo{Name: "a\n export: 'b'", Description: "\x1b[2J", Flags: nbd.FlagHasFlags},
		Contexts:   []string{"x:\x07"},
	}, false)
	want := " export: 'a\ufffd export: 'b''\n  description: \ufffd[2J\n  size:  0\n  flags: 0x1 ( )\n" +
		"  available meta contexts: 1\n   x:\ufffd\n"
	if got != want {
		t.Errorf("%q", got)
	}
}

// A server of this age and its own list: ours is the same.
func TestListExtended(t *testing.T) {
	newer := qemu.Newer(t, "qemu-nbd")
	workplace(t)
	socket := t.TempDir() + "/s"
	qemu.Run(t, newer, "--fork", "--pid-file="+socket+".pid", "-t", "-r", "-A", "-x", "name", "-k", socket, "disk.qcow2")
	defer qemu.Run(t, "sh", "-c", "kill $(cat "+socket+".pid)")
	want := qemu.Run(t, newer, "-L", "-k", socket)
	if got := ours("imgnbd", "-L", "-k", socket); got != (outcome{want, "", 0}) || !strings.Contains(want, "64-bit") {
		t.Errorf("%+v, want %s", got, want)
	}
}
