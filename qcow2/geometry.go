package qcow2

// Limits of the format and of what any program is expected to open. They are
// checked before anything is allocated.
const (
	minClusterBits = 9
	maxClusterBits = 21

	subclusters        = 32 // per cluster, with extended L2 entries
	minSubclusterSize  = 512
	maxBackingName     = 1023
	maxL1Size          = 32 << 20 // bytes
	maxRefTableSize    = 8 << 20  // bytes
	maxSnapshots       = 65536
	maxSnapshotTable   = 64 << 20 // bytes
	maxSnapshotExtra   = 1024     // bytes per snapshot
	maxBitmaps         = 65535
	maxBitmapDirectory = maxBitmaps * 1024 // bytes
	maxBitmapTable     = 0x8000000         // entries
	maxBitmapName      = 1023
	maxBitmapSize      = 0x20000000 // bytes of one bitmap's data
	minGranularityBits = 9
	maxGranularityBits = 31

	sliceBytes = 4096 // of an L2 table, the unit of the cache
)

// A geometry is the arithmetic of one image: everything that follows from its
// header and never changes.
type geometry struct {
	version     int
	clusterBits uint
	clusterSize int64
	extended    bool // L2 entries of two words, with subclusters
	dataFile    bool // guest clusters lie in an external data file

	entryWords uint // 8-byte words per L2 entry: 1, or 2 if extended
	l2Bits     uint // log2 of the entries of an L2 table
	sliceBits  uint // log2 of the entries of a slice

	refcountOrder uint // log2 of the bits of a count
	refBlockBits  uint // log2 of the counts of a refcount block
}

func newGeometry(h *header) *geometry {
	g := &geometry{
		version:       int(h.version),
		clusterBits:   uint(h.clusterBits),
		clusterSize:   1 << h.clusterBits,
		extended:      h.incompatible&incompatExtendedL2 != 0,
		dataFile:      h.incompatible&incompatDataFile != 0,
		entryWords:    1,
		refcountOrder: uint(h.refcountOrder),
		refBlockBits:  uint(h.clusterBits) + 3 - uint(h.refcountOrder),
	}
	entryBits := uint(3)
	if g.extended {
		g.entryWords = 2
		entryBits = 4
	}
	g.l2Bits = g.clusterBits - entryBits
	g.sliceBits = min(g.l2Bits, 12-entryBits)
	return g
}

// l1Index returns which L1 entry covers a guest offset.
func (g *geometry) l1Index(off int64) int64 { return off >> (g.clusterBits + g.l2Bits) }

// l1Entries returns how many L1 entries cover a disk of the given size.
func (g *geometry) l1Entries(size int64) int64 {
	if size <= 0 {
		return 0
	}
	return g.l1Index(size-1) + 1
}

// sliceNo returns the number of the slice that covers a guest offset, counted
// over the guest disk.
func (g *geometry) sliceNo(off int64) uint64 {
	return uint64(off) >> (g.clusterBits + g.sliceBits)
}

// sliceIndex returns which entry of its slice covers a guest offset.
func (g *geometry) sliceIndex(off int64) int {
	return int(off>>g.clusterBits) & (1<<g.sliceBits - 1)
}

// sliceStart returns the guest offset that a slice begins at.
func (g *geometry) sliceStart(no uint64) int64 { return int64(no << (g.clusterBits + g.sliceBits)) }

// sliceSpan returns the guest bytes that a slice covers.
func (g *geometry) sliceSpan() int64 { return 1 << (g.clusterBits + g.sliceBits) }

// sliceTable returns the L1 index of the table that a slice is part of, and
// where in that table, in bytes, the slice begins.
func (g *geometry) sliceTable(no uint64) (l1Index, within int64) {
	perTable := g.l2Bits - g.sliceBits
	return int64(no >> perTable), int64(no&(1<<perTable-1)) * g.sliceSize()
}

// sliceWords returns the 8-byte words of a slice.
func (g *geometry) sliceWords() int { return int(g.entryWords) << g.sliceBits }

// sliceSize returns the bytes of a slice.
func (g *geometry) sliceSize() int64 { return int64(g.sliceWords()) * 8 }

// tableSpan returns the guest bytes that an L2 table covers.
func (g *geometry) tableSpan() int64 { return 1 << (g.clusterBits + g.l2Bits) }

// subclusterBits returns log2 of the unit in which data is allocated: a
// subcluster, or a cluster where there are none.
func (g *geometry) subclusterBits() uint {
	if g.extended {
		return g.clusterBits - 5
	}
	return g.clusterBits
}

// within returns the offset of a byte in its cluster.
func (g *geometry) within(off int64) int64 { return off & (g.clusterSize - 1) }

// floor and ceil round to whole clusters. ceil of an offset in the last
// cluster below 2^63 overflows; no valid offset is that large.
func (g *geometry) floor(off int64) int64 { return off &^ (g.clusterSize - 1) }
func (g *geometry) ceil(off int64) int64  { return g.floor(off + g.clusterSize - 1) }

// clusters returns how many clusters n bytes fill, the last perhaps partly.
func (g *geometry) clusters(n int64) int64 {
	if n <= 0 {
		return 0
	}
	return (n-1)>>g.clusterBits + 1
}
