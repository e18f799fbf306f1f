package file

import (
	"math"
	"slices"
	"sync"
	"syscall"
	"unsafe"
)

// direct is I/O past the page cache (O_DIRECT). What is not aligned as the
// medium demands goes through buffers of its own; a block that is written in
// part is read, changed and written back under a lock on its range. Order: a
// buffer is taken before a lock, and nobody takes two of either.
type direct struct {
	block   int64   // offsets and lengths are multiples of it
	memory  uintptr // addresses too, of this
	buffers *bufferPool
	ranges  rangeLock
	cached  int // a descriptor of the file through the page cache; -1: a device, or only read
}

func newDirect(n *node) *direct {
	return &direct{
		block:   n.directBlock,
		memory:  n.directMemory,
		buffers: newBufferPool(int(roundUp(256<<10, n.directBlock)), int(n.directMemory), 32),
		cached:  n.cached,
	}
}

// close gives back what d has. Nothing may be in use.
func (d *direct) close() error {
	d.buffers.free()
	if d.cached < 0 {
		return nil
	}
	return syscall.Close(d.cached)
}

func (d *direct) alignedMemory(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%d.memory == 0
}

func (d *direct) read(fd int, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if off%d.block == 0 && int64(len(p))%d.block == 0 && d.alignedMemory(p) {
		return readFull(fd, p, off, d.block)
	}
	buf, err := d.buffers.get()
	if err != nil {
		return 0, err
	}
	defer d.buffers.put(buf)
	done := 0
	for done < len(p) {
		at := off + int64(done)
		start := roundDown(at, d.block)
		whole := min(at-start+int64(len(p)-done)+d.block-1, int64(len(buf))) / d.block * d.block
		n, err := readFull(fd, buf[:whole], start, d.block)
		if skip := int(at - start); n > skip {
			done += copy(p[done:], buf[skip:n])
		}
		if done < len(p) && err != nil {
			return done, err
		}
	}
	return done, nil
}

// write writes the blocks that p covers whole as they are, and what is left at
// either end by changing a block.
func (d *direct) write(s *store, p []byte, off int64) error {
	if in := off % d.block; in != 0 {
		head := p[:min(int64(len(p)), d.block-in)]
		if err := d.patch(s, head, off); err != nil {
			return err
		}
		p, off = p[len(head):], off+int64(len(head))
	}
	whole := roundDown(int64(len(p)), d.block)
	if err := d.writeBlocks(s, p[:whole], off); err != nil {
		return err
	}
	return d.patch(s, p[whole:], off+whole)
}

func (d *direct) writeBlocks(s *store, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	var buf []byte
	if !d.alignedMemory(p) {
		var err error
		if buf, err = d.buffers.get(); err != nil {
			return err
		}
		defer d.buffers.put(buf)
	}
	held := d.ranges.lock(off, off+int64(len(p)), false)
	defer d.ranges.unlock(held)
	if buf == nil {
		return writeFull(s.fd, p, off)
	}
	for len(p) > 0 {
		n := copy(buf, p)
		if err := writeFull(s.fd, buf[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// patch writes p, which lies within one block. That in which a file ends goes
// through the page cache: written whole, it would lengthen the file until what is too
// much is cut off, and for good if the process dies in between.
func (d *direct) patch(s *store, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	buf, err := d.buffers.get()
	if err != nil {
		return err
	}
	defer d.buffers.put(buf)
	buf = buf[:d.block]
	start := roundDown(off, d.block)

	held := d.ranges.lock(start, start+d.block, true)
	defer d.ranges.unlock(held)
	size, err := s.size()
	if err != nil {
		return err
	}
	if d.cached >= 0 && size < start+d.block {
		return writeFull(d.cached, p, off)
	}
	if _, err := readFull(s.fd, buf, start, d.block); err != nil {
		return err
	}
	copy(buf[off-start:], p)
	return writeFull(s.fd, buf, start)
}

// lockRange keeps blocks of [off, off+n) from being changed in part until the
// function that it returns is called.
func (s *store) lockRange(off, n int64) (unlock func()) {
	if s.direct == nil {
		return func() {}
	}
	d := s.direct
	end := int64(math.MaxInt64)
	if off+n < end-d.block {
		end = roundUp(off+n, d.block)
	}
	held := d.ranges.lock(roundDown(off, d.block), end, false)
	return func() { d.ranges.unlock(held) }
}

func (s *store) lockAll() (unlock func()) { return s.lockRange(0, math.MaxInt64) }

// A rangeLock orders changes of whole blocks, which may overlap each other,
// and changes within a block, which may overlap nothing. Who waits waits only
// for those who came before. The zero rangeLock is free.
type rangeLock struct {
	mu    sync.Mutex
	freed sync.Cond
	queue []*lockedRange // who holds or waits, in order of arrival
}

type lockedRange struct {
	start, end int64
	alone      bool
}

func (a *lockedRange) excludes(b *lockedRange) bool {
	return (a.alone || b.alone) && a.start < b.end && b.start < a.end
}

func (l *rangeLock) lock(start, end int64, alone bool) *lockedRange {
	r := &lockedRange{start, end, alone}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.freed.L = &l.mu
	l.queue = append(l.queue, r)
	for slices.ContainsFunc(l.queue[:slices.Index(l.queue, r)], r.excludes) {
		l.freed.Wait()
	}
	return r
}

func (l *rangeLock) unlock(r *lockedRange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.queue, r)
	l.queue = slices.Delete(l.queue, i, i+1)
	l.freed.Broadcast()
}

// A bufferPool lends aligned memory outside the heap, of a bounded amount: who
// wants more waits. Nobody holds two at a time.
type bufferPool struct {
	size, align int
	idle        chan []byte
	unmade      chan struct{} // a token for each that was not made yet
	mapped      [][]byte
	mu          sync.Mutex // guards mapped
}

func newBufferPool(size, align, count int) *bufferPool {
	b := &bufferPool{
		size: size, align: align,
		idle:   make(chan []byte, count),
		unmade: make(chan struct{}, count),
	}
	for range count {
		b.unmade <- struct{}{}
	}
	return b
}

func (b *bufferPool) get() ([]byte, error) {
	select {
	case buf := <-b.idle:
		return buf, nil
	default:
	}
	select {
	case buf := <-b.idle:
		return buf, nil
	case <-b.unmade:
	}
	m, err := syscall.Mmap(-1, 0, b.size+b.align, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		b.unmade <- struct{}{}
		return nil, err
	}
	b.mu.Lock()
	b.mapped = append(b.mapped, m)
	b.mu.Unlock()
	skip := -int(uintptr(unsafe.Pointer(&m[0]))) & (b.align - 1)
	return m[skip : skip+b.size : skip+b.size], nil
}

func (b *bufferPool) put(buf []byte) { b.idle <- buf }

// free gives the memory back. No buffer may be in use.
func (b *bufferPool) free() {
	for _, m := range b.mapped {
		syscall.Munmap(m)
	}
}
