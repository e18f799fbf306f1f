package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Flags of a bitmap.
const (
	bitmapInUse = 1 << 0 // a writer has it in memory, or died with it
	bitmapAuto  = 1 << 1 // records writes
)

// A bitmapEntry is one entry of the bitmap directory.
type bitmapEntry struct {
	tableAt     uint64
	tableSize   uint32 // entries
	flags       uint32
	granularity uint8 // log2 of the bytes per bit
	name        string
	extra       []byte // of the entry, as it is
}

// A bitmap is an entry of the directory that has been found sound.
type bitmap struct {
	bitmapEntry
	lost atomic.Bool // the image was written by who does not keep it up to date
	live []uint64    // the bits, if they are kept in memory; see recording
}

// encode returns the entry as it is in the directory, padded.
func (e *bitmapEntry) encode() []byte {
	b := make([]byte, (24+len(e.extra)+len(e.name)+7)&^7)
	be := binary.BigEndian
	be.PutUint64(b, e.tableAt)
	be.PutUint32(b[8:], e.tableSize)
	be.PutUint32(b[12:], e.flags)
	b[16], b[17] = 1, e.granularity // the one type that there is: dirty tracking
	be.PutUint16(b[18:], uint16(len(e.name)))
	be.PutUint32(b[20:], uint32(len(e.extra)))
	copy(b[24:], e.extra)
	copy(b[24+len(e.extra):], e.name)
	return b
}

// parseBitmapDirectory reads the directory of count bitmaps.
func parseBitmapDirectory(b []byte, count uint32, g *geometry, diskSize int64) ([]bitmapEntry, error) {
	be := binary.BigEndian
	var list []bitmapEntry
	for len(b) > 0 {
		if len(b) < 24 {
			return nil, corrupt("bitmap directory: entry %d is cut off", len(list))
		}
		if len(list) == int(count) {
			return nil, corrupt("bitmap directory: more than %d entries", count)
		}
		e := bitmapEntry{tableAt: be.Uint64(b), tableSize: be.Uint32(b[8:]), flags: be.Uint32(b[12:]), granularity: b[17]}
		kind, nameLen, extraLen := b[16], int(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
		n := (24 + extraLen + int64(nameLen) + 7) &^ 7
		if n > int64(len(b)) {
			return nil, corrupt("bitmap directory: entry %d is cut off", len(list))
		}
		e.extra = b[24:][:extraLen:extraLen]
		e.name = string(b[24+extraLen:][:nameLen])
		if err := e.check(kind, g, diskSize); err != nil {
			return nil, fmt.Errorf("bitmap %q: %w", e.name, err)
		}
		list = append(list, e)
		b = b[n:]
	}
	if len(list) != int(count) {
		return nil, corrupt("bitmap directory: %d entries instead of %d", len(list), count)
	}
	return list, nil
}

// check returns what is wrong with an entry, or of a later program than us.
func (e *bitmapEntry) check(kind uint8, g *geometry, diskSize int64) error {
	switch {
	case len(e.name) == 0 || len(e.name) > maxBitmapName:
		return corrupt("name of %d bytes", len(e.name))
	case e.tableAt == 0 || e.tableAt&uint64(g.clusterSize-1) != 0 || int64(e.tableAt) < 0:
		return corrupt("table offset %#x is invalid", e.tableAt)
	case e.tableSize == 0 || e.tableSize > maxBitmapTable:
		return corrupt("table of %d entries", e.tableSize)
	case e.granularity < minGranularityBits || e.granularity > maxGranularityBits:
		return corrupt("granularity 2^%d", e.granularity)
	case e.flags&^(bitmapInUse|bitmapAuto) != 0:
		return unsupported("unknown flags %#x", e.flags)
	case kind != 1:
		return unsupported("unknown type %d", kind)
	case len(e.extra) != 0:
		return unsupported("unknown extra data")
	case int64(e.tableSize) > maxBitmapSize>>g.clusterBits:
		return corrupt("%d clusters of bits are too many", e.tableSize)
	}
	// A bitmap that is in use may not have been resized with the disk yet.
	bytes := (((diskSize-1)>>e.granularity + 1) + 7) / 8
	if diskSize > 0 && e.flags&bitmapInUse == 0 && g.clusters(bytes) != int64(e.tableSize) {
		return corrupt("table of %d entries does not fit the size of the disk", e.tableSize)
	}
	return nil
}

// readBitmaps reads the directory. The bits are read when they are asked for.
func readBitmaps(s storage.Store, h *header, warn func(string)) ([]bitmap, error) {
	x, err := h.bitmapsExtension()
	if err != nil || x.count == 0 {
		return nil, err
	}
	lost := h.autoclear&autoclearBitmaps == 0
	if lost && warn != nil {
		warn("a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent")
	}
	entries, err := readBitmapDirectory(s, h, x)
	if lost && err != nil {
		return nil, nil // whoever wrote the image may have used the space
	}
	if err != nil {
		return nil, err
	}
	list := make([]bitmap, len(entries))
	for i, e := range entries {
		list[i].bitmapEntry = e
		list[i].lost.Store(lost)
	}
	return list, nil
}

func readBitmapDirectory(s storage.Store, h *header, x bitmapsExtension) ([]bitmapEntry, error) {
	size, err := s.Size()
	if err != nil {
		return nil, err
	}
	if int64(x.offset) > size || int64(x.size) > size-int64(x.offset) {
		return nil, corrupt("bitmap directory at %#x is past the end (%#x)", x.offset, size)
	}
	b := make([]byte, x.size)
	if _, err := s.ReadAt(b, int64(x.offset)); err != nil {
		return nil, fmt.Errorf("bitmap directory at %#x: %w", x.offset, err)
	}
	return parseBitmapDirectory(b, x.count, newGeometry(h), h.diskSize())
}

func (b *bitmap) info() image.BitmapInfo {
	return image.BitmapInfo{
		Name:         b.name,
		Granularity:  1 << b.granularity,
		Enabled:      b.flags&bitmapAuto != 0,
		Inconsistent: b.lost.Load() || b.flags&bitmapInUse != 0,
	}
}

// trusted returns an error if the bitmap does not tell what was written.
func (b *bitmap) trusted() error {
	if b.info().Inconsistent {
		return corrupt("bitmap %q is inconsistent: its last writer did not store it", b.name)
	}
	return nil
}

// Bitmaps lists the bitmaps of the image itself.
func (im *Image) Bitmaps() []image.BitmapInfo {
	list := make([]image.BitmapInfo, len(im.bitmaps))
	for i := range im.bitmaps {
		list[i] = im.bitmaps[i].info()
	}
	return list
}

// Bitmap finds a bitmap by name, in the image or down its backing chain.
func (im *Image) Bitmap(name string) (image.Bitmap, error) {
	for i := range im.bitmaps {
		b := &im.bitmaps[i]
		if b.name != name {
			continue
		}
		if err := b.trusted(); err != nil {
			return nil, image.Wrap("read", im.name, err)
		}
		return &bitmapReader{im: im, bitmap: b}, nil
	}
	if below, ok := im.backing.(image.BitmapSource); ok {
		return below.Bitmap(name)
	}
	return nil, fmt.Errorf("bitmap %q: %w", name, fs.ErrNotExist)
}

// A bitmapReader reads the bits of a bitmap. It keeps one cluster of them.
type bitmapReader struct {
	im     *Image
	bitmap *bitmap

	mu     sync.Mutex
	table  []bitmapTableEntry
	words  []uint64 // the bits of one cluster, in native order
	loaded int64    // which; meaningful if words is not nil
}

func (b *bitmapReader) Info() image.BitmapInfo { return b.bitmap.info() }

// AppendDirty describes a part of the disk. Bits past the end of the bitmap
// are clear; past the end of the image, where a larger overlay goes on, there
// are none.
func (b *bitmapReader) AppendDirty(dst []image.DirtyExtent, off, n int64) ([]image.DirtyExtent, error) {
	if err := image.CheckRange(math.MaxInt64, off, n); err != nil {
		return dst, err
	}
	if n == 0 {
		return dst, image.ErrOutOfRange
	}
	v, err := b.im.epochs.enter()
	if err != nil {
		return dst, err
	}
	defer v.leave()
	if err := b.bitmap.trusted(); err != nil {
		return dst, image.Wrap("read", b.im.name, err)
	}
	size := b.im.info.Size
	if off >= size {
		return append(dst, image.DirtyExtent{Offset: off, Length: n}), nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	start := len(dst)
	dst, err = b.appendDirty(dst, off, min(off+n, size))
	if err != nil && len(dst) == start {
		return dst, image.Wrap("read", b.im.name, fmt.Errorf("bitmap %q: %w", b.bitmap.name, err))
	}
	return dst, nil
}

func (b *bitmapReader) appendDirty(dst []image.DirtyExtent, off, end int64) ([]image.DirtyExtent, error) {
	start := len(dst)
	shift := uint(b.bitmap.granularity)
	perCluster := b.im.geo.clusterSize * 8 // bits
	// A step adds one extent at most, and loads one cluster of bits at most.
	for step := 0; off < end && step < image.MaxExtents; step++ {
		bit := off >> shift
		var dirty, known bool
		var last int64 // bit behind the run
		if live := b.bitmap.live; live != nil {
			dirty, last = run(live[:(end-1)>>shift/64+1], bit)
			last += bit
		} else {
			cluster := bit / perCluster
			var err error
			if dirty, known, err = b.load(cluster); err != nil {
				return dst, err
			}
			last = (cluster + 1) * perCluster
			if !known {
				dirty, last = run(b.words, bit-cluster*perCluster)
				last += bit
			}
		}
		stop := end
		if last <= end>>shift {
			stop = last << shift
		}
		if k := len(dst); k > start && dst[k-1].Dirty == dirty {
			dst[k-1].Length += stop - off
		} else {
			dst = append(dst, image.DirtyExtent{Offset: off, Length: stop - off, Dirty: dirty})
		}
		off = stop
	}
	return dst, nil
}

// run returns the value of a bit and how many of that value begin there. Bits
// may be set meanwhile, so each word is loaded once: a second load may
// contradict the first.
func run(words []uint64, bit int64) (set bool, n int64) {
	i, shift := bit/64, uint(bit%64)
	first := atomic.LoadUint64(&words[i])
	flip := uint64(0)
	if set = first>>shift&1 != 0; set {
		flip = ^uint64(0)
	}
	if w := (first ^ flip) >> shift; w != 0 {
		return set, int64(bits.TrailingZeros64(w))
	}
	n = 64 - int64(shift)
	for i++; i < int64(len(words)); i++ {
		if w := atomic.LoadUint64(&words[i]) ^ flip; w != 0 {
			return set, n + int64(bits.TrailingZeros64(w))
		}
		n += 64
	}
	return set, n
}

// load makes words the bits of a cluster, unless all of them are known to be
// equal. b.mu is held.
func (b *bitmapReader) load(cluster int64) (dirty, known bool, err error) {
	if b.table == nil {
		if b.table, err = readBitmapTable(b.im.store, b.bitmap); err != nil {
			return false, false, err
		}
	}
	if cluster >= int64(len(b.table)) {
		return false, true, nil
	}
	e := b.table[cluster]
	if err := e.check(b.im.geo, int(cluster), b.bitmap); err != nil {
		return false, false, err
	}
	if e.host() == 0 {
		return e.allOnes(), true, nil
	}
	if b.words != nil && b.loaded == cluster {
		return false, false, nil
	}
	g := b.im.geo
	buf := make([]byte, g.clusterSize)
	n, err := b.im.store.ReadAt(buf, e.host())
	if err != nil && !errors.Is(err, io.EOF) {
		return false, false, fmt.Errorf("bits at %#x: %w", e.host(), err)
	}
	// Of the last cluster a part stands for nothing, and may be missing.
	need := ((b.im.info.Size-1)>>b.bitmap.granularity+8)/8 - cluster*g.clusterSize
	if int64(n) < min(need, g.clusterSize) {
		return false, false, corrupt("bits at %#x are past the end", e.host())
	}
	if b.words == nil {
		b.words = make([]uint64, len(buf)/8)
	}
	for i := range b.words {
		b.words[i] = binary.LittleEndian.Uint64(buf[i*8:])
	}
	b.loaded = cluster
	return false, false, nil
}

// readBitmapTable reads where the bits of b are.
func readBitmapTable(s storage.Store, b *bitmap) ([]bitmapTableEntry, error) {
	size, err := s.Size()
	if err != nil {
		return nil, err
	}
	at, n := int64(b.tableAt), int64(b.tableSize)*8
	if at > size || n > size-at {
		return nil, corrupt("table at %#x is past the end (%#x)", at, size)
	}
	buf := make([]byte, n)
	if _, err := s.ReadAt(buf, at); err != nil {
		return nil, fmt.Errorf("table at %#x: %w", at, err)
	}
	table := make([]bitmapTableEntry, b.tableSize)
	for i := range table {
		table[i] = bitmapTableEntry(binary.BigEndian.Uint64(buf[i*8:]))
	}
	return table, nil
}

// A bitmapTableEntry says where a cluster of bits lies.
type bitmapTableEntry uint64

func (e bitmapTableEntry) host() int64 { return int64(e & hostMask) }

// allOnes says, of an entry without a cluster, that all its bits are set.
func (e bitmapTableEntry) allOnes() bool { return e&1 != 0 }

// check returns an error unless e can be entry i of the table of b.
func (e bitmapTableEntry) check(g *geometry, i int, b *bitmap) error {
	if e.reserved() != 0 || g.within(e.host()) != 0 {
		return corrupt("table at %#x, entry %d: invalid entry %#x", b.tableAt, i, uint64(e))
	}
	return nil
}

func (e bitmapTableEntry) reserved() uint64 {
	r := uint64(e) & 0xff000000000001fe
	if e.host() != 0 {
		r |= uint64(e) & 1
	}
	return r
}

// recording reports whether writes to the image have to be recorded.
func (b *bitmap) recording() bool {
	return b.flags&bitmapAuto != 0 && b.flags&bitmapInUse == 0 && !b.lost.Load()
}
