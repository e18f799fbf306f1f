package storage

import (
	"math"
	"sync/atomic"
)

// A Gate counts the calls in progress of something that is closed while it is
// used: Close waits for them and turns away those that come later. It costs
// two atomic additions a call. The zero Gate is open.
//
//	if !s.gate.Enter() {
//		return fs.ErrClosed
//	}
//	defer s.gate.Leave()
type Gate struct {
	calls atomic.Int64 // calls in progress; the sign says that the gate is closed
	idle  atomic.Pointer[chan struct{}]
}

const gateClosed = math.MinInt64

// Enter begins a call. If it returns false the gate is closed, and Leave must
// not be called.
func (g *Gate) Enter() bool {
	if g.calls.Add(1) > 0 {
		return true
	}
	g.Leave()
	return false
}

// Leave ends a call.
func (g *Gate) Leave() {
	if g.calls.Add(-1) != gateClosed {
		return
	}
	// A late Enter may pass here too, so the signal is not counted.
	select {
	case *g.idle.Load() <- struct{}{}:
	default:
	}
}

// Close closes the gate and waits until no call is in progress. It returns
// false, without waiting, if the gate is closed already.
func (g *Gate) Close() bool {
	idle := make(chan struct{}, 1)
	if !g.idle.CompareAndSwap(nil, &idle) {
		return false
	}
	if g.calls.Add(gateClosed) != gateClosed {
		<-idle
	}
	return true
}
