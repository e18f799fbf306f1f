package qcow2

import (
	"sync"
	"sync/atomic"
)

// A clusterSet is a set of clusters: a table of hashes, in which each lies at
// or behind the place of its hash. has takes no lock.
type clusterSet struct {
	mu    sync.Mutex
	slots atomic.Pointer[[]atomic.Int64] // cluster+1, emptySlot or deadSlot; a power of two
	used  int                            // that are not empty
}

const (
	emptySlot = 0
	deadSlot  = -1
)

// clusterSlot returns where a cluster is, and where the search for it ended.
func clusterSlot(slots []atomic.Int64, c int64) (i int, found bool) {
	mask := len(slots) - 1
	for i = int(uint64(c)*0x9e3779b97f4a7c15>>32) & mask; ; i = (i + 1) & mask {
		switch slots[i].Load() {
		case c + 1:
			return i, true
		case emptySlot:
			return i, false
		}
	}
}

func (s *clusterSet) has(c int64) bool {
	slots := s.slots.Load()
	if slots == nil {
		return false
	}
	_, found := clusterSlot(*slots, c)
	return found
}

func (s *clusterSet) add(c int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slots := s.slots.Load()
	if slots == nil || s.used >= len(*slots)/2 {
		slots = s.grow(slots)
	}
	if i, found := clusterSlot(*slots, c); !found {
		(*slots)[i].Store(c + 1)
		s.used++
	}
}

// grow moves what is there to a table with room for as much again.
func (s *clusterSet) grow(old *[]atomic.Int64) *[]atomic.Int64 {
	var live []int64
	if old != nil {
		for i := range *old {
			if v := (*old)[i].Load(); v > emptySlot {
				live = append(live, v)
			}
		}
	}
	n := 64
	for n < 4*len(live) {
		n *= 2
	}
	slots := make([]atomic.Int64, n)
	for _, v := range live {
		i, _ := clusterSlot(slots, v-1)
		slots[i].Store(v)
	}
	s.used = len(live)
	s.slots.Store(&slots)
	return &slots
}

func (s *clusterSet) remove(c int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slots := s.slots.Load(); slots != nil {
		if i, found := clusterSlot(*slots, c); found {
			(*slots)[i].Store(deadSlot)
		}
	}
}
