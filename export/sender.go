package export

import (
	"sync"
	"sync/atomic"
)

// A sender is the way out of a connection. Whoever has set busy may write to
// the transport; replies and chunks are never split.
//
// The goroutine that reads the connection waits for the socket: that is what
// stops a client that sends requests and reads no replies. A worker never
// does: it queues its reply, tries to send without waiting, and leaves the
// rest to a writer that is started for it.
type sender struct {
	t    transport
	fail func(error) // ends the connection
	done func(*task) // the reply has left, or never will

	mu      sync.Mutex // guards the fields below
	changed sync.Cond  // busy, err or the number in progress has changed
	busy    bool
	err     error
	queue   taskList
	held    int64 // bytes held for requests in progress

	inProgress atomic.Int32 // requests in progress; changed under mu

	out packer // of whoever is busy

	finish func() // what a writer does, made once
}

func (s *sender) init(t transport, fail func(error), done func(*task)) {
	s.t, s.fail, s.done = t, fail, done
	s.changed.L = &s.mu
	s.finish = func() { s.release(nil) }
}

// acquire waits for the right to write.
func (s *sender) acquire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy && s.err == nil {
		s.changed.Wait()
	}
	if s.err != nil {
		return s.err
	}
	s.busy = true
	return nil
}

// release sends what was queued in the meantime, waiting for it, and gives up
// the right to write. err is what went wrong while it was held.
func (s *sender) release(err error) error {
	for {
		if err == nil {
			_, err = s.writeOut(true)
		}
		if err != nil {
			s.fail(err)
		}
		s.mu.Lock()
		if s.err == nil {
			s.err = err
		}
		err = s.err
		s.out.take(&s.queue)
		if s.out.empty() {
			s.busy = false
			s.changed.Broadcast()
			s.mu.Unlock()
			return err
		}
		s.mu.Unlock()
		if err != nil {
			s.out.drop(s.done)
		}
	}
}

// send writes p, waiting until it has left.
func (s *sender) send(p []byte) error {
	if err := s.acquire(); err != nil {
		return err
	}
	return s.release(s.write(p))
}

// write writes p for who is busy.
func (s *sender) write(p []byte) error {
	s.out.one[0] = p
	_, err := s.t.write(s.out.one[:], true)
	return err
}

// enqueue has the reply of t sent, sooner or later. It reports whether that is
// up to the caller: nobody was busy.
func (s *sender) enqueue(t *task) bool {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		s.done(t)
		return false
	}
	defer s.mu.Unlock()
	s.queue.push(t)
	if s.busy {
		return false
	}
	s.busy = true
	s.out.take(&s.queue)
	return true
}

// forward has a writer send the reply of t.
func (s *sender) forward(t *task) {
	if s.enqueue(t) {
		go s.finish() // wait sees it by busy
	}
}

// keep keeps the reply of t until somebody sends. A call of push has to follow.
func (s *sender) keep(t *task) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		s.done(t)
		return
	}
	s.queue.push(t)
	s.mu.Unlock()
}

// push sends what was kept, sooner or later, and never waits.
func (s *sender) push() {
	s.mu.Lock()
	if s.busy || s.queue.head == nil {
		s.mu.Unlock()
		return // who is busy looks again
	}
	s.busy = true
	s.out.take(&s.queue)
	s.mu.Unlock()
	s.sendTaken()
}

// post sends the reply of t, sooner or later, and never waits.
func (s *sender) post(t *task) {
	if s.enqueue(t) {
		s.sendTaken()
	}
}

// sendTaken sends what the packer has, without waiting; a writer is left the
// rest. The caller has set busy.
func (s *sender) sendTaken() {
	all, err := s.writeOut(false)
	if err == nil && all {
		s.mu.Lock()
		if s.queue.head == nil {
			s.busy = false
			s.changed.Broadcast()
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
	if err != nil {
		go s.release(err)
		return
	}
	go s.finish() // wait sees both by busy
}

// writeOut sends what the packer holds. Without wait it may leave some, and
// reports whether that is so.
func (s *sender) writeOut(wait bool) (all bool, err error) {
	for s.out.pack(s.done) {
		if s.out.iov, err = s.t.write(s.out.iov, wait); err != nil {
			s.out.drop(s.done)
			return false, err
		}
		if len(s.out.iov) > 0 {
			return false, nil
		}
	}
	return true, nil
}

// begin counts a request that holds n bytes, after waiting until the
// connection may have one more. It returns false if the connection has ended.
func (s *sender) begin(n int64, l *Limits) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && !s.beginLocked(n, l) {
		s.changed.Wait()
	}
	return s.err == nil
}

// tryBegin is begin, but returns false instead of waiting.
func (s *sender) tryBegin(n int64, l *Limits) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err == nil && s.beginLocked(n, l)
}

func (s *sender) beginLocked(n int64, l *Limits) bool {
	if now := int(s.inProgress.Load()); now > 0 && (now >= l.Requests || s.held+n > l.ConnBytes) {
		return false
	}
	s.held += n
	s.inProgress.Add(1)
	return true
}

// end uncounts it, here and, unless b is nil, there.
func (s *sender) end(n int64, b *budget) {
	s.mu.Lock()
	defer s.mu.Unlock() // nobody sees the connection idle before b does
	s.held -= n
	s.inProgress.Add(-1)
	if b != nil {
		b.give(n)
	}
	s.changed.Broadcast()
}

// wait waits until nothing is in progress and all replies have left, or never
// will. It returns the error that ended the connection, if one did.
func (s *sender) wait() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy || s.inProgress.Load() > 0 {
		s.changed.Wait()
	}
	return s.err
}

// trim forgets what the packer keeps for further replies, unless some are being sent.
func (s *sender) trim() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy {
		return false
	}
	s.out.iov, s.out.store, s.out.small = nil, nil, nil // an empty iov still leads to the others
	return true
}

// A packer gathers replies into few pieces, so that one call sends many.
type packer struct {
	tasks taskList // not packed yet
	batch taskList // in iov
	iov   [][]byte // what is left to send of the batch
	store [][]byte // where iov begins
	small []byte   // copies of short pieces
	one   [1][]byte
}

const (
	packSmall = 2 << 10  // pieces up to so many bytes are copied together
	packCopy  = 32 << 10 // as long as there is room for them here
	packBatch = 1 << 20  // bytes of one batch, about
)

// take moves the tasks of l here.
func (p *packer) take(l *taskList) {
	if l.head == nil {
		return
	}
	if p.tasks.head == nil {
		p.tasks = *l
	} else {
		p.tasks.tail.next = l.head
		p.tasks.tail = l.tail
	}
	*l = taskList{}
}

func (p *packer) empty() bool {
	return len(p.iov) == 0 && p.tasks.head == nil && p.batch.head == nil
}

// pack ends the batch that was sent and makes the next one. It returns false
// if there is nothing to send.
func (p *packer) pack(done func(*task)) bool {
	for len(p.iov) == 0 {
		for t := p.batch.pop(); t != nil; t = p.batch.pop() {
			done(t)
		}
		if p.tasks.head == nil {
			return false
		}
		p.fill() // with nothing, if those replies are empty
	}
	return true
}

// fill makes a batch of tasks.
func (p *packer) fill() {
	if p.small == nil {
		p.small = make([]byte, 0, packCopy)
	}
	p.iov, p.small = p.store[:0], p.small[:0]
	joined := false // the last piece of iov is the end of small
	for total := 0; p.tasks.head != nil && total < packBatch; {
		if total > 0 && len(p.small)+p.tasks.head.smallSize() > packCopy {
			break
		}
		t := p.tasks.pop()
		p.batch.push(t)
		for _, part := range t.parts {
			total += len(part)
			if len(part) > packSmall || len(p.small)+len(part) > packCopy {
				p.iov = append(p.iov, part)
				joined = false
				continue
			}
			at := len(p.small)
			p.small = append(p.small, part...)
			if !joined {
				p.iov = append(p.iov, nil)
				joined = true
			}
			last := &p.iov[len(p.iov)-1]
			*last = p.small[at-len(*last):]
		}
	}
	p.store = p.iov[:0]
}

// drop ends all replies without sending them.
func (p *packer) drop(done func(*task)) {
	p.iov = nil
	for _, l := range []*taskList{&p.batch, &p.tasks} {
		for t := l.pop(); t != nil; t = l.pop() {
			done(t)
		}
	}
}
