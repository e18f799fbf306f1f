package storagetest

import (
	"errors"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// A MemOption makes a Mem differ from a plain file.
type MemOption uint8

const (
	// FixedSize makes a Mem like a block device: it cannot grow, and what it
	// holds before the first write need not be zeros.
	FixedSize MemOption = 1 << iota
	// ReadOnly makes every method that writes refuse.
	ReadOnly
	// NeverTry makes TryReadAt answer storage.ErrWouldBlock always; without it
	// TryReadAt always reads.
	NeverTry
	// NoHoles makes it a store that cannot tell data from holes, give space
	// back or zero cheaply.
	NoHoles
)

// memPage is the unit in which a Mem keeps data, in bytes.
const memPage = 4096

// A Mem is a Store in memory. What was never written takes no memory, so a
// store may be of any size. A page that holds data stays data until it is
// zeroed with MayUnmap or discarded as a whole.
type Mem struct {
	opt  MemOption
	info storage.Info
	gate storage.Gate

	mu    sync.RWMutex
	pages map[int64]*[memPage]byte
	size  int64
}

var memCount atomic.Int64

// NewMem returns a store of size bytes that read as zeros.
func NewMem(size int64, opt ...MemOption) *Mem {
	m := &Mem{size: size, pages: make(map[int64]*[memPage]byte)}
	for _, o := range opt {
		m.opt |= o
	}
	id := strconv.FormatInt(memCount.Add(1), 10)
	m.info = storage.Info{
		URL:          &url.URL{Scheme: "mem", Opaque: id},
		ID:           "mem:" + id,
		ReadOnly:     m.opt&ReadOnly != 0,
		FixedSize:    m.opt&FixedSize != 0,
		NewReadsZero: m.opt&FixedSize == 0,
		FastZero:     m.opt&(NoHoles|ReadOnly) == 0,
		Discard:      m.opt&(NoHoles|ReadOnly) == 0,
		Alignment:    1,
		PreferredIO:  memPage,
		QueueDepth:   1,
	}
	return m
}

// MemOf returns a store that holds a copy of data.
func MemOf(data []byte, opt ...MemOption) *Mem {
	m := NewMem(int64(len(data)), opt...)
	m.write(data, 0)
	return m
}

// Bytes returns a copy of what the store holds, closed or not.
func (m *Mem) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	p := make([]byte, m.size)
	m.read(p, 0)
	return p
}

// Allocated returns the number of bytes that are not holes.
func (m *Mem) Allocated() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return int64(len(m.pages)) * memPage
}

func (m *Mem) Info() storage.Info { return m.info }
func (m *Mem) File() *os.File     { return nil }

func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	if !m.gate.Enter() {
		return 0, fs.ErrClosed
	}
	defer m.gate.Leave()
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := int(max(0, min(int64(len(p)), m.size-off)))
	m.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *Mem) TryReadAt(p []byte, off int64) error {
	if m.opt&NeverTry == 0 {
		_, err := m.ReadAt(p, off)
		return err
	}
	if err := storage.CheckRange(off, int64(len(p))); err != nil {
		return err
	}
	if !m.gate.Enter() {
		return fs.ErrClosed
	}
	defer m.gate.Leave()
	return storage.ErrWouldBlock
}

func (m *Mem) WriteAt(p []byte, off int64, _ storage.WriteFlags) error {
	return m.change(off, int64(len(p)), func() { m.write(p, off) })
}

func (m *Mem) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	if m.opt&(NoHoles|ReadOnly) == NoHoles && flags&storage.FastOnly != 0 {
		return m.unsupported(off, n)
	}
	return m.change(off, n, func() { m.zero(off, n, flags&storage.MayUnmap != 0) })
}

// change runs f under the lock if [off, off+n) may be written, and grows the
// store as far.
func (m *Mem) change(off, n int64, f func()) error {
	if err := m.enterToWrite(off, n); err != nil {
		return err
	}
	defer m.gate.Leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	if n == 0 {
		return nil
	}
	if off+n > m.size {
		if m.info.FixedSize {
			return syscall.ENOSPC
		}
		m.size = off + n
	}
	f()
	return nil
}

func (m *Mem) Discard(off, n int64) error {
	if err := m.enterToWrite(off, n); err != nil {
		return err
	}
	defer m.gate.Leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.opt&NoHoles == 0 {
		m.zero(off, min(n, m.size-off), true)
	}
	return nil
}

func (m *Mem) Sync() error {
	if !m.gate.Enter() {
		return fs.ErrClosed
	}
	m.gate.Leave()
	return nil
}

func (m *Mem) Size() (int64, error) {
	if !m.gate.Enter() {
		return 0, fs.ErrClosed
	}
	defer m.gate.Leave()
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.size, nil
}

func (m *Mem) Truncate(size int64) error {
	if err := m.enterToWrite(size, 0); err != nil {
		return err
	}
	defer m.gate.Leave()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.info.FixedSize && size != m.size {
		return errors.ErrUnsupported
	}
	if size < m.size {
		m.zero(size, m.size-size, true)
	}
	m.size = size
	return nil
}

func (m *Mem) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	if err := storage.CheckRange(off, n); err != nil {
		return dst, err
	}
	if !m.gate.Enter() {
		return dst, fs.ErrClosed
	}
	defer m.gate.Leave()
	m.mu.RLock()
	defer m.mu.RUnlock()
	end := min(off+n, m.size)
	if off >= end {
		return dst, nil
	}
	if m.opt&NoHoles != 0 {
		return append(dst, storage.Extent{Offset: off, Length: end - off}), nil
	}
	first := len(dst)
	for _, i := range m.pagesWithin(off, end) {
		start, stop := max(i*memPage, off), min((i+1)*memPage, end)
		if start > off {
			dst = append(dst, storage.Extent{Offset: off, Length: start - off, Hole: true})
			off = start
		}
		if k := len(dst) - 1; k >= first && !dst[k].Hole {
			dst[k].Length += stop - start
		} else {
			dst = append(dst, storage.Extent{Offset: start, Length: stop - start})
		}
		off = stop
	}
	if off < end {
		dst = append(dst, storage.Extent{Offset: off, Length: end - off, Hole: true})
	}
	return dst, nil
}

func (m *Mem) Close() error {
	if !m.gate.Close() {
		return fs.ErrClosed
	}
	return nil
}

// enterToWrite enters the gate unless the range or the store forbids writing.
func (m *Mem) enterToWrite(off, n int64) error {
	if m.info.ReadOnly {
		return storage.ErrReadOnly
	}
	if err := storage.CheckRange(off, n); err != nil {
		return err
	}
	if !m.gate.Enter() {
		return fs.ErrClosed
	}
	return nil
}

func (m *Mem) unsupported(off, n int64) error {
	if err := m.enterToWrite(off, n); err != nil {
		return err
	}
	m.gate.Leave()
	return errors.ErrUnsupported
}

// The rest is called with the lock held.

func (m *Mem) read(p []byte, off int64) {
	for len(p) > 0 {
		page, start := m.pages[off/memPage], off%memPage
		n := min(len(p), int(memPage-start))
		if page == nil {
			clear(p[:n])
		} else {
			copy(p[:n], page[start:])
		}
		p, off = p[n:], off+int64(n)
	}
}

func (m *Mem) write(p []byte, off int64) {
	for len(p) > 0 {
		page := m.pages[off/memPage]
		if page == nil {
			page = new([memPage]byte)
			m.pages[off/memPage] = page
		}
		n := copy(page[off%memPage:], p)
		p, off = p[n:], off+int64(n)
	}
}

// zero zeroes [off, off+n), of which nothing may be left. It visits only pages
// that exist; with unmap those that it covers become holes, as does what lies
// behind the end of the store.
func (m *Mem) zero(off, n int64, unmap bool) {
	if n <= 0 {
		return
	}
	for _, i := range m.pagesWithin(off, off+n) {
		start, stop := max(off-i*memPage, 0), min(off+n-i*memPage, memPage)
		clear(m.pages[i][start:stop])
		if unmap && start == 0 && (stop == memPage || i*memPage+stop >= m.size) {
			delete(m.pages, i)
		}
	}
}

// pagesWithin returns the numbers of the pages that exist and meet [off, end),
// in order.
func (m *Mem) pagesWithin(off, end int64) []int64 {
	first, last := off/memPage, (end-1)/memPage
	var in []int64
	if last-first < int64(len(m.pages)) {
		for i := first; i <= last; i++ {
			if m.pages[i] != nil {
				in = append(in, i)
			}
		}
		return in
	}
	for i := range m.pages {
		if first <= i && i <= last {
			in = append(in, i)
		}
	}
	slices.Sort(in)
	return in
}
