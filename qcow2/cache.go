package qcow2

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/storage"
)

// A slice is a part of an L2 table in memory: 4 KiB, or a whole table where
// clusters are smaller. Requests use ents without a lock, for as long as they
// are inside the epoch in which they found the slice.
type slice struct {
	no   uint64          // counted over the guest disk
	ents []atomic.Uint64 // what is true now, entryWords words per entry
	seq  atomic.Uint32   // odd while the two words of an extended entry change
	used atomic.Bool     // since the clock's hand last passed

	mu   sync.Mutex
	dead bool // not in the cache, or no longer; who wants to change it looks again
	change
}

// entry returns entry i, both words of one moment if it is extended.
func (s *slice) entry(i int, words uint) (l2Entry, l2Bitmap) {
	if words == 1 {
		return l2Entry(s.ents[i].Load()), 0
	}
	for {
		before := s.seq.Load()
		e, b := s.ents[2*i].Load(), s.ents[2*i+1].Load()
		if before&1 == 0 && s.seq.Load() == before {
			return l2Entry(e), l2Bitmap(b)
		}
		runtime.Gosched()
	}
}

// retire makes the slice dead, unless it is needed.
func (s *slice) retire() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dead = s.idle()
	return s.dead
}

const ways = 8

// A cache holds slices in sets of eight. A lookup is at most eight loads and
// takes no lock. Lock order: set.mu, then slice.mu.
type cache struct {
	sets  []cacheSet
	shift uint // log2 of len(sets)
	arena *arena
	size  int64 // bytes of a slice
	read  readSlice
	bufs  sync.Pool // of *[sliceBytes]byte, for read and for what a changed slice has on the store
}

// A readSlice fills b with a slice as the store has it. Unless wait is set it
// returns ErrWouldBlock instead of waiting.
type readSlice func(no uint64, b []byte, wait bool) error

type cacheSet struct {
	ways [ways]atomic.Pointer[slice]

	mu      sync.Mutex // guards which slices are in ways, and what follows
	hand    int
	loading []*loading
}

// A loading is a slice on its way from the store.
type loading struct {
	no    uint64
	done  chan struct{} // closed when the rest is set
	slice *slice
	err   error
}

// newCache makes a cache of at most budget bytes, at least one set, and no
// more than it takes to hold the given number of slices.
func newCache(g *geometry, count, budget int64, epochs *epochs, read readSlice) *cache {
	want := min(count, budget/g.sliceSize())
	c := &cache{size: g.sliceSize(), read: read}
	c.bufs.New = func() any { return new([sliceBytes]byte) }
	for int64(ways)<<c.shift < want && int64(ways)<<(c.shift+1) <= max(budget/g.sliceSize(), ways) {
		c.shift++
	}
	c.sets = make([]cacheSet, 1<<c.shift)
	// Somewhat more slots than slices: some are always on their way in or out.
	slots := ways << c.shift
	c.arena = newArena(slots+max(slots/16, ways), g.sliceWords(), epochs)
	return c
}

// set returns where a slice belongs. Slices that follow each other lie in
// different sets, and those a power of two apart too.
func (c *cache) set(no uint64) *cacheSet {
	return &c.sets[(no^no>>c.shift*0x9e3779b97f4a7c15)&(1<<c.shift-1)]
}

func (st *cacheSet) find(no uint64) *slice {
	for i := range st.ways {
		if s := st.ways[i].Load(); s != nil && s.no == no {
			if !s.used.Load() {
				s.used.Store(true)
			}
			return s
		}
	}
	return nil
}

// peek returns a slice if it is in memory.
func (c *cache) peek(no uint64) *slice { return c.set(no).find(no) }

// get returns a slice, from the store if need be. The caller is inside an
// epoch. If it cannot be kept in the cache, it comes back dead. Unless wait is
// set it returns ErrWouldBlock instead of waiting.
func (c *cache) get(no uint64, wait bool) (*slice, error) {
	st := c.set(no)
	for {
		if s := st.find(no); s != nil {
			return s, nil
		}
		st.mu.Lock()
		if s := st.find(no); s != nil {
			st.mu.Unlock()
			return s, nil
		}
		l := st.underWay(no)
		if l == nil {
			break
		}
		st.mu.Unlock()
		if !wait {
			return nil, storage.ErrWouldBlock
		}
		if <-l.done; l.err != storage.ErrWouldBlock {
			return l.slice, l.err
		}
		// Who did not want to wait has given up.
	}
	l := &loading{no: no, done: make(chan struct{})}
	st.loading = append(st.loading, l)
	st.mu.Unlock()

	l.slice, l.err = c.load(no, wait)

	st.mu.Lock()
	i := slices.Index(st.loading, l)
	st.loading = slices.Delete(st.loading, i, i+1)
	if l.err == nil {
		c.place(st, l.slice)
	}
	st.mu.Unlock()
	close(l.done)
	return l.slice, l.err
}

// underWay returns the loading of a slice, nil if there is none. The set is
// locked.
func (st *cacheSet) underWay(no uint64) *loading {
	for _, l := range st.loading {
		if l.no == no {
			return l
		}
	}
	return nil
}

func (c *cache) load(no uint64, wait bool) (*slice, error) {
	buf := c.bufs.Get().(*[sliceBytes]byte)
	defer c.bufs.Put(buf)
	b := buf[:c.size]
	if err := c.read(no, b, wait); err != nil {
		return nil, err
	}
	s := &slice{no: no, ents: c.arena.take()}
	for i := range s.ents {
		s.ents[i].Store(binary.BigEndian.Uint64(b[i*8:]))
	}
	return s, nil
}

// place puts a slice into its set, in the stead of one that was not used for a
// while. With none to part from, the slice serves those who asked for it and
// is forgotten. The set is locked.
func (c *cache) place(st *cacheSet, s *slice) {
	for i := range st.ways {
		if st.ways[i].Load() == nil {
			st.ways[i].Store(s)
			return
		}
	}
	for range 2 * ways {
		i := st.hand
		st.hand = (st.hand + 1) % ways
		old := st.ways[i].Load()
		if old.used.Swap(false) || !old.retire() {
			continue
		}
		st.ways[i].Store(s)
		c.arena.retire(old.ents)
		return
	}
	s.dead = true
	c.arena.retire(s.ents) // later requests do not find it
}

// capacity returns how many slices the cache holds at most.
func (c *cache) capacity() int64 { return ways << c.shift }

// close gives up the memory. No request may be inside.
func (c *cache) close() { c.arena.close() }
