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

func (s *socket) linger(midst bool) {
	if midst && !s.lingersMidst || !midst && !s.lingersAfter || s.restraint.holds() {
		return
	}
	start := time.Now()
	for asked := 0; ; asked++ {
		if arrived, _ := s.arrived(); arrived {
			// What is there at once in the midst of a write would have been
			// without waiting.
			if asked > 0 || !midst {
				s.restraint.paid()
			}
			return
		}
		if time.Since(start) > lingerTime {
			s.restraint.inVain()
			return
		}
		runtime.Gosched()
	}
}

func (s *socket) arrived() (bool, bool) { return s.rc.Control(s.rd.ask) != nil || s.rd.arrived, true }

func (s *socket) askNow(fd uintptr) { s.rd.arrived = pollNow(fd, unix.POLLIN) }

// A restraint skips what was in vain once, twice, four times and so on, up to
// mostSkips times, until it pays.
type restraint struct{ skips, left int }

const mostSkips = 1 << 12

func (r *restraint) holds() bool {
	if r.left == 0 {
		return false
	}
	r.left--
	return true
}

func (r *restraint) paid() { r.skips = 0 }

// ease is paid, for what may be wrong again soon.
func (r *restraint) ease() { r.skips /= 2 }

func (r *restraint) inVain() {
	r.skips = min(max(2*r.skips, 1), mostSkips)
	r.left = r.skips
}
