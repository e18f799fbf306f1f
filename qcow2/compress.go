package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/imgnbd/imgnbd/storage"
)

const (
	decodedBudget  = 8 << 20   // bytes of decoded clusters that are kept
	maxZstdWindow  = 8 << 20   // what a frame may make us allocate
	maxZstdHistory = 128 << 20 // what a frame may refer back to where that costs nothing
)

// A decoder reads compressed clusters. It decodes in as many workspaces as
// there are processors, whoever asks, and keeps the clusters that were last
// read in part. Of such a cluster what lies behind the read is not decoded:
// random reads need half of it on average. The next read that goes further
// decodes all, so that a sequence of small reads decodes little twice.
type decoder struct {
	method      compression
	clusterSize int64
	geo         *geometry
	store       storage.Store
	workspaces  chan *workspace

	mu   sync.Mutex
	kept map[l2Entry]*decoded
	last *decoded // ring of kept, the next one is the most recently used
	free [][]byte // clusters to be filled again
	max  int      // of kept, and of free
}

// A decoded is a compressed cluster in plain, or on its way there. The entry
// names it: where the data lies and how long it is.
type decoded struct {
	entry      l2Entry
	prev, next *decoded
	length     int64         // of data, from the beginning of the cluster
	users      int           // who waits or copies; guarded by decoder.mu
	ready      chan struct{} // closed when the rest is set
	data       []byte
	err        error
}

// A workspace is what decoding needs besides source and destination.
type workspace struct {
	src     []byte
	inflate inflater
	block   *zstd.Decoder // for whole frames
	stream  *zstd.Decoder // for what block refuses: a frame that has more than is wanted
	r       bytes.Reader
}

func newDecoder(g *geometry, method compression, store storage.Store) *decoder {
	n := runtime.GOMAXPROCS(0)
	d := &decoder{
		method: method, clusterSize: g.clusterSize, geo: g, store: store,
		workspaces: make(chan *workspace, n),
		kept:       make(map[l2Entry]*decoded),
		max:        int(max(decodedBudget/g.clusterSize, 4)),
	}
	for range n {
		d.workspaces <- new(workspace)
	}
	return d
}

// readAt fills p from a compressed cluster, beginning within it.
func (d *decoder) readAt(p []byte, e l2Entry, within int64) error {
	c, mine := d.find(e, within+int64(len(p)), int64(len(p)) < d.clusterSize)
	if c == nil {
		return d.decode(p, e)
	}
	defer d.release(c)
	if mine {
		c.data = d.buffer()[:c.length]
		if c.err = d.decode(c.data, e); c.err != nil {
			d.mu.Lock()
			d.drop(c) // the next one tries again
			d.mu.Unlock()
		}
		close(c.ready)
	} else {
		<-c.ready
	}
	if c.err != nil {
		return c.err
	}
	copy(p, c.data[within:])
	return nil
}

// tryReadAt is readAt if that need not wait; it reports whether it was.
func (d *decoder) tryReadAt(p []byte, e l2Entry, within int64) bool {
	c, _ := d.find(e, within+int64(len(p)), false)
	if c == nil {
		return false
	}
	defer d.release(c)
	select {
	case <-c.ready:
	default:
		return false
	}
	if c.err != nil {
		return false
	}
	copy(p, c.data[within:])
	return true
}

// find returns a cluster that is kept or on its way, up to end at least. If
// there is none it returns nil, or with add a new one, which the caller has to
// make ready.
func (d *decoder) find(e l2Entry, end int64, add bool) (c *decoded, mine bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c = d.kept[e]
	switch {
	case c != nil && c.length >= end:
		d.unlink(c)
	case add:
		if c != nil || d.method == compressionZstd { // which is decoded by the block
			end = d.clusterSize
		}
		if c != nil {
			d.drop(c)
		}
		c, mine = &decoded{entry: e, length: end, ready: make(chan struct{})}, true
		d.kept[e] = c
	default:
		return nil, false
	}
	d.link(c)
	c.users++
	return c, mine
}

func (d *decoder) release(c *decoded) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.users--
	if c.users == 0 && d.kept[c.entry] != c {
		d.recycle(c) // dropped while it was used
	}
	old := d.last
	for n := len(d.kept); n > 0 && len(d.kept) > d.max; n-- {
		prev := old.prev
		if old.users == 0 {
			d.drop(old)
		}
		old = prev
	}
}

// link puts c at the head of the ring, unlink takes it out. d.mu is held.
func (d *decoder) link(c *decoded) {
	if d.last == nil {
		c.prev, c.next = c, c
		d.last = c
		return
	}
	c.prev, c.next = d.last, d.last.next
	c.prev.next, c.next.prev = c, c
}

func (d *decoder) unlink(c *decoded) {
	if d.last == c {
		d.last = c.prev
	}
	if d.last == c {
		d.last = nil
	}
	c.prev.next, c.next.prev = c.next, c.prev
}

// drop forgets c, unless that has happened. d.mu is held.
func (d *decoder) drop(c *decoded) {
	if d.kept[c.entry] == c {
		delete(d.kept, c.entry)
		d.unlink(c)
		d.recycle(c)
	}
}

// recycle keeps the memory of a dropped cluster unless it is still read. d.mu
// is held.
func (d *decoder) recycle(c *decoded) {
	if c.users == 0 && c.data != nil && len(d.free) < d.max {
		d.free, c.data = append(d.free, c.data[:d.clusterSize]), nil
	}
}

// buffer returns memory for a cluster.
func (d *decoder) buffer() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.free)
	if n == 0 {
		return make([]byte, d.clusterSize)
	}
	b := d.free[n-1]
	d.free = d.free[:n-1]
	return b
}

// decode fills p from the beginning of a cluster.
func (d *decoder) decode(p []byte, e l2Entry) error {
	host, n := d.geo.compressed(e)
	w := <-d.workspaces
	defer func() { d.workspaces <- w }()
	if int64(cap(w.src)) < n {
		w.src = make([]byte, n)
	}
	w.src = w.src[:n]
	// The length is in sectors, so the data may end before the image does.
	got, err := d.store.ReadAt(w.src, host)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("compressed data at %#x: %w", host, err)
	}
	w.src = w.src[:got]
	if d.method == compressionZstd {
		err = w.zstd(p)
	} else {
		err = w.inflate.inflate(p, w.src)
	}
	if err != nil {
		return corrupt("compressed data at %#x, %d bytes: %v", host, n, err)
	}
	return nil
}

// zstd fills p from one frame or several. What follows is ignored.
func (w *workspace) zstd(p []byte) error {
	if w.block == nil {
		var err error
		w.block, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdHistory), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return err
		}
	}
	out := p[:0:len(p)]
	for src := w.src; len(out) < len(p); {
		n := zstdFrame(src)
		if n == 0 {
			break
		}
		var err error
		if out, err = w.block.DecodeAll(src[:n], out); err != nil {
			break
		}
		src = src[n:]
	}
	if len(out) == len(p) {
		return nil
	}
	// Too short, too long or wrong: the stream decoder knows which.
	w.r.Reset(w.src)
	if w.stream == nil {
		var err error
		w.stream, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return err
		}
	}
	if err := w.stream.Reset(&w.r); err != nil {
		return err
	}
	return fill(p, w.stream)
}

// zstdFrame returns the length of the frame that b begins with, 0 if that is
// not a whole frame.
func zstdFrame(b []byte) int {
	var h zstd.Header
	if h.Decode(b) != nil {
		return 0
	}
	n := h.HeaderSize
	if h.Skippable {
		n += int(h.SkippableSize)
	}
	for last := h.Skippable; !last; {
		if n+3 > len(b) {
			return 0
		}
		block := binary.LittleEndian.Uint32(append(b[n:n+3:n+3], 0))
		last = block&1 != 0
		size := int(block >> 3)
		if block>>1&3 == 1 { // one byte, repeated
			size = 1
		}
		n += 3 + size
	}
	if h.HasCheckSum {
		n += 4
	}
	if n <= 0 || n > len(b) {
		return 0
	}
	return n
}

func fill(p []byte, r io.Reader) error {
	n, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it ends after %d of %d bytes", n, len(p))
	}
	return err
}

// close gives up what the workspaces hold. No request may be inside.
func (d *decoder) close() {
	for range cap(d.workspaces) {
		w := <-d.workspaces
		if w.block != nil {
			w.block.Close()
		}
		if w.stream != nil {
			w.stream.Close()
		}
		d.workspaces <- new(workspace)
	}
}
