package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
)

// maxRecording bounds the memory of all bits of an image that record writes, in
// bytes: 64 TiB with the usual granularity of 64 KiB. The format allows one
// bitmap 512 MiB, which a small file can claim to have.
const maxRecording = 128 << 20

// A recording is a bitmap that records writes while the image is open. In the
// store it is marked as in use before the first change, and stays as it was
// until the image is closed; the truth is in memory.
type recording struct {
	*bitmap
	at  int64     // host offset of its entry in the directory
	old []hostRun // the clusters that hold it
}

// loadRecordings reads the bitmaps that record writes. One that cannot be
// relied on is given up: it has no bits, and will be found to be in use. So is
// one that would make all of them have more than most bytes of bits.
func (w *writer) loadRecordings(most int64, warn func(string)) error {
	x, err := w.header.bitmapsExtension()
	if err != nil || x.count == 0 {
		return err
	}
	used := map[int64]bool{} // clusters of the directory and of bitmaps
	for c := int64(x.offset) >> w.geo.clusterBits; c < w.geo.clusters(int64(x.offset+x.size)); c++ {
		used[c] = true
	}
	room, at := most, int64(x.offset)
	for i := range w.bitmaps {
		b := &w.bitmaps[i]
		if b.recording() {
			r := recording{bitmap: b, at: at}
			err := w.load(&r, used, &room)
			if err != nil && !errors.Is(err, image.ErrCorrupt) && !errors.Is(err, errTooManyBits) {
				return fmt.Errorf("bitmap %q: %w", b.name, err)
			}
			if err != nil && warn != nil {
				warn(fmt.Sprintf("bitmap %q is not kept up to date and becomes inconsistent: %v", b.name, err))
			}
			w.recordings = append(w.recordings, r)
		}
		at += int64(len(b.encode()))
	}
	return nil
}

var errTooManyBits = errors.New("all bitmaps together have too many bits")

// load reads the bits of r. Its clusters will be freed one day, so they have to
// be what they seem: counted, and nobody else's.
func (w *writer) load(r *recording, used map[int64]bool, room *int64) error {
	g := w.geo
	n := g.bitmapWords(w.info.Size, r.granularity)
	if n*8 > *room {
		return errTooManyBits
	}
	table, err := readBitmapTable(w.store, r.bitmap)
	if err != nil {
		return err
	}
	var old []hostRun
	own := func(at, n int64, what string) error {
		run := hostRun{at >> g.clusterBits, n}
		for c := run.first; c < run.end(); c++ {
			count, err := w.commit.refs.count(c)
			if err != nil {
				return err
			}
			if count == 0 || used[c] || w.tables.has(c) {
				return corrupt("%s at %#x lies where it must not", what, c<<g.clusterBits)
			}
			used[c] = true
		}
		old = append(old, run)
		return nil
	}
	if err := own(int64(r.tableAt), g.clusters(int64(r.tableSize)*8), "table"); err != nil {
		return err
	}
	words := make([]uint64, n)
	for i, e := range table {
		part := g.bitmapPart(words, int64(i))
		if err := e.check(g, i, r.bitmap); err != nil {
			return err
		}
		if e.host() == 0 {
			for k := range part {
				part[k] = -uint64(e & 1)
			}
			continue
		}
		if err := own(e.host(), 1, "bits"); err != nil {
			return err
		}
		buf := make([]byte, len(part)*8)
		if _, err := w.store.ReadAt(buf, e.host()); err == io.EOF {
			return corrupt("bits at %#x are past the end", e.host())
		} else if err != nil {
			return fmt.Errorf("bits at %#x: %w", e.host(), err)
		}
		for k := range part {
			part[k] = binary.LittleEndian.Uint64(buf[k*8:])
		}
	}
	if n > 0 {
		words[n-1] &= lastWord(w.info.Size, r.granularity)
	}
	*room -= n * 8
	r.old, r.live = old, words
	return nil
}

// bitmapWords returns how many words hold the bits of a disk.
func (g *geometry) bitmapWords(size int64, granularity uint8) int64 {
	if size == 0 {
		return 0
	}
	return (size-1)>>granularity/64 + 1
}

// bitmapPart returns the words that are in the cluster of a table entry.
func (g *geometry) bitmapPart(words []uint64, i int64) []uint64 {
	per, n := g.clusterSize/8, int64(len(words))
	return words[min(i*per, n):min((i+1)*per, n)]
}

// lastWord returns the bits of the last word that stand for something.
func lastWord(size int64, granularity uint8) uint64 {
	return ^uint64(0) >> (63 - uint64(size-1)>>granularity%64)
}

// record sets the bits of a range, in all bitmaps that record. It is called
// before anything in the range is changed, so that no change is missed.
func (w *writer) record(off, n int64) {
	for i := range w.recordings {
		if r := &w.recordings[i]; r.live != nil && n > 0 {
			setBits(r.live, off>>r.granularity, (off+n-1)>>r.granularity)
		}
	}
}

// setBits sets bits, the last included. It may be called concurrently.
func setBits(words []uint64, first, last int64) {
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask <<= first % 64
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		if atomic.LoadUint64(&words[i])&mask != mask {
			atomic.OrUint64(&words[i], mask)
		}
	}
}

// markRecordings marks the bitmaps that record as in use, durably. No other
// field changes, and each lies within a sector, so every state on the way is
// sound: the header need not deny meanwhile that there are bitmaps.
func (w *writer) markRecordings() error {
	for i := range w.recordings {
		if err := w.writeFlags(&w.recordings[i], bitmapInUse); err != nil {
			return err
		}
	}
	if len(w.recordings) > 0 && !w.defects.noSyncMark {
		if err := w.commit.sync(); err != nil {
			return err
		}
	}
	for i := range w.recordings {
		if r := &w.recordings[i]; r.live == nil {
			r.lost.Store(true)
		}
	}
	return nil
}

// writeFlags writes the flags of r as they were when the image was opened, and
// more.
func (w *writer) writeFlags(r *recording, more uint32) error {
	b := binary.BigEndian.AppendUint32(nil, r.flags|more)
	if err := w.store.WriteAt(b, r.at+12, 0); err != nil {
		return fmt.Errorf("bitmap %q: directory entry at %#x: %w", r.name, r.at, err)
	}
	return nil
}

// storeRecordings stores the bitmaps that were marked, and takes off the mark.
// The image is durable, requests are over, and the committer has stopped. The
// bits go to new clusters, by the order of a commit:
//
//	bits, tables and their counts    nothing points to them yet
//	sync
//	where the tables are             the bitmaps are still in use
//	sync
//	flags                            what they say is true now
//	counts of the old clusters       nothing points to these any more
//	sync
//
// So a bitmap that is not in use is right, at any time.
func (w *writer) storeRecordings() error {
	c := w.commit
	var taken []hostRun
	var tables []int64 // host offsets, by recording
	for i := range w.recordings {
		at, err := int64(0), error(nil)
		if r := &w.recordings[i]; r.live != nil {
			at, err = w.storeBits(r, &taken)
		}
		if err != nil {
			for _, r := range taken {
				w.alloc.give(r)
			}
			_ = c.once() // their counts; if that fails too they leak
			return err
		}
		tables = append(tables, at)
	}
	if len(taken) == 0 {
		return nil
	}
	if !w.defects.noSyncBits {
		if err := c.once(); err != nil {
			return err
		}
	}
	for i, at := range tables {
		if r := &w.recordings[i]; at != 0 {
			if err := w.store.WriteAt(binary.BigEndian.AppendUint64(nil, uint64(at)), r.at, 0); err != nil {
				return fmt.Errorf("bitmap %q: directory entry at %#x: %w", r.name, r.at, err)
			}
		}
	}
	if !w.defects.noSyncDirectory {
		if err := c.sync(); err != nil {
			return err
		}
	}
	for i, at := range tables {
		if at == 0 {
			continue
		}
		r := &w.recordings[i]
		if err := w.writeFlags(r, 0); err != nil {
			return err
		}
		for _, old := range r.old {
			if err := c.lowerShared(old, false); err != nil {
				return err
			}
		}
	}
	return c.once()
}

// storeBits writes the bits of r and a table of them to new clusters, which it
// adds to taken.
func (w *writer) storeBits(r *recording, taken *[]hostRun) (at int64, err error) {
	g := w.geo
	take := func(n int64) (int64, error) {
		run, err := w.takeWhole(n)
		if err != nil {
			return 0, fmt.Errorf("bitmap %q: %w", r.name, err)
		}
		*taken = append(*taken, run)
		return run.first << g.clusterBits, nil
	}
	n := g.ceil(int64(r.tableSize) * 8)
	table := make([]byte, n)
	buf := make([]byte, g.clusterSize)
	for i := range int64(r.tableSize) {
		part := g.bitmapPart(r.live, i)
		any, full := uint64(0), ^uint64(0)
		clear(buf)
		for k, word := range part {
			binary.LittleEndian.PutUint64(buf[k*8:], word)
			any |= word
			if i*g.clusterSize/8+int64(k) == int64(len(r.live))-1 {
				word |= ^lastWord(w.info.Size, r.granularity) // stands for nothing
			}
			full &= word
		}
		var e uint64
		switch {
		case any == 0:
		case full == ^uint64(0):
			e = 1
		default:
			host, err := take(1)
			if err != nil {
				return 0, err
			}
			if err := w.store.WriteAt(buf, host, 0); err != nil {
				return 0, fmt.Errorf("bitmap %q: bits at %#x: %w", r.name, host, err)
			}
			e = uint64(host)
		}
		binary.BigEndian.PutUint64(table[i*8:], e)
	}
	if at, err = take(n >> g.clusterBits); err != nil {
		return 0, err
	}
	if err := w.store.WriteAt(table, at, 0); err != nil {
		return 0, fmt.Errorf("bitmap %q: table at %#x: %w", r.name, at, err)
	}
	return at, nil
}

// takeWhole takes n consecutive clusters. The committer does not run.
func (w *writer) takeWhole(n int64) (hostRun, error) {
	for dry := 0; ; dry++ {
		if r, ok := w.alloc.takeWhole(n); ok {
			return r, nil
		}
		if dry == maxDry {
			return hostRun{}, syscall.ENOSPC
		}
		before := w.alloc.progress()
		if err := w.commit.once(); err != nil {
			return hostRun{}, err
		}
		if w.alloc.progress() != before {
			dry = 0 // it has not looked everywhere yet
		}
	}
}
