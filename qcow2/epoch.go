package qcow2

import (
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
)

// epochs tells when a host cluster that was freed can have no user left.
//
// A request enters before it looks at the mapping and leaves when it no longer
// uses any host offset that it found. Time is divided into epochs: the number
// moves on only when nobody is left in the one before. So what was unlinked
// while the number was e can be known only to requests of epochs up to e, and
// has no user once the number is e+2.
//
// The same counters stop the world: freeze and close keep new requests out and
// wait for those inside. A request that has to wait for another one leaves
// first; one that waits for a commit need not, for the committer never waits
// for requests.
type epochs struct {
	state  atomic.Uint64 // epoch number << 2 | frozenBit | closedBit
	shards [epochShards]struct {
		inside [3]atomic.Int64 // requests by epoch number modulo 3
		_      [40]byte        // one cache line each
	}

	mu     sync.Mutex    // guards changes of state, thawed
	thawed chan struct{} // closed by thaw; not nil while frozen
	left   chan struct{} // told of a leave while frozen or closed; one slot
}

const (
	epochShards = 16
	closedBit   = 1
	frozenBit   = 2
	epochOne    = 4
)

// A visit is the time that a request spends inside.
type visit struct {
	inside *atomic.Int64
	epochs *epochs
}

func newEpochs() *epochs {
	return &epochs{left: make(chan struct{}, 1)}
}

// enter waits while the image is frozen. It fails once it is closed.
func (e *epochs) enter() (visit, error) {
	for {
		v, state := e.attempt()
		switch {
		case v.inside != nil:
			return v, nil
		case state&closedBit != 0:
			return visit{}, fs.ErrClosed
		case state&frozenBit != 0:
			e.mu.Lock()
			ch := e.thawed
			e.mu.Unlock()
			if ch != nil {
				<-ch
			}
		}
	}
}

// tryEnter is enter, but for an error instead of waiting.
func (e *epochs) tryEnter() (visit, error) {
	for {
		v, state := e.attempt()
		switch {
		case v.inside != nil:
			return v, nil
		case state&closedBit != 0:
			return visit{}, fs.ErrClosed
		case state&frozenBit != 0:
			return visit{}, image.ErrWouldBlock
		}
	}
}

func (e *epochs) attempt() (visit, uint64) {
	state := e.state.Load()
	if state&(closedBit|frozenBit) != 0 {
		return visit{}, state
	}
	n := &e.shards[rand.Uint32()%epochShards].inside[state/epochOne%3]
	n.Add(1)
	if e.state.Load() == state {
		return visit{n, e}, state
	}
	visit{n, e}.leave() // the state moved on before we were counted
	return visit{}, 0
}

// leave ends the visit. It is called once.
func (v visit) leave() {
	v.inside.Add(-1)
	if v.epochs.state.Load()&(closedBit|frozenBit) != 0 {
		select {
		case v.epochs.left <- struct{}{}:
		default:
		}
	}
}

// number returns the present epoch.
func (e *epochs) number() uint64 { return e.state.Load() / epochOne }

// advance moves on by up to two epochs, as far as it can without waiting.
func (e *epochs) advance() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for range 2 {
		if !e.empty((e.number() + 2) % 3) {
			return
		}
		e.state.Add(epochOne)
	}
}

// empty reports whether nobody is inside of the epochs that share a slot.
func (e *epochs) empty(slot uint64) bool {
	for i := range e.shards {
		if e.shards[i].inside[slot].Load() != 0 {
			return false
		}
	}
	return true
}

// freeze keeps new requests waiting and returns when those inside have left.
// It must be followed by thaw, and fails if the image is closed.
func (e *epochs) freeze() error {
	for {
		e.mu.Lock()
		if e.state.Load()&closedBit != 0 {
			e.mu.Unlock()
			return fs.ErrClosed
		}
		ch := e.thawed
		if ch == nil {
			e.thawed = make(chan struct{})
			e.state.Or(frozenBit)
			e.mu.Unlock()
			e.drain()
			return nil
		}
		e.mu.Unlock()
		<-ch
	}
}

func (e *epochs) thaw() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state.And(^uint64(frozenBit))
	close(e.thawed)
	e.thawed = nil
}

// close refuses new requests and returns when those inside have left. Only the
// first call does; later ones fail.
func (e *epochs) close() error {
	if err := e.freeze(); err != nil {
		return err
	}
	e.mu.Lock()
	e.state.Or(closedBit)
	e.mu.Unlock()
	e.thaw()
	return nil
}

func (e *epochs) drain() {
	for !e.empty(0) || !e.empty(1) || !e.empty(2) {
		<-e.left
	}
}
