package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// disk64 makes a disk of 64 MiB in the current folder, and a table on it.
func disk64(t *testing.T, name, script string, args ...string) {
	t.Helper()
	if err := os.WriteFile(name, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, 64<<20); err != nil {
		t.Fatal(err)
	}
	qemu.Require(t, args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%q: %v: %s", args, err, out)
	}
}

// tables makes disks with tables of three programs.
func tables(t *testing.T) []string {
	t.Helper()
	disk64(t, "mbr", ",10M\n,10M,,*\n,,E\n,5M\n,7M\n,\n", "sfdisk", "-q", "mbr")
	disk64(t, "gpt", "label: gpt\nname=\"a name\",size=10M\nstart=50000,size=9999\n", "sfdisk", "-q", "gpt")
	disk64(t, "sgdisk", "", "sgdisk", "-n", "3:0:+5M", "-n", "1:20M:+1M", "-t", "1:ef00", "-c", "3:Größe", "sgdisk")
	disk64(t, "parted", "", "parted", "-s", "parted", "mklabel", "msdos", "mkpart", "primary", "ext4", "1MiB", "9MiB",
		"mkpart", "extended", "10MiB", "60MiB", "mkpart", "logical", "fat32", "11MiB", "20MiB", "mkpart", "logical", "xfs", "21MiB", "59MiB")
	return []string{"mbr", "gpt", "sgdisk", "parted"}
}

// A span is a partition in sectors.
type span struct {
	Start, Size uint64
	Type, Name  string
}

// The table is the one that sfdisk reads, in raw and in qcow2.
func TestPartitionsSameAsSfdisk(t *testing.T) {
	workplace(t)
	for _, name := range tables(t) {
		out, err := exec.Command("sfdisk", "-J", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		var theirs struct {
			Table struct {
				Label, ID  string
				Partitions []struct {
					Node, Type, Name string
					Start, Size      uint64
				}
			} `json:"partitiontable"`
		}
		if err := json.Unmarshal(out, &theirs); err != nil {
			t.Fatal(err)
		}
		want := map[string]span{}
		for _, p := range theirs.Table.Partitions {
			want[strings.TrimPrefix(p.Node, name)] = span{p.Start, p.Size, p.Type, p.Name}
		}
		qemu.Img(t, "convert", "-f", "raw", "-O", "qcow2", name, name+".qcow2")
		for _, args := range [][]string{{"-f", "raw", name}, {name + ".qcow2"}} {
			o := ours(append([]string{"imgnbd", "partitions", "--output=json"}, args...)...)
			var table tableJSON
			if err := json.Unmarshal([]byte(o.Stdout), &table); err != nil || o.Code != 0 || o.Stderr != "" {
				t.Fatalf("%q: %+v, %v", args, o, err)
			}
			got := map[string]span{}
			for _, p := range table.Partitions {
				got[fmt.Sprint(p.Number)] = span{p.Start, p.Sectors, p.Type, p.Name}
			}
			if diff := cmp.Diff(want, got); diff != "" || string(table.Scheme) != theirs.Table.Label || table.ID != theirs.Table.ID {
				t.Errorf("%q, sfdisk (-) and we (+):\n%s\n%+v", args, diff, table)
			}
		}
	}
}

// Tables that lie are shown as far as they are believed, take no memory or
// time to speak of, and never lead out of the image.
func TestHostileTables(t *testing.T) {
	workplace(t)
	disk64(t, "gpt", "label: gpt\n,1M\n,1M\n", "sfdisk", "-q", "gpt")
	good, err := os.ReadFile("gpt")
	if err != nil {
		t.Fatal(err)
	}
	// seal makes the checksums of the first header right.
	seal := func(b []byte) {
		h, n := b[512:604], int(binary.LittleEndian.Uint32(b[512+80:]))
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(b[1024:1024+128*n]))
		clear(h[16:20])
		binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	}
	for _, test := range []struct {
		name string
		lie  func(b []byte)
		want string // of partitions
		one  string // of --partition=1
	}{
		{"past the end", func(b []byte) { binary.LittleEndian.PutUint64(b[1024+40:], 1<<50); seal(b) },
			"partition 1: it ends at sector 1125899906842625, the disk at 131072", "it ends at sector"},
		{"wraps", func(b []byte) { binary.LittleEndian.PutUint64(b[1024+40:], 1<<64-1); seal(b) },
			"partition 1: it ends", "partition 1: it ends"},
		{"backwards", func(b []byte) { binary.LittleEndian.PutUint64(b[1024+40:], 5); seal(b) },
			"partition 1: it ends before it begins", "it ends before it begins"},
		{"no GPT", func(b []byte) { clear(b[512:1024]); clear(b[len(b)-512:]) },
			"the MBR is there to protect a GPT, but there is none", "but there is none"},
		{"the copy", func(b []byte) { b[512+60] ^= 1 }, "the copy at sector 131071 is used", ""},
		{"none", func(b []byte) { clear(b[:512]) }, "no partition table (MBR or GPT)", "no partition table (MBR or GPT)"},
		{"thousands", func(b []byte) {
			const n = 32768
			for i := range n {
				copy(b[1024+128*i:], good[1024:1152])
			}
			binary.LittleEndian.PutUint32(b[512+80:], n)
			seal(b)
		}, "", ""},
		{"too many", func(b []byte) {
			binary.LittleEndian.PutUint32(b[512+80:], 1<<31-1)
			clear(b[len(b)-512:])
			h := b[512:604]
			clear(h[16:20])
			binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h))
		},
			"2147483647 entries of 128 bytes are too many", "are too many"},
		{"a name for terminals", func(b []byte) { b[1024+56] = 0x1b; seal(b) }, "", ""},
		{"the chain of logical ones comes back", func(b []byte) {
			clear(b[:1024])
			copy(b[446:], []byte{0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0, 8, 0, 0})
			copy(b[512+446+16:], []byte{0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0})
			copy(b[510:], "\x55\xaa")
			copy(b[1022:], "\x55\xaa")
		}, "the chain of records comes back", "it only holds the logical ones"},
	} {
		b := bytes.Clone(good)
		test.lie(b)
		if err := os.WriteFile("lie", b, 0o644); err != nil {
			t.Fatal(err)
		}
		for _, form := range []string{"human", "json"} {
			o := ours("imgnbd", "partitions", "-f", "raw", "--output", form, "lie")
			if !strings.Contains(o.Stdout+o.Stderr, test.want) || strings.Contains(o.Stdout+o.Stderr, "\x1b") {
				t.Errorf("%s: %+v", test.name, o)
			}
		}
		o := ours("imgnbd", "-r", "--partition=1", "-f", "raw", "lie", "--run", "true")
		if (o.Code == 0) != (test.one == "") || !strings.Contains(o.Stderr, test.one) {
			t.Errorf("%s: --partition: %+v", test.name, o)
		}
	}
}

func TestPartitionOptions(t *testing.T) {
	for args, want := range map[string]string{
		"--partition=1 --offset=512 disk": "--partition and --offset exclude each other",
		"-P 1 -L":                         "--partition and --list exclude each other",
		"-P 1 -d /dev/nbd0":               "--partition and --disconnect exclude each other",
		"-P -1 disk":                      "--partition=-1 is not the number of a partition",
		"-P x disk":                       "--partition=x is not the number of a partition",
		"partitions":                      "Expecting one image file name",
		"partitions a b":                  "Expecting one image file name",
		"partitions /nonexistent":         "Could not open '/nonexistent': Could not open '/nonexistent': No such file or directory",
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, "imgnbd: "+want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
}
