package export

import (
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A fetcher has the small reads of a line whose data is on its way. While a medium
// answers many at a time, the line itself looks again and again what has arrived, from
// there and from the client: whoever slept would have to be woken, as often as not
// later than the next comes. Where that does not pay, others wait for them (underWay).
type fetcher struct {
	reads     taskList // oldest first
	kept      int      // of them
	since     time.Time
	answered  int // since spent was 0
	spent     time.Duration
	restraint restraint
}

const (
	fetchMost = 64                    // reads of a connection
	fetchLook = time.Millisecond      // how long none may arrive
	fetchCost = 20 * time.Microsecond // that may be spent in vain for a read that is answered
)

// keep has the line wait for r, all of which is under way. It reports whether it does.
func (s *session) keep(r *request) bool {
	f := &s.line.fetch
	switch {
	case f.kept == fetchMost:
		return false
	case f.kept == 0:
		if !s.line.shares || s.srv.transmitting.Load() > 1 || f.restraint.holds() {
			return false
		}
		f.since = time.Now()
	}
	t := s.tryTask(r, int(r.n()))
	if t == nil {
		return false
	}
	f.reads.push(t)
	f.kept++
	return true
}

// fetch answers the reads that the line keeps, until there is more input or it does not pay.
func (s *session) fetch() error {
	f := &s.line.fetch
	for last := time.Now(); f.kept > 0; {
		n, err := s.takeArrived()
		if err != nil {
			return err
		}
		if err := s.sendOut(); err != nil {
			return err
		}
		arrived, known := s.out.t.arrived()
		now := time.Now()
		if n > 0 {
			f.since = now
		} else if !arrived {
			f.spent += now.Sub(last)
		}
		last = now
		if !known || now.Sub(f.since) > fetchLook || s.srv.transmitting.Load() > 1 {
			f.restraint.inVain()
			s.stopFetching()
		}
		if arrived {
			break
		}
	}
	if !f.pays() {
		s.stopFetching()
	}
	return s.fill()
}

// pays judges what was spent, now and then.
func (f *fetcher) pays() bool {
	if f.answered < fetchMost && (f.kept > 0 || f.answered == 0) {
		return true // it is too early to tell
	}
	pays := f.spent <= time.Duration(f.answered)*fetchCost
	if pays {
		f.restraint.paid()
	} else {
		f.restraint.inVain()
	}
	f.answered, f.spent = 0, 0
	return pays
}

// takeArrived answers some of the oldest reads, whose data has arrived, and returns how
// many: the client takes these while the next are looked at.
func (s *session) takeArrived() (int, error) {
	f := &s.line.fetch
	for n := range lineShare {
		t := f.reads.head
		if t == nil {
			return n, nil
		}
		err := s.copyRun(&t.req, run{t.off, t.n, false}, nbd.ReplyFlagDone)
		if err == image.ErrWouldBlock || err == image.ErrUnderWay {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		f.reads.pop()
		f.kept--
		f.answered++
		s.endTask(t)
	}
	return lineShare, nil
}

// stopFetching has others wait for what the line keeps. Whatever may make the line wait
// for long, but for the client to take replies, calls it before.
func (s *session) stopFetching() {
	f := &s.line.fetch
	for t := f.reads.pop(); t != nil; t = f.reads.pop() {
		s.dev.under.add(t)
	}
	f.kept, f.answered, f.spent = 0, 0, 0
}
