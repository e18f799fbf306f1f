package qcow2

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An arena holds the entries of cached slices outside the Go heap, where they
// would make the collector keep as much again in reserve. Readers use entries
// without a lock, so those of an evicted slice are handed out again only when
// every request that may have seen them has left.
type arena struct {
	words  int // of one slot
	epochs *epochs

	mu      sync.Mutex
	mem     []byte
	unused  [][]atomic.Uint64 // given back
	next    int               // words of mem from here on were never handed out
	retired []retiredSlot     // oldest first
}

type retiredSlot struct {
	words []atomic.Uint64
	epoch uint64
}

// newArena makes room for a number of slots. The kernel provides the memory as
// it is used; should it refuse, the heap does.
func newArena(slots, words int, epochs *epochs) *arena {
	mem, err := unix.Mmap(-1, 0, slots*words*8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		mem = nil
	}
	return &arena{words: words, epochs: epochs, mem: mem}
}

// take returns words with undefined contents.
func (a *arena) take() []atomic.Uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.unused) == 0 && a.full() {
		a.reclaim()
	}
	if n := len(a.unused); n > 0 {
		w := a.unused[n-1]
		a.unused = a.unused[:n-1]
		return w
	}
	if a.full() {
		return make([]atomic.Uint64, a.words)
	}
	w := unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&a.mem[a.next*8])), a.words)
	a.next += a.words
	return w
}

func (a *arena) full() bool { return (a.next+a.words)*8 > len(a.mem) }

// reclaim collects the slots that nobody can be reading any more.
func (a *arena) reclaim() {
	if len(a.retired) == 0 {
		return
	}
	a.epochs.advance()
	n := 0
	for n < len(a.retired) && a.retired[n].epoch+2 <= a.epochs.number() {
		a.unused = append(a.unused, a.retired[n].words)
		n++
	}
	a.retired = append(a.retired[:0], a.retired[n:]...)
}

// retire gives back words that requests may still be reading, but that no
// later request can find.
func (a *arena) retire(w []atomic.Uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.owns(w) {
		a.retired = append(a.retired, retiredSlot{w, a.epochs.number()})
	}
}

// owns tells words of the arena from those that the heap lent.
func (a *arena) owns(w []atomic.Uint64) bool {
	if len(a.mem) == 0 {
		return false
	}
	p, base := uintptr(unsafe.Pointer(&w[0])), uintptr(unsafe.Pointer(&a.mem[0]))
	return p >= base && p < base+uintptr(len(a.mem))
}

// close returns the memory. No request may be inside.
func (a *arena) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mem != nil {
		_ = unix.Munmap(a.mem) // fails only for what is not mapped
	}
	a.mem, a.unused, a.retired, a.next = nil, nil, nil, 0
}
