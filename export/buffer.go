package export

import (
	"math/bits"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	headRoom = 4096 // in front of a buffer's data, so that a reply's header fits and the data stays aligned

	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB: nbd.MaxPayload

	keepFree = 64 << 20        // bytes that a pool keeps for the next request at most
	keepTime = 5 * time.Second // at least, and at most twice that, without use
)

// A buffer is page-aligned memory outside the collector's reach, so that
// large payloads cause no collections.
type buffer struct {
	mem   []byte // headRoom and the data
	class int
}

// data returns the first n bytes of data.
func (b *buffer) data(n int) []byte { return b.mem[headRoom : headRoom+n : headRoom+n] }

// withHead returns the first n bytes of data with the h bytes before them.
func (b *buffer) withHead(h, n int) []byte { return b.mem[headRoom-h : headRoom+n] }

// A bufferPool keeps buffers by size, and gives back to the system those that
// nobody has needed for a while. The zero value is ready.
type bufferPool struct {
	mu     sync.Mutex
	free   [maxClass + 1][]*buffer // taken from the end
	spare  [maxClass + 1]int       // the fewest that were free since the last trim
	kept   int64
	keep   int64 // at most so many bytes
	closed bool
	out    int // buffers that were taken and not returned

	alloc func(n int) ([]byte, error) // mapMemory if nil; others in tests

	timer *time.Timer // of trim, nil until it is needed
	due   bool        // it runs
}

// bufferSize returns what a buffer for n bytes of data occupies.
func bufferSize(n int) int64 { return headRoom + 1<<classOf(n) }

func classOf(n int) int { return max(bits.Len(uint(max(n, 1)-1)), minClass) }

// get returns a buffer for n bytes, at most 32 MiB. Its contents are undefined.
func (p *bufferPool) get(n int) (*buffer, error) {
	c := classOf(n)
	p.mu.Lock()
	p.out++
	if l := len(p.free[c]); l > 0 {
		b := p.free[c][l-1]
		p.free[c] = p.free[c][:l-1]
		p.spare[c] = min(p.spare[c], l-1)
		p.kept -= int64(len(b.mem))
		p.mu.Unlock()
		return b, nil
	}
	p.mu.Unlock()
	alloc := p.alloc
	if alloc == nil {
		alloc = mapMemory
	}
	mem, err := alloc(headRoom + 1<<c)
	if err != nil {
		p.mu.Lock()
		p.out--
		p.mu.Unlock()
		return nil, err
	}
	return &buffer{mem: mem, class: c}, nil
}

func (p *bufferPool) put(b *buffer) {
	p.mu.Lock()
	p.out--
	keep := !p.closed && p.kept+int64(len(b.mem)) <= p.keep
	if keep {
		p.free[b.class] = append(p.free[b.class], b)
		p.kept += int64(len(b.mem))
		p.trimLater()
	}
	p.mu.Unlock()
	if !keep {
		unmapMemory(b.mem)
	}
}

// trimLater has the pool trimmed, if nobody has asked for that yet. p is
// locked.
func (p *bufferPool) trimLater() {
	switch {
	case p.due || p.kept == 0:
		return
	case p.timer == nil:
		p.timer = time.AfterFunc(keepTime, p.trim)
	default:
		p.timer.Reset(keepTime)
	}
	p.due = true
}

// trim gives back the buffers that were not needed since the last time.
func (p *bufferPool) trim() {
	var idle []*buffer
	p.mu.Lock()
	p.due = false
	for c, l := range p.free {
		n := p.spare[c]
		idle = append(idle, l[:n]...)
		p.free[c] = slices.Delete(l, 0, n)
		p.spare[c] = len(p.free[c])
	}
	for _, b := range idle {
		p.kept -= int64(len(b.mem))
	}
	p.trimLater()
	p.mu.Unlock()
	for _, b := range idle {
		unmapMemory(b.mem)
	}
}

// drain gives all free buffers back to the system, and those that come later.
func (p *bufferPool) drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
	}
	for c := range p.free {
		for _, b := range p.free[c] {
			unmapMemory(b.mem)
		}
		p.free[c], p.spare[c] = nil, 0
	}
	p.kept = 0
}

// mapMemory returns n zeroed bytes. Pages that are not touched cost nothing.
func mapMemory(n int) ([]byte, error) {
	// Not Mmap, which keeps a list of all that it has mapped.
	p, err := unix.MmapPtr(-1, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(p), n), nil
}

// unmapMemory fails only for what was never mapped.
func unmapMemory(mem []byte) {
	_ = unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(mem)), uintptr(cap(mem)))
}
