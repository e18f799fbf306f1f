package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"io"
)

// A crashVerdict is what an independent reader makes of the bytes of an image. It
// shares no code with the package.
type crashVerdict struct {
	corrupt []string
	leaks   int
	guest   []byte // what the disk reads as
	bitmaps []crashBitmap
}

// A crashBitmap is a bitmap that the header vouches for.
type crashBitmap struct {
	flags       uint64
	granularity uint64 // bytes
	bits        []byte // as in the image
}

// crashJudge walks an image as a program would that finds it after a crash. data is
// the external data file, backing what the disk reads as where the image has
// nothing.
func crashJudge(img, data, backing []byte) (v crashVerdict) {
	bad := func(f string, a ...any) { v.corrupt = append(v.corrupt, fmt.Sprintf(f, a...)) }
	u64 := func(off uint64) uint64 {
		if off+8 > uint64(len(img)) {
			return 0
		}
		return binary.BigEndian.Uint64(img[off:])
	}
	u32 := func(off uint64) uint64 { return u64(off) >> 32 }
	const hostBits = 0x00fffffffffffe00
	var (
		version  = u32(4)
		bits     = u32(20)
		cs       = uint64(1) << bits
		size     = u64(24)
		l1Size   = u32(36)
		l1       = u64(40)
		refTable = u64(48)
		refSize  = u32(56)
		snaps    = u32(60)
		snapAt   = u64(64)
		order    = uint64(4)
		incompat = uint64(0)
		words    = uint64(1)
	)
	if version == 3 {
		order, incompat = u32(96), u64(72)
	}
	if incompat&2 != 0 {
		bad("the image is marked as corrupt")
	}
	external, extended := incompat&4 != 0, incompat&16 != 0
	if extended {
		words = 2
	}
	perTable := cs / 8 / words
	end := (uint64(len(img)) + cs - 1) / cs
	refs := map[uint64]int{}
	packed := map[uint64]bool{} // clusters with compressed data
	use := func(off, n uint64, what string, a ...any) {
		if off%cs != 0 {
			bad("%s at %#x is not aligned", fmt.Sprintf(what, a...), off)
		}
		for c := off / cs; c < (off+n+cs-1)/cs; c++ {
			if c >= end {
				bad("%s at %#x is past the end", fmt.Sprintf(what, a...), off)
			}
			refs[c]++
		}
	}
	use(0, cs, "header")
	use(l1, l1Size*8, "L1 table")
	use(refTable, refSize*cs, "refcount table")
	blocks := map[uint64]uint64{}
	for i := range refSize * cs / 8 {
		if b := u64(refTable + i*8); b != 0 {
			blocks[i] = b
			use(b, cs, "refcount block %d", i)
		}
	}
	width := uint64(1) << order
	count := func(c uint64) uint64 {
		per := cs * 8 / width
		b := blocks[c/per]
		if b == 0 {
			return 0
		}
		bit := b*8 + c%per*width
		if (bit+width+7)/8 > uint64(len(img)) {
			return 0
		}
		if width < 8 {
			return uint64(img[bit/8]>>(bit%8)) & (1<<width - 1)
		}
		n := uint64(0)
		for _, x := range img[bit/8 : (bit+width)/8] {
			n = n<<8 | uint64(x)
		}
		return n
	}
	// Counts are compared with flags for the active tables only.
	walk := func(l1, l1Size uint64, active bool) {
		for i := range l1Size {
			e := u64(l1 + i*8)
			if e&^(1<<63|hostBits) != 0 {
				bad("L1 entry %d: reserved bits %#x", i, e)
			}
			table := e & hostBits
			if table == 0 {
				continue
			}
			use(table, cs, "L2 table %d", i)
			if active && (e>>63 == 1) != (count(table/cs) == 1) {
				bad("L1 entry %d: copied is %d, refcount %d", i, e>>63, count(table/cs))
			}
			for k := range perTable {
				e := u64(table + k*8*words)
				g := (i*perTable + k) * cs
				var sub uint64
				if extended {
					sub = u64(table + k*16 + 8)
				}
				if e == 0 && sub == 0 {
					continue
				}
				host := e & hostBits
				var content []byte
				switch {
				case e>>62&1 == 1:
					shift := 62 - (bits - 8)
					off := e & (1<<shift - 1)
					n := (e>>shift&(1<<(bits-8)-1)+1)*512 - off%512
					if e>>63 == 1 {
						bad("guest %#x: compressed and copied", g)
					}
					first, last := off/cs, (off+n-1)/cs
					for c := first; c <= last; c++ {
						refs[c]++
						packed[c] = true
					}
					if off >= uint64(len(img)) {
						bad("guest %#x: compressed data past the end", g)
						continue
					}
					content = make([]byte, cs)
					r := flate.NewReader(bytes.NewReader(img[off:min(off+n, uint64(len(img)))]))
					if _, err := io.ReadFull(r, content); err != nil {
						bad("guest %#x: %v", g, err)
					}
				case !extended && e&^(1<<63|1|hostBits) != 0, extended && e&^(1<<63|hostBits) != 0, e&1 != 0 && version == 2:
					bad("guest %#x: entry %#x", g, e)
					continue
				default:
					if host != 0 && !external {
						use(host, cs, "data of %#x", g)
						if active && (e>>63 == 1) != (count(host/cs) == 1) {
							bad("guest %#x: host %#x: copied is %d, refcount %d", g, host, e>>63, count(host/cs))
						}
					}
					from := img
					if external {
						from = data
						if host != 0 && host != g {
							bad("guest %#x is at %#x of the data file", g, host)
						}
					}
					if host != 0 || external && e>>63 == 1 {
						content = make([]byte, cs)
						if host < uint64(len(from)) {
							copy(content, from[host:])
						}
					}
					if e&1 != 0 {
						content = make([]byte, cs)
					}
				}
				if !active || content == nil && !extended {
					continue
				}
				if g >= size {
					bad("an entry for guest offset %#x, past the disk", g)
					continue
				}
				disk := v.guest[g:min(g+cs, size)]
				if !extended || e>>62&1 == 1 {
					copy(disk, content)
					continue
				}
				for s := range uint64(32) {
					lo, hi := min(s*cs/32, uint64(len(disk))), min((s+1)*cs/32, uint64(len(disk)))
					alloc, zero := sub>>s&1, sub>>(s+32)&1
					switch {
					case alloc == 1 && (zero == 1 || content == nil):
						bad("guest %#x: subclusters %#x", g, sub)
					case alloc == 1:
						copy(disk[lo:hi], content[lo:hi])
					case zero == 1:
						clear(disk[lo:hi])
					}
				}
			}
		}
	}
	v.guest = make([]byte, size)
	copy(v.guest, backing)
	walk(l1, l1Size, true)
	at := snapAt
	for range snaps {
		l1, n := u64(at), u32(at+8)
		use(l1, n*8, "snapshot L1 table")
		walk(l1, n, false)
		at += 40 + u32(at+36) + u64(at+12)>>48 + u64(at+14)>>48
		at = (at + 7) &^ 7
	}
	if snaps > 0 {
		use(snapAt, at-snapAt, "snapshot table")
	}
	for at := u32(100); version == 3 && u64(88)&1 != 0 && u32(at) != 0; at += 8 + (u32(at+4)+7)&^7 {
		if u32(at) != 0x23852875 {
			continue
		}
		n, e := u64(at+16), u64(at+24)
		use(e, n, "bitmap directory")
		for range u32(at + 8) {
			table, entries, b := u64(e), u32(e+8), crashBitmap{flags: u32(e + 12), granularity: 1 << (u32(e+16) >> 16 & 0xff)}
			use(table, entries*8, "bitmap table")
			for i := range entries {
				bits := make([]byte, cs)
				if w := u64(table + i*8); w > 1 {
					use(w, cs, "bits")
					copy(bits, img[min(w, uint64(len(img))):])
				} else if w == 1 {
					bits = bytes.Repeat([]byte{0xff}, int(cs))
				}
				b.bits = append(b.bits, bits...)
			}
			v.bitmaps = append(v.bitmaps, b)
			e += (24 + u32(e+16)&0xffff + u32(e+20) + 7) &^ 7
		}
	}
	for c, n := range refs {
		if count(c) < uint64(n) {
			bad("cluster %#x has refcount %d and %d references", c*cs, count(c), n)
		}
		if n > 1 && snaps == 0 && !packed[c] {
			bad("cluster %#x is used %d times", c*cs, n)
		}
	}
	for c := range end {
		if int(count(c)) > refs[c] {
			v.leaks++
		}
	}
	return v
}
