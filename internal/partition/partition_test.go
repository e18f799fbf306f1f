package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"testing"
	"unicode/utf16"
)

// An entry is one of an MBR: kind, start and sectors.
type entry struct {
	kind           byte
	start, sectors uint32
}

// putMBR writes a boot record at a sector.
func putMBR(b []byte, at int, entries ...entry) {
	s := b[at*sector:][:sector]
	for i, e := range entries {
		p := s[mbrTable+16*i:]
		p[4] = e.kind
		binary.LittleEndian.PutUint32(p[8:], e.start)
		binary.LittleEndian.PutUint32(p[12:], e.sectors)
	}
	s[mbrSignature], s[mbrSignature+1] = 0x55, 0xaa
}

// gptDisk returns a disk of 1 MiB with two partitions, and both headers.
func gptDisk(sectorSize int) []byte {
	b := make([]byte, 1<<20)
	putMBR(b, 0, entry{typeProtective, 1, 0xffffffff})
	last := len(b)/sectorSize - 1
	for _, at := range []int{1, last} {
		entries := at + 1
		if at == last {
			entries = last - 128*128/sectorSize
		}
		for i, first := range []int{64, 128} {
			e := b[entries*sectorSize+128*i:]
			e[0], e[16] = 0xaf, byte(i+1)
			binary.LittleEndian.PutUint64(e[32:], uint64(first))
			binary.LittleEndian.PutUint64(e[40:], uint64(first+9))
			for j, u := range utf16.Encode([]rune("Größe")) {
				binary.LittleEndian.PutUint16(e[56+2*j:], u)
			}
		}
		h := b[at*sectorSize:]
		copy(h, gptSignature)
		binary.LittleEndian.PutUint32(h[8:], 0x10000)
		binary.LittleEndian.PutUint32(h[12:], gptHeaderSize)
		binary.LittleEndian.PutUint64(h[24:], uint64(at))
		binary.LittleEndian.PutUint64(h[32:], uint64(1+last-at))
		binary.LittleEndian.PutUint64(h[40:], 40)
		binary.LittleEndian.PutUint64(h[48:], uint64(last-40))
		binary.LittleEndian.PutUint64(h[72:], uint64(entries))
		binary.LittleEndian.PutUint32(h[80:], 128)
		binary.LittleEndian.PutUint32(h[84:], 128)
		seal(b, sectorSize, at)
	}
	return b
}

// seal makes the checksums of a header right.
func seal(b []byte, sectorSize, at int) {
	h := b[at*sectorSize:]
	entries := int(binary.LittleEndian.Uint64(h[72:])) * sectorSize
	n := int(binary.LittleEndian.Uint32(h[80:])) * int(binary.LittleEndian.Uint32(h[84:]))
	if entries+n <= len(b) && n >= 0 {
		binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(b[entries:entries+n]))
	}
	binary.LittleEndian.PutUint32(h[16:], 0)
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:binary.LittleEndian.Uint32(h[12:])]))
}

// show writes a table in a line: its partitions, then its damage.
func show(t *Table) string {
	var s []string
	for _, p := range t.Partitions {
		line := fmt.Sprintf("%d:%d+%d", p.Number, p.Start, p.Sectors)
		if p.Extended {
			line += "x"
		}
		if p.Problem != nil {
			line += "!"
		}
		s = append(s, line)
	}
	for _, err := range t.Damage {
		s = append(s, "("+err.Error()+")")
	}
	return strings.Join(s, " ")
}

func TestMBR(t *testing.T) {
	for _, test := range []struct {
		name, want string
		make       func(b []byte)
	}{
		{"primary", "1:8+8 4:32+8", func(b []byte) { putMBR(b, 0, entry{0x83, 8, 8}, entry{}, entry{0x83, 0, 0}, entry{7, 32, 8}) }},
		{"type 0", "1:8+8", func(b []byte) { putMBR(b, 0, entry{0, 8, 8}) }},
		{"whole disk", "1:0+2048", func(b []byte) { putMBR(b, 0, entry{0, 0, 2048}) }},
		{"past the end", "1:8+2041! 2:4294967295+4294967295!", func(b []byte) {
			putMBR(b, 0, entry{0x83, 8, 2041}, entry{0x83, 0xffffffff, 0xffffffff})
		}},
		{"logical", "1:8+8 2:100+900x 5:104+8 6:204+8", func(b []byte) {
			putMBR(b, 0, entry{0x83, 8, 8}, entry{5, 100, 900})
			putMBR(b, 100, entry{0x83, 4, 8}, entry{5, 100, 50})
			putMBR(b, 200, entry{0x83, 4, 8})
		}},
		{"logical, an empty record between", "1:100+900x 5:304+8", func(b []byte) {
			putMBR(b, 0, entry{0x0f, 100, 900})
			putMBR(b, 100, entry{}, entry{5, 100, 50})
			putMBR(b, 200, entry{}, entry{5, 200, 50})
			putMBR(b, 300, entry{0x83, 4, 8})
		}},
		{"two extended", "1:100+100x 2:300+100x 5:104+8 6:304+8", func(b []byte) {
			putMBR(b, 0, entry{5, 100, 100}, entry{0x85, 300, 100})
			putMBR(b, 100, entry{0x83, 4, 8})
			putMBR(b, 300, entry{0x83, 4, 8})
		}},
		{"four entries in a record", "1:100+900x 5:104+8 6:120+4", func(b []byte) {
			putMBR(b, 0, entry{5, 100, 900})
			putMBR(b, 100, entry{0x83, 4, 8}, entry{}, entry{0x83, 20, 4}, entry{0x83, 20, 901})
		}},
		{"a record that leads to itself", "1:100+900x 5:104+8 (extended boot record at sector 100: the chain of records comes back to it)", func(b []byte) {
			putMBR(b, 0, entry{5, 100, 900})
			putMBR(b, 100, entry{0x83, 4, 8}, entry{5, 0, 50})
		}},
		{"a loop of two", "1:100+900x 5:104+8 6:204+8 (extended boot record at sector 100: the chain of records comes back to it)", func(b []byte) {
			putMBR(b, 0, entry{5, 100, 900})
			putMBR(b, 100, entry{0x83, 4, 8}, entry{5, 100, 50})
			putMBR(b, 200, entry{0x83, 4, 8}, entry{5, 0, 50})
		}},
		{"a record past the end", "1:4000+900x! (extended boot record at sector 4000: 512 bytes at 2048000 are past the end of the disk (1048576))", func(b []byte) {
			putMBR(b, 0, entry{5, 4000, 900})
		}},
		{"a record that is none", "1:100+900x (extended boot record at sector 100: it has no signature)", func(b []byte) {
			putMBR(b, 0, entry{5, 100, 900})
		}},
		{"empty", "", func(b []byte) { putMBR(b, 0) }},
	} {
		b := make([]byte, 1<<20)
		test.make(b)
		table, err := Read(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
		} else if got := show(table); got != test.want || table.Scheme != MBR {
			t.Errorf("%s: %s\nwant %s", test.name, got, test.want)
		}
	}
}

// A chain that does not end costs no more than its bound.
func TestEndlessChain(t *testing.T) {
	for _, logical := range []uint32{0, 1} {
		b := make([]byte, 1<<20)
		putMBR(b, 0, entry{5, 1, 2000})
		for at := 1; at < 2000; at++ {
			putMBR(b, at, entry{0x83, 1, logical}, entry{5, uint32(at), 1})
		}
		reads := &counter{ReaderAt: bytes.NewReader(b)}
		table, err := Read(reads, int64(len(b)))
		if err != nil || len(table.Damage) != 1 || !strings.Contains(table.Damage[0].Error(), "does not end") {
			t.Errorf("%v, %v", table.Damage, err)
		}
		if reads.n > maxEBR+1 || len(table.Partitions) > 256 {
			t.Errorf("%d reads, %d partitions", reads.n, len(table.Partitions))
		}
	}
}

type counter struct {
	io.ReaderAt
	n int
}

func (c *counter) ReadAt(p []byte, off int64) (int, error) {
	c.n++
	return c.ReaderAt.ReadAt(p, off)
}

func TestGPT(t *testing.T) {
	const good = "1:64+10 2:128+10"
	for _, sectorSize := range []int{512, 4096} {
		last := 1<<20/sectorSize - 1
		for _, test := range []struct {
			name, want, err string
			change          func(b []byte) []byte
		}{
			{"good", good, "", func(b []byte) []byte { return b }},
			{"a byte of the header", good + " (GPT header at sector 1: its checksum is wrong) (the copy at sector LAST is used)", "",
				func(b []byte) []byte { b[sectorSize+40] ^= 1; return b }},
			{"a byte of the entries", good + " (GPT header at sector 1: the checksum of the entries is wrong) (the copy at sector LAST is used)", "",
				func(b []byte) []byte { b[2*sectorSize+130] ^= 1; return b }},
			{"no header", good + " (GPT header at sector 1: it has no signature) (the copy at sector LAST is used)", "",
				func(b []byte) []byte { clear(b[sectorSize:][:512]); return b }},
			{"the copy", good + " (copy of the GPT header at sector LAST: its checksum is wrong)", "",
				func(b []byte) []byte { b[last*sectorSize+40] ^= 1; return b }},
			{"both", "", "GPT header at sector 1: its checksum is wrong; GPT header at sector LAST: its checksum is wrong", func(b []byte) []byte {
				b[sectorSize+40] ^= 1
				b[last*sectorSize+40] ^= 1
				return b
			}},
			{"neither", "", "the MBR is there to protect a GPT, but there is none", func(b []byte) []byte {
				clear(b[sectorSize:][:512])
				clear(b[last*sectorSize:][:512])
				return b
			}},
			{"hybrid", good, "", func(b []byte) []byte {
				putMBR(b, 0, entry{0x83, 900, 10}, entry{typeProtective, 1, 60})
				return b
			}},
			{"protected elsewhere", "", "the MBR is there to protect a GPT, but not from sector 1 on: neither is taken for a table", func(b []byte) []byte {
				putMBR(b, 0, entry{0x83, 900, 10}, entry{typeProtective, 2, 60})
				return b
			}},
			{"without protection", "1:900+10", "", func(b []byte) []byte {
				putMBR(b, 0, entry{0x83, 900, 10})
				return b
			}},
			{"cut off", good + " (the table is of a disk of SECTORS sectors, this one has 160)", "",
				func(b []byte) []byte { return b[:160*sectorSize] }},
			{"cut off in a partition", "1:64+10 2:128+10! (the table is of a disk of SECTORS sectors, this one has 130)", "",
				func(b []byte) []byte { return b[:130*sectorSize] }},
			{"enlarged", good, "", func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) }},
			{"enlarged, entries damaged", good + " (GPT header at sector 1: the checksum of the entries is wrong) (the copy at sector LAST is used)", "",
				func(b []byte) []byte { b[2*sectorSize+130] ^= 1; return append(b, make([]byte, 1<<20)...) }},
		} {
			places := strings.NewReplacer("LAST", fmt.Sprint(last), "SECTORS", fmt.Sprint(last+1))
			b := test.change(gptDisk(sectorSize))
			table, err := Read(bytes.NewReader(b), int64(len(b)))
			switch {
			case err != nil || test.err != "":
				if err == nil || err.Error() != places.Replace(test.err) {
					t.Errorf("%d, %s: %v", sectorSize, test.name, err)
				}
			default:
				if got := show(table); got != places.Replace(test.want) {
					t.Errorf("%d, %s: %s\nwant %s", sectorSize, test.name, got, places.Replace(test.want))
				}
				if table.Scheme == GPT && (table.SectorSize != int64(sectorSize) || table.Partitions[0].Name != "Größe") {
					t.Errorf("%d, %s: %+v", sectorSize, test.name, table)
				}
			}
		}
	}
}

// What a sealed header says is not believed either.
func TestHostileGPT(t *testing.T) {
	for _, test := range []struct {
		name, want string
		off        int
		value      uint64
		wide       bool
	}{
		{"header of 0 bytes", "it says that it has 0 bytes", 12, 0, false},
		{"header of 4 GiB", "it says that it has 4294967295 bytes", 12, 0xffffffff, false},
		{"elsewhere", "it says that it is at sector 2", 24, 2, true},
		{"no room", "partitions may have the sectors 40 to 39, which are none", 48, 39, true},
		{"4 Gi entries", "4294967295 entries of 128 bytes are too many", 80, 0xffffffff, false},
		{"entries of 0 bytes", "it says that an entry has 0 bytes", 84, 0, false},
		{"entries of 64 bytes", "it says that an entry has 64 bytes", 84, 64, false},
		{"entries of 4 GiB", "it says that an entry has 4294967168 bytes", 84, 0xffffff80, false},
		{"entries past the end", "its entries begin at sector 18446744073709551615, past the end of the disk", 72, ^uint64(0), true},
		{"entries over the end", "past the end of the disk", 72, 2047, true},
	} {
		b := gptDisk(512)
		clear(b[len(b)-512:])
		h := b[512:]
		if test.wide {
			binary.LittleEndian.PutUint64(h[test.off:], test.value)
		} else {
			binary.LittleEndian.PutUint32(h[test.off:], uint32(test.value))
		}
		if test.off != 12 {
			n := binary.LittleEndian.Uint32(h[12:])
			binary.LittleEndian.PutUint32(h[16:], 0)
			binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:n]))
		}
		if _, err := Read(bytes.NewReader(b), int64(len(b))); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	// Entries that cannot be partitions are shown, and cannot be used.
	b := gptDisk(512)
	e := b[1024:]
	binary.LittleEndian.PutUint64(e[32:], 100)
	binary.LittleEndian.PutUint64(e[40:], 99)
	binary.LittleEndian.PutUint64(e[128+32:], 0)
	binary.LittleEndian.PutUint64(e[128+40:], ^uint64(0))
	seal(b, 512, 1)
	table, err := Read(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := show(table), "1:100+0! 2:0+18446744073709551615!"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for _, p := range table.Partitions {
		if _, _, _, err := table.Find(p.Number); err == nil {
			t.Errorf("partition %d can be used", p.Number)
		}
	}
}

func TestNoTable(t *testing.T) {
	fat := make([]byte, 1<<20)
	copy(fat, "\xeb\x3c\x90mkfs.fat\x00\x02\x04\x01\x00\x02\x00\x02\x00\x08\xf8")
	fat[510], fat[511] = 0x55, 0xaa
	code := make([]byte, 1<<20)
	putMBR(code, 0, entry{0x83, 8, 8})
	code[mbrTable] = 'x'
	for name, b := range map[string][]byte{
		"nothing": {}, "a byte": {1}, "511 bytes": make([]byte, 511), "zeros": make([]byte, 1<<20), "FAT": fat, "code": code,
	} {
		if table, err := Read(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrNone) {
			t.Errorf("%s: %v, %v", name, table, err)
		}
	}
	broken := errors.New("broken")
	if _, err := Read(failing{broken}, 1<<20); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if _, err := Read(bytes.NewReader(make([]byte, 100)), 1<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestFind(t *testing.T) {
	b := make([]byte, 1<<20)
	putMBR(b, 0, entry{0x83, 8, 8}, entry{5, 100, 900}, entry{0x83, 2000, 100})
	putMBR(b, 100, entry{0x83, 4, 8}, entry{5, 0, 50})
	table, err := Read(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	for number, want := range map[int]string{
		0: "there is no partition 0, only 1, 2, 3, 5; extended boot record at sector 100: the chain of records comes back to it",
		2: "partition 2: it only holds the logical ones, which begin with 5",
		3: "partition 3: it ends at sector 2100, the disk at 2048",
	} {
		if _, _, _, err := table.Find(number); err == nil || err.Error() != want {
			t.Errorf("%d: %v", number, err)
		}
	}
	if p, off, n, err := table.Find(5); err != nil || off != 104*512 || n != 8*512 || p.Type != "83" {
		t.Errorf("%+v, %d, %d, %v", p, off, n, err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(gptDisk(512)[:66*512], int64(1<<20))
	f.Add(gptDisk(4096)[:24<<10], int64(1<<20))
	b := make([]byte, 4096)
	putMBR(b, 0, entry{0x83, 1, 1}, entry{5, 2, 5})
	putMBR(b, 2, entry{0x83, 1, 1}, entry{5, 2, 1})
	putMBR(b, 4, entry{0x83, 1, 1})
	f.Add(b, int64(4096))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		reads := &counter{ReaderAt: sparse(b)}
		table, err := Read(reads, size)
		if reads.n > 2*maxEBR {
			t.Errorf("%d reads", reads.n)
		}
		if err != nil {
			return
		}
		for _, p := range table.Partitions {
			_, off, n, err := table.Find(p.Number)
			if err == nil && (off < 0 || n <= 0 || off > size-n) {
				t.Errorf("partition %+v of a disk of %d bytes: %d bytes at %d", p, size, n, off)
			}
			if err == nil {
				if _, err := Identify(reads, off, n); err != nil {
					t.Errorf("partition %+v: %v", p, err)
				}
			}
		}
	})
}

// sparse is a disk of any size that has zeros after its bytes.
type sparse []byte

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(s)) {
		copy(p, s[off:])
	}
	return len(p), nil
}
