//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

func TestReplay(t *testing.T) {
	le := binary.LittleEndian
	sector := func(words ...uint64) []byte {
		b := make([]byte, 512)
		for i, w := range words {
			le.PutUint64(b[i*8:], w)
		}
		return b
	}
	mark := sector(0, 0, flagMark, 3)
	copy(mark[32:], "one")
	log := bytes.Join([][]byte{
		sector(logMagic, 1, 5, 512),
		sector(2, 2, 1), bytes.Repeat([]byte{'a'}, 1024),
		sector(0, 0, 1), // a flush
		mark,
		sector(3, 1, 2), bytes.Repeat([]byte{'b'}, 512),
		sector(2, 1, flagDiscard),
	}, nil)
	dir := t.TempDir()
	file, disk := filepath.Join(dir, "log"), filepath.Join(dir, "disk")
	if err := os.WriteFile(file, log, 0o600); err != nil {
		t.Fatal(err)
	}
	var list bytes.Buffer
	if err := run([]string{file}, &list); err != nil || list.String() != "5\n2 one\n" {
		t.Errorf("%q, %v", &list, err)
	}
	for n, want := range map[string]string{"1": "\x00\x00aa", "3": "\x00\x00aa", "4": "\x00\x00ab", "5": "\x00\x00\x00b"} {
		if err := run([]string{file, disk, n}, nil); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(disk)
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			if i/512 >= len(want) || b[i] != want[i/512] {
				t.Fatalf("after %s entries byte %d is %#x", n, i, b[i])
			}
		}
	}
	for _, args := range [][]string{{}, {file, disk}, {file, disk, "6"}, {disk}} {
		if err := run(args, &list); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}
