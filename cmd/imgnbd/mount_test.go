package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/partition"
)

// Which partition is meant, if none was named.
func TestMountChoice(t *testing.T) {
	ext4, swap, unknown := partition.Content{Name: "ext4", FileSystem: true}, partition.Content{Name: "swap"}, partition.Content{}
	table := func(contents ...partition.Content) *layout {
		l := &layout{table: &partition.Table{SectorSize: 512}, contents: contents}
		for i := range contents {
			l.table.Partitions = append(l.table.Partitions, partition.Partition{Number: i + 1, Sectors: 2048})
		}
		return l
	}
	broken := table(ext4, ext4)
	broken.table.Partitions[0].Problem = errors.New("past the end")
	for _, test := range []struct {
		name string
		opt  mountOptions
		l    *layout
		want int
		err  string
	}{
		{"the only one", mountOptions{}, table(ext4), 1, ""},
		{"the only one with a file system", mountOptions{}, table(swap, ext4, unknown), 2, ""},
		{"several", mountOptions{}, table(ext4, swap, ext4), 0, "several partitions with a file system: 1 (1 MiB, ext4), 2 (1 MiB, swap), 3 (1 MiB, ext4)"},
		{"one of them cannot be used", mountOptions{}, broken, 2, ""},
		{"several, but named", mountOptions{chosen: true, partition: 3}, table(ext4, swap, ext4), 3, ""},
		{"all of it, by name", mountOptions{chosen: true}, table(ext4), 0, ""},
		{"none known", mountOptions{}, table(unknown), 0, "no partition with a file system that is known here: 1 (1 MiB)"},
		{"none known, but told", mountOptions{fsType: "minix"}, table(unknown), 1, ""},
		{"none known, of several", mountOptions{fsType: "minix"}, table(unknown, unknown), 0, "no partition with a file system"},
		{"an empty table", mountOptions{fsType: "minix"}, table(), 0, "none can be used"},
		{"no table", mountOptions{}, &layout{whole: ext4}, 0, ""},
		{"no table, told", mountOptions{fsType: "minix"}, &layout{}, 0, ""},
		{"no table, not a file system", mountOptions{}, &layout{whole: swap}, 0, "disk is swap, not a file system"},
		{"nothing", mountOptions{}, &layout{}, 0, "no partition table and no file system that is known here"},
	} {
		got, err := test.opt.choose("disk", test.l)
		if got != test.want || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %d, %v", test.name, got, err)
		}
		if hint, ok := errors.AsType[*image.Hint](err); ok && strings.Contains(test.err, "none can") {
			t.Errorf("%s: %s", test.name, hint.Advice)
		}
	}
}

// What cannot be done is refused before anything is attached.
func TestMountOptions(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("disk", make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"mount -f raw disk":                    "an image and a directory are expected",
		"mount -f raw disk . .":                "an image and a directory are expected",
		"mount -f raw -o noatime,rw disk .":    "-o rw would write to nothing that stays",
		"mount -f raw -o noatime -o rw disk .": "-o rw would write to nothing that stays",
		"mount -f raw disk none":               "stat none: no such file or directory",
		"mount -f raw disk disk":               "disk: not a directory",
		"mount -f raw disk .":                  "disk has no partition table and no file system that is known here",
		"mount -f raw none .":                  "Could not open 'none': Could not open 'none': No such file or directory",
		"mount -f raw --partition=two disk .":  "--partition=two is not the number of a partition",
		"umount":                               "directory is missing",
		"umount . .":                           "one directory is expected, not . .",
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, "imgnbd: "+want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
}

// What a tool says is one line here.
func TestRunTool(t *testing.T) {
	err := runTool(context.Background(), "sh", "-c", "echo mount: bad; echo; echo '       dmesg has more' >&2; exit 32")
	if err == nil || err.Error() != "mount: bad; dmesg has more" {
		t.Error(err)
	}
	if err := runTool(context.Background(), "false"); err == nil || err.Error() != "exit status 1" {
		t.Error(err)
	}
	if err := runTool(context.Background(), "echo", "all is well"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		os.ReadFile(fifo) // until it has begun
		cancel(errors.New("not any more"))
	}()
	if err := runTool(ctx, "sh", "-c", "echo >"+fifo+"; exec sleep 1000"); err == nil || !strings.HasPrefix(err.Error(), "sh") && !strings.HasPrefix(err.Error(), "not any more; sh, process ") {
		t.Error(err)
	}
	if err := runTool(ctx, "echo"); err == nil || err.Error() != "not any more" {
		t.Error(err)
	}
}

// A signal leaves time to undo what was begun, also one that comes meanwhile.
func TestUndoing(t *testing.T) {
	for _, early := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			ctx, signal := context.WithCancel(context.Background())
			if early {
				signal()
			}
			undo, cancel := undoing(ctx)
			defer cancel()
			signal()
			synctest.Wait()
			if err := undo.Err(); err != nil {
				t.Errorf("at once: %v", err)
			}
			<-undo.Done()
			if err := context.Cause(undo); err == nil || err.Error() != "it takes longer" {
				t.Errorf("later: %v", err)
			}
		})
	}
}

// Who may not unmount is told how to go on, or that nobody can.
func TestAbandoned(t *testing.T) {
	of := func(image string, properties ...string) connect.Record {
		r := connect.Record{Backend: "imgnbd:X", Image: image}
		for i := 0; i < len(properties); i += 2 {
			r.Properties = append(r.Properties, connect.Property{Name: properties[i], Value: properties[i+1]})
		}
		return r
	}
	volatile := of("/disk")
	volatile.Volatile = "its server kept no journal"
	const forced = "imgnbd: hint: to give that up: imgnbd umount --force '/a b'\n"
	again := func(command string) string {
		return "imgnbd: hint: to lose nothing, start a server again: " + command + "\n" + forced
	}
	for _, test := range []struct {
		record connect.Record
		want   string
	}{
		{of("/srv/disk.raw", "format", "raw", "offset", "0", "partition", "2", "block size", "512"),
			again("imgnbd -c /dev/nbd3 -f raw -P 2 /srv/disk.raw")},
		{of("/srv/it's", "format", "qcow2", "offset", "512", "partition", "0", "block size", "4096"),
			again(`imgnbd -c /dev/nbd3 -f qcow2 -o 512 --block-size=4096 '/srv/it'\''s'`)},
		{of(`json:{"driver":"raw"}`, "format", "raw", "partition", "0", "offset", "0", "block size", "512", "options", `json:{"driver":"raw"}`),
			again(`imgnbd -c /dev/nbd3 'json:{"driver":"raw"}'`)},
		{of("driver=raw,file.filename=/disk", "format", "raw", "options", "driver=raw,file.filename=/disk"),
			again("imgnbd -c /dev/nbd3 --image-opts driver=raw,file.filename=/disk")},
		{connect.Record{Backend: "imgnbd:X", Server: "nbds://host/disk?tls-certificates=/c"},
			again("imgnbd -c /dev/nbd3 'nbds://host/disk?tls-certificates=/c'")},
		{volatile, "imgnbd: hint: no other server can go on with it, since its server kept no journal; to give that up: imgnbd umount --force '/a b'\n"},
		{connect.Record{}, "imgnbd: hint: no other server can go on with it, since it has left no record; to give that up: imgnbd umount --force '/a b'\n"},
	} {
		var messages strings.Builder
		newUI("imgnbd", nil, nil, &messages).fail(abandoned(&connect.AbandonedError{Path: "/dev/nbd3", Point: "/a b", Record: test.record}))
		want := "imgnbd: /dev/nbd3 on /a b: its server has ended, and what was not flushed would be lost\n" + test.want
		if diff := cmp.Diff(want, messages.String()); diff != "" {
			t.Error(diff)
		}
	}
}
