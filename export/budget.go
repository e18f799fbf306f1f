package export

import (
	"sync"
	"sync/atomic"
)

// A budget bounds the bytes that all connections hold for their requests.
type budget struct {
	mu      sync.Mutex
	changed sync.Cond
	limit   int64
	used    int64
	waiting int
}

func (b *budget) init(limit int64) {
	b.changed.L = &b.mu
	b.limit = limit
}

// take takes n bytes, waiting until there are so many. A connection that has
// no other request in progress never waits: else one client that reads no
// replies could stop all others.
func (b *budget) take(n int64, inProgress *atomic.Int32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.takeLocked(n, inProgress) {
		b.waiting++
		b.changed.Wait()
		b.waiting--
	}
}

// tryTake is take, but returns false instead of waiting.
func (b *budget) tryTake(n int64, inProgress *atomic.Int32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.takeLocked(n, inProgress)
}

func (b *budget) takeLocked(n int64, inProgress *atomic.Int32) bool {
	if b.used+n > b.limit && inProgress.Load() > 1 { // the one that asks is counted
		return false
	}
	b.used += n
	return true
}

// give returns n bytes. It comes after the connection has counted itself idle.
func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.waiting > 0 {
		b.changed.Broadcast()
	}
}
