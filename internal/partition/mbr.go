package partition

import (
	"encoding/binary"
	"fmt"
	"slices"
)

const (
	mbrTable     = 446
	mbrSignature = 510

	typeProtective = 0xee

	// Bounds for chains that do not end by themselves.
	maxLogical = 252 // Linux knows 256 partitions in all
	maxEBR     = 512
)

// An mbr is a master or extended boot record.
type mbr struct {
	id      uint32
	entries [4]mbrEntry
}

type mbrEntry struct {
	status, kind   byte
	start, sectors uint32
}

// parseMBR returns what a sector says as a boot record, if it is one. The boot
// sectors of FAT and NTFS bear the same signature.
func parseMBR(b []byte) (m mbr, ok bool) {
	if b[mbrSignature] != 0x55 || b[mbrSignature+1] != 0xaa {
		return m, false
	}
	m.id = binary.LittleEndian.Uint32(b[440:])
	empty := true
	for i := range m.entries {
		e := b[mbrTable+16*i:]
		m.entries[i] = mbrEntry{e[0], e[4], binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])}
		if e[0]&0x7f != 0 {
			return m, false // not a table but code
		}
		empty = empty && m.entries[i] == mbrEntry{}
	}
	return m, !empty || !isBootSector(b)
}

// protective reports whether the table is there to keep others from a GPT. It
// may have partitions besides; those of the GPT count.
func (m mbr) protective() bool {
	for _, e := range m.entries {
		if e.kind == typeProtective && e.start == 1 {
			return true
		}
	}
	return false
}

// displaced reports whether it would be that, but for where the GPT begins.
func (m mbr) displaced() bool {
	return !m.protective() && slices.ContainsFunc(m.entries[:], func(e mbrEntry) bool { return e.kind == typeProtective })
}

func (e mbrEntry) extended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }

// partition returns the entry of a table whose sectors count from base.
func (e mbrEntry) partition(number int, base uint64) Partition {
	return Partition{
		Number:   number,
		Start:    base + uint64(e.start),
		Sectors:  uint64(e.sectors),
		Type:     fmt.Sprintf("%x", e.kind),
		Bootable: e.status == 0x80,
		Extended: e.extended(),
	}
}

func (d *disk) readMBR(m mbr) (*Table, error) {
	t := &Table{Scheme: MBR, ID: fmt.Sprintf("0x%08x", m.id), SectorSize: sector}
	for i, e := range m.entries {
		if e.sectors > 0 {
			t.add(d, e.partition(i+1, 0))
		}
	}
	next := 5
	for _, e := range m.entries {
		if e.sectors > 0 && e.extended() {
			var err error
			if next, err = d.readLogical(t, e, next); err != nil {
				t.Damage = append(t.Damage, err)
			}
		}
	}
	return t, nil
}

// readLogical appends the partitions of an extended one, numbered from next,
// and returns the number that follows. Each record has one of them and says
// where the next record is.
func (d *disk) readLogical(t *Table, extended mbrEntry, next int) (int, error) {
	b := make([]byte, sector)
	seen := map[uint64]bool{}
	at, size := uint64(extended.start), uint64(extended.sectors)
	for {
		place := fmt.Sprintf("extended boot record at sector %d", at)
		switch {
		case seen[at]:
			return next, fmt.Errorf("%s: the chain of records comes back to it", place)
		case len(seen) == maxEBR || next >= 5+maxLogical:
			return next, fmt.Errorf("%s: the chain of records does not end", place)
		}
		seen[at] = true
		if err := d.read(b, int64(at)*sector); err != nil {
			return next, fmt.Errorf("%s: %w", place, err)
		}
		m, ok := parseMBR(b)
		if !ok {
			return next, fmt.Errorf("%s: it has no signature", place)
		}
		var link *mbrEntry
		for i, e := range m.entries {
			switch {
			case e.sectors == 0:
			case e.extended():
				if link == nil {
					link = &m.entries[i]
				}
			case i >= 2 && !inside(e, at, size, extended):
				// OS/2 and others keep something else in the last two.
			default:
				t.add(d, e.partition(next, at))
				next++
			}
		}
		if link == nil {
			return next, nil
		}
		at, size = uint64(extended.start)+uint64(link.start), uint64(link.sectors)
	}
}

// inside reports whether an entry of the record at a sector lies in what the
// record is for, and in the extended partition.
func inside(e mbrEntry, at, size uint64, extended mbrEntry) bool {
	start, end := at+uint64(e.start), at+uint64(e.start)+uint64(e.sectors)
	return uint64(e.start)+uint64(e.sectors) <= size &&
		start >= uint64(extended.start) && end <= uint64(extended.start)+uint64(extended.sectors)
}
