package main

import (
	"errors"
	"os"
	"strings"
	"testing"

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
