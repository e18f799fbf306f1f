package partition

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// sfdisk makes tables at random, and sfdisk and partx read them as we do.
func TestSameAsUtilLinux(t *testing.T) {
	qemu.Require(t, "sfdisk")
	qemu.Require(t, "partx")
	for seed := range uint64(24) {
		r := rand.New(rand.NewPCG(seed, 1))
		script := randomScript(r)
		file := filepath.Join(t.TempDir(), "disk")
		disk := newDisk(t, file, 64<<20)
		cmd := exec.Command("sfdisk", "-q", "--no-reread", "--no-tell-kernel", file)
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("seed %d: %v: %s\n%s", seed, err, out, script)
		}
		table, err := Read(disk, 64<<20)
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, script)
		}
		if table.Damage != nil {
			t.Errorf("seed %d: %v", seed, table.Damage)
		}
		if diff := cmp.Diff(sfdiskTable(t, file), asSfdisk(table)); diff != "" {
			t.Errorf("seed %d, sfdisk (-) and we (+):\n%s\n%s", seed, diff, script)
		}
		if diff := cmp.Diff(partxTable(t, file, 512), asPartx(table)); diff != "" {
			t.Errorf("seed %d, partx (-) and we (+):\n%s\n%s", seed, diff, script)
		}
	}
}

// Tables that sfdisk does not make.
func TestSameAsPartx(t *testing.T) {
	qemu.Require(t, "partx")
	for name, make := range map[string]func() ([]byte, int){
		"4096": func() ([]byte, int) { return gptDisk(4096), 4096 },
		"backup": func() ([]byte, int) {
			b := gptDisk(512)
			clear(b[512:1024])
			return b, 512
		},
		"hybrid": func() ([]byte, int) {
			b := gptDisk(512)
			putMBR(b, 0, entry{0x83, 900, 10}, entry{typeProtective, 1, 60})
			return b, 512
		},
		"not in order": func() ([]byte, int) {
			b := gptDisk(512)
			putMBR(b, 0, entry{5, 100, 900}, entry{}, entry{0x83, 20, 30})
			putMBR(b, 100, entry{0x83, 504, 8}, entry{5, 200, 50})
			putMBR(b, 300, entry{}, entry{5, 50, 50})
			putMBR(b, 150, entry{0x83, 4, 8}, entry{}, entry{0x82, 20, 4}, entry{0x83, 20, 901})
			return b, 512
		},
	} {
		b, sectorSize := make()
		file := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		f := newDisk(t, file, int64(len(b)))
		table, err := Read(f, int64(len(b)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(partxTable(t, file, sectorSize), asPartx(table)); diff != "" {
			t.Errorf("%s, partx (-) and we (+):\n%s", name, diff)
		}
	}
}

func newDisk(t *testing.T, file string, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o644)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// randomScript is what sfdisk makes a table of, on a disk of 64 MiB.
func randomScript(r *rand.Rand) string {
	var b strings.Builder
	sectors := func() int { return 2048 * (1 + r.IntN(3)) }
	if r.IntN(2) == 0 {
		b.WriteString("label: dos\n")
		types := []string{"83", "7", "82", "c", "fd"}
		for range r.IntN(4) {
			fmt.Fprintf(&b, "size=%d, type=%s", sectors(), types[r.IntN(len(types))])
			if r.IntN(3) == 0 {
				b.WriteString(", bootable")
			}
			b.WriteString("\n")
		}
		if r.IntN(3) > 0 {
			b.WriteString("type=" + []string{"5", "f", "85"}[r.IntN(3)] + "\n")
			for range r.IntN(8) {
				fmt.Fprintf(&b, "size=%d, type=%s\n", sectors(), types[r.IntN(len(types))])
			}
		}
		return b.String()
	}
	fmt.Fprintf(&b, "label: gpt\ntable-length: %d\n", []int{128, 128, 16, 200}[r.IntN(4)])
	types := []string{"L", "S", "U", "21686148-6449-6E6F-744E-656564454649"}
	for i := range r.IntN(5) {
		fmt.Fprintf(&b, "%d : size=%d, type=%s", 1+i*3, sectors(), types[r.IntN(len(types))])
		if r.IntN(2) == 0 {
			fmt.Fprintf(&b, ", name=\"%s\"", []string{"root", "EFI System Partition", "données 数据", "😀"}[r.IntN(4)])
		}
		if r.IntN(2) == 0 {
			fmt.Fprintf(&b, ", attrs=\"%s\"", []string{"RequiredPartition", "LegacyBIOSBootable GUID:59", "NoBlockIOProtocol GUID:48,63"}[r.IntN(3)])
		}
		b.WriteString("\n")
	}
	return b.String()
}

type sfdiskPart struct {
	Node                    string
	Start, Size             uint64
	Type, UUID, Name, Attrs string
	Bootable                bool
}

type sfdiskDisk struct {
	Label, ID         string
	FirstLBA, LastLBA uint64
	SectorSize        int64
	Partitions        []sfdiskPart
}

func sfdiskTable(t *testing.T, file string) sfdiskDisk {
	t.Helper()
	var all struct{ Partitiontable sfdiskDisk }
	if err := json.Unmarshal([]byte(qemu.Run(t, "sfdisk", "-J", file)), &all); err != nil {
		t.Fatal(err)
	}
	d := all.Partitiontable
	for i := range d.Partitions {
		d.Partitions[i].Node = strings.TrimPrefix(d.Partitions[i].Node, file)
	}
	return d
}

func asSfdisk(t *Table) sfdiskDisk {
	d := sfdiskDisk{string(t.Scheme), t.ID, t.First, t.Last, t.SectorSize, nil}
	for _, p := range t.Partitions {
		d.Partitions = append(d.Partitions, sfdiskPart{strconv.Itoa(p.Number), p.Start, p.Sectors, p.Type, p.ID, p.Name, p.Attrs, p.Bootable})
	}
	return d
}

// A partxPart is a line of partx.
type partxPart struct{ Number, Start, Sectors, Scheme string }

func partxTable(t *testing.T, file string, sectorSize int) []partxPart {
	t.Helper()
	var list []partxPart
	out := qemu.Run(t, "partx", "-r", "-g", "-o", "NR,START,SECTORS,SCHEME", "-S", strconv.Itoa(sectorSize), file)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 4 {
			t.Fatalf("partx: %q", line)
		}
		list = append(list, partxPart{f[0], f[1], f[2], f[3]})
	}
	return list
}

func asPartx(t *Table) []partxPart {
	var list []partxPart
	unit := uint64(t.SectorSize / 512) // partx counts in these, always
	for _, p := range t.Partitions {
		list = append(list, partxPart{strconv.Itoa(p.Number), strconv.FormatUint(p.Start*unit, 10), strconv.FormatUint(p.Sectors*unit, 10), string(t.Scheme)})
	}
	return list
}

// What partitions hold is what blkid says of them.
func TestIdentifySameAsBlkid(t *testing.T) {
	qemu.Require(t, "blkid")
	for _, mkfs := range [][]string{
		{"mkfs.ext2", "-q", "FILE"},
		{"mkfs.ext3", "-q", "FILE"},
		{"mkfs.ext4", "-q", "FILE"},
		{"mkfs.xfs", "-q", "FILE"},
		{"mkfs.btrfs", "-q", "FILE"},
		{"mkfs.vfat", "FILE"},
		{"mkfs.vfat", "-F", "16", "FILE"},
		{"mkfs.vfat", "-F", "32", "FILE"},
		{"mkswap", "-q", "FILE"},
		{"true"},
	} {
		qemu.Require(t, mkfs[0])
		const size = 400 << 20
		file := filepath.Join(t.TempDir(), "fs")
		f := newDisk(t, file, size)
		args := append([]string(nil), mkfs[1:]...)
		for i, a := range args {
			args[i] = strings.ReplaceAll(a, "FILE", file)
		}
		qemu.Run(t, mkfs[0], args...)
		want := strings.TrimSpace(qemu.Try(t, "blkid", "-p", "-s", "TYPE", "-o", "value", file).Stdout)
		got, err := Identify(f, 0, size)
		if err != nil || got.Name != want {
			t.Errorf("%s: %+v, %v; blkid says %q", mkfs[0], got, err, want)
		}
		if got.FileSystem != (got.Name != "" && got.Name != "swap") {
			t.Errorf("%s: %+v", mkfs[0], got)
		}
		// None of them is taken for a table.
		if table, err := Read(f, size); err == nil {
			t.Errorf("%s: %s", mkfs[0], show(table))
		}
	}
}
