package qcow2

import "encoding/binary"

// The words of the tables, as types with methods. All are big-endian on disk;
// the types hold them in native order.

const (
	flagCopied     = 1 << 63 // the reference is the only one: refcount is exactly one
	flagCompressed = 1 << 62
	flagZero       = 1 << 0 // version 3; without meaning in extended entries

	hostMask = 0x00fffffffffffe00 // host offset in L1 and standard L2 entries
)

// An l1Entry is one word of an L1 table: where an L2 table lies.
type l1Entry uint64

func (e l1Entry) host() int64      { return int64(e & hostMask) }
func (e l1Entry) copied() bool     { return e&flagCopied != 0 }
func (e l1Entry) reserved() uint64 { return uint64(e) & 0x7f000000000001ff }

// ours reports whether there is a table that nothing else refers to.
func (e l1Entry) ours() bool { return e.copied() && e.host() != 0 }

// An l2Entry is the first, or only, word of an L2 entry.
type l2Entry uint64

func (e l2Entry) host() int64      { return int64(e & hostMask) }
func (e l2Entry) copied() bool     { return e&flagCopied != 0 }
func (e l2Entry) compressed() bool { return e&flagCompressed != 0 }
func (e l2Entry) zero() bool       { return e&flagZero != 0 }

// reserved returns the bits that have to be clear in a standard entry, the
// unaligned part of the host offset not among them.
func (e l2Entry) reserved() uint64 { return uint64(e) & 0x3f000000000001fe }

// An l2Bitmap is the second word of an extended L2 entry: bits 0 to 31 say
// which subclusters are allocated, bits 32 to 63 which read as zeros.
type l2Bitmap uint64

const (
	allAllocated l2Bitmap = 0x00000000ffffffff
	allZero      l2Bitmap = 0xffffffff00000000
)

func (b l2Bitmap) allocated() uint32 { return uint32(b) }
func (b l2Bitmap) zero() uint32      { return uint32(b >> 32) }

// conflict reports a subcluster that claims to be both allocated and zero.
func (b l2Bitmap) conflict() bool { return b.allocated()&b.zero() != 0 }

// A clusterKind says what an L2 entry means for its whole cluster.
type clusterKind uint8

const (
	clusterUnallocated clusterKind = iota
	clusterData                    // in an extended entry: allocated, the bitmap has the say
	clusterZeroPlain               // reads as zeros, occupies nothing
	clusterZeroAlloc               // reads as zeros, keeps a host cluster
	clusterCompressed
)

// kind classifies an L2 entry of an image with this geometry. The zero flag of
// extended entries is in their bitmap, and not looked at.
func (g *geometry) kind(e l2Entry) clusterKind {
	switch {
	case e.compressed():
		return clusterCompressed
	case e.zero() && !g.extended:
		if e.host() != 0 {
			return clusterZeroAlloc
		}
		return clusterZeroPlain
	case e.host() != 0, g.dataFile && e.copied(): // host offset 0 is ordinary in a data file
		return clusterData
	}
	return clusterUnallocated
}

// compressed returns where the data of a compressed entry lies. The length is
// an upper bound: it counts whole sectors of 512 bytes from the one that the
// data begins in.
func (g *geometry) compressed(e l2Entry) (host, length int64) {
	shift := 62 - (g.clusterBits - 8)
	host = int64(e & (1<<shift - 1))
	sectors := int64(e>>shift&(1<<(g.clusterBits-8)-1)) + 1
	return host, sectors*512 - host%512
}

// compressedEntry makes the entry of compressed data of the given length,
// which is at most one cluster.
func (g *geometry) compressedEntry(host, length int64) l2Entry {
	shift := 62 - (g.clusterBits - 8)
	sectors := (host+length-1)/512 - host/512 // beyond the first
	return l2Entry(flagCompressed | uint64(sectors)<<shift | uint64(host))
}

// A refTableEntry is one word of the refcount table: where a block lies.
type refTableEntry uint64

// host is negative if the entry is beyond any store.
func (e refTableEntry) host() int64      { return int64(e &^ 0x1ff) }
func (e refTableEntry) reserved() uint64 { return uint64(e) & 0x1ff }

// refcount returns count i of a run of a refcount block. Counts narrower than
// a byte fill it from the least significant bit.
func refcount(b []byte, i int64, order uint) uint64 {
	switch order {
	case 4:
		return uint64(binary.BigEndian.Uint16(b[i*2:]))
	case 3:
		return uint64(b[i])
	case 5:
		return uint64(binary.BigEndian.Uint32(b[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(b[i*8:])
	}
	bit := uint(i<<order) & 7
	return uint64(b[i<<order>>3]>>bit) & (1<<(1<<order) - 1)
}

// setRefcount stores count i of a run of a refcount block. v fits the width.
func setRefcount(b []byte, i int64, order uint, v uint64) {
	switch order {
	case 4:
		binary.BigEndian.PutUint16(b[i*2:], uint16(v))
	case 3:
		b[i] = byte(v)
	case 5:
		binary.BigEndian.PutUint32(b[i*4:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(b[i*8:], v)
	default:
		bit := uint(i<<order) & 7
		mask := byte(1<<(1<<order)-1) << bit
		p := &b[i<<order>>3]
		*p = *p&^mask | byte(v)<<bit
	}
}

// maxRefcount returns the largest count of the given order.
func maxRefcount(order uint) uint64 { return 1<<(1<<order-1)<<1 - 1 }
