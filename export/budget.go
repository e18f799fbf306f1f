package export

import (
	"sync"
	"sync/atomic"
)

// smallRequest is what a connection may always hold, in bytes: less than it
// costs to be there.
const smallRequest = 72 << 10

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

// take takes n bytes, waiting until there are so many. It never waits for other
// connections alone, or one client that reads no replies could stop all others:
// who has nothing else in progress gets a small n, and false for a large one.
func (b *budget) take(n int64, inProgress *atomic.Int32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.takeLocked(n, inProgress) {
		if alone(inProgress) {
			return false
		}
		b.waiting++
		b.changed.Wait()
		b.waiting--
	}
	return true
}

// tryTake is take, but returns false instead of waiting.
func (b *budget) tryTake(n int64, inProgress *atomic.Int32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.takeLocked(n, inProgress)
}

func (b *budget) takeLocked(n int64, inProgress *atomic.Int32) bool {
	if b.used+n > b.limit && (n > smallRequest || !alone(inProgress)) {
		return false
	}
	b.used += n
	return true
}

// alone reports whether the request that asks, which is counted, is the only
// one of its connection.
func alone(inProgress *atomic.Int32) bool { return inProgress.Load() <= 1 }

// tryHold takes n bytes for what is no request, if there are so many.
func (b *budget) tryHold(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.limit {
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
