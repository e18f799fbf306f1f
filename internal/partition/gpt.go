package partition

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
)

// UEFI Specification, chapter 5.
const (
	gptSignature  = "EFI PART"
	gptHeaderSize = 92
	gptEntrySize  = 128

	maxGPTEntries = 4 << 20 // bytes of all entries
)

// A gptHeader is one of the two, checked but for its entries.
type gptHeader struct {
	firstUsable, lastUsable uint64
	alternate               uint64 // where the other one is
	id                      string
	entries                 uint64 // sector
	count, size             uint32 // of entries, and bytes of each
	entriesCRC              uint32
}

// readGPT reads the table behind the first header, or if that is damaged,
// behind the one at the end.
func (d *disk) readGPT() (*Table, error) {
	var damage []error
	for _, sectorSize := range d.sectorSizes() {
		h, t, err := d.readGPTAt(1, sectorSize)
		if err == nil {
			t.Damage = d.lookAtBackup(h, sectorSize)
			return t, nil
		}
		first := fmt.Errorf("GPT header at sector 1: %w", err)
		at := uint64(d.size/sectorSize) - 1
		tried := []uint64{at}
		if h != nil && h.alternate != at {
			tried = append(tried, h.alternate) // the disk has been enlarged
		}
		for _, at := range tried {
			_, t, err := d.readGPTAt(at, sectorSize)
			if err == nil {
				t.Damage = []error{first, fmt.Errorf("the copy at sector %d is used", at)}
				return t, nil
			}
			if !errors.Is(err, errNoGPT) {
				damage = append(damage, fmt.Errorf("GPT header at sector %d: %w", at, err))
			}
		}
		if !errors.Is(first, errNoGPT) {
			damage = append([]error{first}, damage...)
		}
	}
	if damage == nil {
		return nil, errors.New("the MBR is there to protect a GPT, but there is none")
	}
	return nil, together(damage...)
}

// sectorSizes returns what the sectors of the disk may have been, those first
// at which there is a signature.
func (d *disk) sectorSizes() []int64 {
	var sizes []int64
	for _, n := range []int64{512, 4096, 1024, 2048} {
		b := make([]byte, len(gptSignature))
		if d.size < 3*n {
			continue
		}
		if d.read(b, n) == nil && string(b) == gptSignature {
			return []int64{n}
		}
		sizes = append(sizes, n)
	}
	return sizes
}

var errNoGPT = errors.New("it has no signature")

// readGPTAt reads the header at a sector and its entries. The header is
// returned also if its entries cannot be used.
func (d *disk) readGPTAt(at uint64, sectorSize int64) (*gptHeader, *Table, error) {
	if at >= uint64(d.size/sectorSize) {
		return nil, nil, fmt.Errorf("it is past the end of the disk (%d bytes)", d.size)
	}
	b := make([]byte, sectorSize)
	if err := d.read(b, int64(at)*sectorSize); err != nil {
		return nil, nil, err
	}
	h, err := parseGPTHeader(b, at)
	if err != nil {
		return nil, nil, err
	}
	entries := make([]byte, int64(h.count)*int64(h.size))
	if h.entries > uint64(d.size/sectorSize) {
		return h, nil, fmt.Errorf("its entries begin at sector %d, past the end of the disk", h.entries)
	}
	if err := d.read(entries, int64(h.entries)*sectorSize); err != nil {
		return h, nil, fmt.Errorf("entries: %w", err)
	}
	if crc32.ChecksumIEEE(entries) != h.entriesCRC {
		return h, nil, errors.New("the checksum of the entries is wrong")
	}
	t := &Table{Scheme: GPT, ID: h.id, SectorSize: sectorSize, First: h.firstUsable, Last: h.lastUsable}
	for i := range int(h.count) {
		e := entries[i*int(h.size):][:gptEntrySize]
		if p, used := parseGPTEntry(e, i+1); used {
			t.add(d, p)
		}
	}
	return h, t, nil
}

func parseGPTHeader(b []byte, at uint64) (*gptHeader, error) {
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
	u64 := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	if string(b[:8]) != gptSignature {
		return nil, errNoGPT
	}
	n := u32(12)
	if n < gptHeaderSize || int64(n) > int64(len(b)) {
		return nil, fmt.Errorf("it says that it has %d bytes", n)
	}
	sum := crc32.ChecksumIEEE(b[:16])
	sum = crc32.Update(sum, crc32.IEEETable, make([]byte, 4)) // where the sum is itself
	if crc32.Update(sum, crc32.IEEETable, b[20:n]) != u32(16) {
		return nil, errors.New("its checksum is wrong")
	}
	if u64(24) != at {
		return nil, fmt.Errorf("it says that it is at sector %d", u64(24))
	}
	h := &gptHeader{
		alternate:   u64(32),
		firstUsable: u64(40),
		lastUsable:  u64(48),
		id:          guid(b[56:72]),
		entries:     u64(72),
		count:       u32(80),
		size:        u32(84),
		entriesCRC:  u32(88),
	}
	switch {
	case h.firstUsable > h.lastUsable:
		return nil, fmt.Errorf("partitions may have the sectors %d to %d, which are none", h.firstUsable, h.lastUsable)
	case h.size < gptEntrySize || h.size&(h.size-1) != 0:
		return nil, fmt.Errorf("it says that an entry has %d bytes", h.size)
	case uint64(h.count)*uint64(h.size) > maxGPTEntries:
		return nil, fmt.Errorf("%d entries of %d bytes are too many", h.count, h.size)
	}
	return h, nil
}

// lookAtBackup says what is wrong at the end of a disk whose first header is
// right.
func (d *disk) lookAtBackup(h *gptHeader, sectorSize int64) []error {
	last := uint64(d.size/sectorSize) - 1
	if h.alternate > last {
		return []error{fmt.Errorf("the table is of a disk of %d sectors, this one has %d", satAdd(h.alternate, 1), last+1)}
	}
	if _, _, err := d.readGPTAt(h.alternate, sectorSize); err != nil {
		return []error{fmt.Errorf("copy of the GPT header at sector %d: %w", h.alternate, err)}
	}
	return nil
}

func parseGPTEntry(e []byte, number int) (p Partition, used bool) {
	if !slices.ContainsFunc(e[:16], func(b byte) bool { return b != 0 }) {
		return p, false
	}
	start, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
	p = Partition{
		Number: number,
		Start:  start,
		Type:   guid(e[:16]),
		ID:     guid(e[16:32]),
		Attrs:  gptAttributes(binary.LittleEndian.Uint64(e[48:])),
	}
	if last >= start {
		p.Sectors = satAdd(last-start, 1)
	}
	var name []uint16
	for i := 56; i < gptEntrySize; i += 2 {
		u := binary.LittleEndian.Uint16(e[i:])
		if u == 0 {
			break
		}
		name = append(name, u)
	}
	p.Name = string(utf16.Decode(name))
	return p, true
}

// gptAttributes writes attributes as sfdisk does: the common ones by name, then
// the numbers of those that depend on the type.
func gptAttributes(bits uint64) string {
	var words []string
	for i, name := range []string{"RequiredPartition", "NoBlockIOProtocol", "LegacyBIOSBootable"} {
		if bits>>i&1 != 0 {
			words = append(words, name)
		}
	}
	var numbers []string
	for i := 48; i < 64; i++ {
		if bits>>i&1 != 0 {
			numbers = append(numbers, strconv.Itoa(i))
		}
	}
	if numbers != nil {
		words = append(words, "GUID:"+strings.Join(numbers, ","))
	}
	return strings.Join(words, " ")
}

// guid writes 16 bytes in the mixed order of UEFI.
func guid(b []byte) string {
	return fmt.Sprintf("%08X-%04X-%04X-%04X-%012X", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]),
		binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}

func satAdd(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}
