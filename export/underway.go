package export

import (
	"sync"
	"time"
)

// Reads that are under way need no worker each: the medium has them all, and
// those that were asked for together arrive about together. So one goroutine
// waits, for the oldest; then it takes what else has arrived, and sends the
// replies together. While the medium stalls, more and more wait, so that what
// it does not answer holds up no other read. Those that have waited for long do
// not count: the next read finds somebody at once.
type underWay struct {
	limit int    // goroutines
	run   func() // wait, made once: a go statement with an argument is garbage

	mu       sync.Mutex // guards the fields below
	queue    taskList   // oldest first
	starting bool       // a goroutine that has taken nothing yet
	waiting  int        // goroutines that may soon take what is queued
	stuck    int        // goroutines that wait for what does not come
	taken    uint64     // tasks, from the queue, ever
	seen     uint64     // taken, when nothing was found to move, or the timer was set
	stale    uint64     // who has taken this task, or one before, and waits, is stuck
	timer    *time.Timer
	watching bool // the timer is set
}

// stalled is how long nothing moves before one more goroutine waits.
const stalled = 2 * time.Millisecond

func (u *underWay) init(limit int) {
	u.limit = limit
	u.run = u.wait
}

// add has t, a read that is under way, answered. It never waits.
func (u *underWay) add(t *task) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.queue.push(t)
	if u.waiting == 0 {
		u.start()
	}
	if !u.watching {
		u.watching, u.seen = true, u.taken
		if u.timer == nil {
			u.timer = time.AfterFunc(stalled, u.look)
		} else {
			u.timer.Reset(stalled)
		}
	}
}

// start has one more goroutine wait, if it may. u is locked.
func (u *underWay) start() {
	if !u.starting && u.waiting+u.stuck < u.limit {
		u.starting = true
		go u.run()
	}
}

// look finds out whether anything has moved. If nothing has, all who wait are
// stuck.
func (u *underWay) look() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.taken == u.seen {
		u.stuck += u.waiting
		u.waiting, u.stale = 0, u.taken
		if u.queue.head != nil {
			u.start()
		}
	}
	u.seen = u.taken
	if u.waiting == 0 && u.queue.head == nil {
		u.watching = false
		return
	}
	u.timer.Reset(stalled)
}

// next returns the oldest task, and its number among all that were taken, to one
// who has taken that of number last before, or 0. With nil, the caller is no
// longer waiting.
func (u *underWay) next(last uint64) (*task, uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case last == 0:
		u.starting = false
		u.waiting++
	case last <= u.stale:
		u.stuck--
		u.waiting++
	}
	t := u.queue.pop()
	if t == nil {
		u.waiting--
	} else {
		u.taken++
	}
	return t, u.taken
}

// wait answers what was added, until there is nothing.
func (u *underWay) wait() {
	var kept *session // with replies that were not sent
	var size int64    // of their data
	send := func() {
		if kept != nil {
			kept.out.push()
		}
		kept, size = nil, 0
	}
	for t, n := u.next(0); t != nil; t, n = u.next(n) {
		s := t.session
		if s != kept || size >= lineBatch {
			send()
		}
		if kept == nil || !s.tryRead(t) {
			send() // before waiting
			s.read(t)
		}
		size += t.n
		kept = s
		s.out.keep(t)
	}
	send()
}
