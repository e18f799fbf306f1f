package export

import (
	"sync"
	"time"
)

// Reads that are under way need no worker each: the medium has them all, and
// those that were asked for together arrive about together. So one goroutine
// waits, for the oldest; then it takes what else has arrived, and sends the
// replies together. While the medium stalls, more and more wait, so that what
// it does not answer holds up no other read.
type underWay struct {
	limit int    // goroutines that wait
	run   func() // wait, made once: a go statement with an argument is garbage

	mu       sync.Mutex // guards the fields below
	queue    taskList   // oldest first
	waiting  int        // goroutines
	taken    uint64     // tasks, from the queue, ever
	seen     uint64     // taken, when the timer was set
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
	switch {
	case u.waiting == 0:
		u.waiting++
		go u.run()
	case !u.watching:
		u.watching, u.seen = true, u.taken
		if u.timer == nil {
			u.timer = time.AfterFunc(stalled, u.look)
		} else {
			u.timer.Reset(stalled)
		}
	}
}

// look has one more goroutine wait if nothing has moved.
func (u *underWay) look() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.queue.head == nil {
		u.watching = false
		return
	}
	if u.taken == u.seen && u.waiting < u.limit {
		u.waiting++
		go u.run()
	}
	u.seen = u.taken
	u.timer.Reset(stalled)
}

// next returns the oldest task. With nil, the caller is no longer waiting.
func (u *underWay) next() *task {
	u.mu.Lock()
	defer u.mu.Unlock()
	t := u.queue.pop()
	if t == nil {
		u.waiting--
	} else {
		u.taken++
	}
	return t
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
	for t := u.next(); t != nil; t = u.next() {
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
