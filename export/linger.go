package export

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// lingerTime is how long a client on the same host, or near, may take to send its next
// request, or more of one. Over TCP an idle processor is woken later than that;
// on a Unix socket one is woken as fast, but a payload comes in parts of some
// 100 KiB, and to sleep between them costs as much as to receive them.
const lingerTime = 50 * time.Microsecond

// A restraint keeps from what is mostly in vain: each time it was, that is left
// off twice as often, up to mostOften, until it pays.
type restraint struct{ often, left int }

const mostOften = 1 << 12

func (r *restraint) keeps() bool {
	if r.left == 0 {
		return false
	}
	r.left--
	return true
}

func (r *restraint) paid() { r.often = 0 }

func (r *restraint) inVain() {
	r.often = min(max(2*r.often, 1), mostOften)
	r.left = r.often
}

func (s *socket) linger(midst bool) {
	if midst != s.local || s.restraint.keeps() {
		return
	}
	start := time.Now()
	for time.Since(start) < lingerTime {
		if s.rc.Control(s.rd.ask) != nil || s.rd.arrived {
			s.restraint.paid()
			return
		}
		runtime.Gosched()
	}
	s.restraint.inVain()
}

func (s *socket) askNow(fd uintptr) { s.rd.arrived = pollNow(fd, unix.POLLIN) }
