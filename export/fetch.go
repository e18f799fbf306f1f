package export

import (
	"runtime"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A fetcher has the small reads of a line whose data is on its way. While a medium
// answers many at a time, the line itself looks again and again what has arrived, from
// there and from the client: whoever slept would have to be woken, as often as not
// later than the next comes. Where that does not pay, others wait for them (underWay).
type fetcher struct {
	reads     []request // oldest first
	answered  int       // since spent was 0
	spent     time.Duration
	restraint restraint
}

const (
	fetchMost = 64                    // reads of a connection
	fetchLook = time.Millisecond      // how long nothing may arrive
	fetchCost = 20 * time.Microsecond // that may be spent in vain for a read that is answered
)

// mayFetch reports whether the line keeps one more read.
func (s *session) mayFetch() bool {
	l := &s.line
	if n := len(l.fetch.reads); n > 0 {
		return n < min(fetchMost, s.srv.Limits.Requests)
	}
	return l.shares && s.srv.transmitting.Load() == 1 && !l.fetch.restraint.holds()
}

// fetch answers the reads that the line keeps, until there is more input.
func (s *session) fetch() error {
	f := &s.line.fetch
	last, idle := time.Now(), time.Duration(0)
	for len(f.reads) > 0 {
		n, err := s.takeArrived()
		if err != nil {
			return err
		}
		if err := s.sendOut(); err != nil {
			return err
		}
		arrived, known := s.out.t.arrived()
		if arrived && known {
			break
		}
		now := time.Now()
		if n == 0 {
			idle += now.Sub(last)
			f.spent += now.Sub(last)
			runtime.Gosched()
		} else {
			idle = 0
		}
		last = now
		if !known || idle > fetchLook || s.srv.transmitting.Load() > 1 {
			f.restraint.inVain()
			f.answered, f.spent = 0, 0
			if err := s.stopFetching(); err != nil {
				return err
			}
		}
	}
	if f.answered >= fetchMost || len(f.reads) == 0 && f.answered > 0 {
		if f.spent > time.Duration(f.answered)*fetchCost {
			f.restraint.inVain()
		} else {
			f.restraint.paid()
		}
		f.answered, f.spent = 0, 0
	}
	return s.fill()
}

// keep has the line wait for a read.
func (f *fetcher) keep(r *request) {
	if f.reads == nil {
		f.reads = make([]request, 0, fetchMost)
	}
	f.reads = append(f.reads, *r)
}

// takeArrived answers some of the oldest reads, whose data has arrived, and returns how
// many: the client takes these while the next are looked at.
func (s *session) takeArrived() (int, error) {
	f := &s.line.fetch
	n := 0
	for ; n < min(len(f.reads), lineShare); n++ {
		r := &f.reads[n]
		err := s.copyRun(r, run{r.off(), r.n(), false}, nbd.ReplyFlagDone)
		if err == image.ErrWouldBlock || err == image.ErrUnderWay {
			break
		}
		if err != nil {
			return n, err
		}
	}
	f.reads = f.reads[:copy(f.reads, f.reads[n:])]
	f.answered += n
	return n, nil
}

// stopFetching has others wait for what the line keeps.
func (s *session) stopFetching() error {
	reads := s.line.fetch.reads
	s.line.fetch.reads = reads[:0]
	for i := range reads {
		if err := s.leave(&reads[i], reads[i].off(), reads[i].n(), true); err != nil {
			return err
		}
	}
	return nil
}
