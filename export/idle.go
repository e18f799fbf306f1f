package export

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A lineMemory is where a line has what arrived and replies. Once the line has waited
// for input for a while, and there is nothing in it, the system gets back its pages.
type lineMemory struct {
	mu     sync.Mutex // held by the line but while it waits, where the transport knows when that is
	mem    []byte     // nil at the end
	waited uint64     // how often the line has waited
	seen   uint64     // waited, when it was looked at

	used  atomic.Bool // since the pages were given back
	later func()      // has it looked at
}

// wait lets go of the memory, since the line is to wait for input.
func (m *lineMemory) wait() {
	m.waited++
	first := !m.used.Load()
	m.used.Store(true)
	m.mu.Unlock()
	if first {
		m.later()
	}
}

// goOn ends wait.
func (m *lineMemory) goOn() { m.mu.Lock() }

// trim gives the pages back if the line has waited since it was called before, with
// nothing in them. It reports whether they may be given back later.
func (s *session) trim() bool {
	l := &s.line
	m := &l.memory
	if !m.used.Load() {
		return false
	}
	if !m.mu.TryLock() {
		return true
	}
	defer m.mu.Unlock()
	switch {
	case m.mem == nil:
		return false
	case m.waited != m.seen || l.r < l.w || len(l.out) > 0:
		m.seen = m.waited
		return true
	}
	if !s.out.trim() {
		return true
	}
	_ = unix.Madvise(m.mem, unix.MADV_DONTNEED) // if not, they are kept
	m.used.Store(false)
	return false
}

// An idler looks now and then for lines whose memory is to be given back, as long as
// there may be such.
type idler struct {
	mu    sync.Mutex // guards the fields below
	timer *time.Timer
	due   bool // it runs
}

func (i *idler) later(look func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.due:
		return
	case i.timer == nil:
		i.timer = time.AfterFunc(keepTime, look)
	default:
		i.timer.Reset(keepTime)
	}
	i.due = true
}

func (i *idler) began() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.due = false
}

// trimLater has trimIdle called, if nobody has asked for that yet.
func (s *Server) trimLater() { s.idler.later(s.trimIdle) }

// trimIdle trims all sessions.
func (s *Server) trimIdle() {
	s.idler.began()
	s.mu.Lock()
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	again := false
	for _, ses := range sessions {
		again = ses.trim() || again
	}
	if again {
		s.trimLater()
	}
}
