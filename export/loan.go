package export

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// A loan is what a connection owes for replies that were sent from where the
// bytes lie: a Pin, until the client has received them. A Device that needs the
// Pin back gives no locations meanwhile, so replies are copied, and the loan
// ends as soon as the client has taken what is under way. A client that takes
// nothing is parted from, but only when much waits for it.
type loan struct {
	t     transport
	fail  func(error) // ends the connection
	grace time.Duration

	mu     sync.Mutex  // guards the fields below
	timer  *time.Timer // nil until it is needed
	pin    image.Pin
	using  bool      // bytes are being sent from a location
	mark   int64     // what had been sent, in bytes, when the last of them were
	wanted time.Time // since when the pin is wanted back; zero: it is not
}

const (
	loanLook  = 10 * time.Millisecond // how often the queue is looked at
	loanGrace = 10 * time.Second      // that a client has when its loan is recalled
)

var errLoan = errors.New("the client takes no replies, and space that was given up waits for it")

func (l *loan) init(t transport, fail func(error)) {
	l.t, l.fail, l.grace = t, fail, loanGrace
}

// lookLater has the queue looked at. l is locked.
func (l *loan) lookLater() {
	if l.timer == nil {
		l.timer = time.AfterFunc(loanLook, l.look)
	} else {
		l.timer.Reset(loanLook)
	}
}

// begin pins dev before bytes are sent from a location, until end and longer.
func (l *loan) begin(dev image.Device) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.using = true
	if !l.pin.Held() {
		l.pin = dev.Pin()
	}
}

// end says whether any were.
func (l *loan) end(sent bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.using = false
	if !l.pin.Held() {
		return
	}
	if sent {
		l.mark = l.t.sent()
	}
	if sent || !l.settle() {
		l.lookLater()
	}
}

// settle releases the pin if the client has all that was sent under it.
func (l *loan) settle() bool {
	if !l.pin.Held() {
		return true
	}
	// What is queued came last.
	if l.using || l.t.sent()-l.mark < l.t.unread() {
		return false
	}
	l.pin.Release()
	l.pin, l.wanted = image.Pin{}, time.Time{}
	return true
}

// look is called by the timer.
func (l *loan) look() {
	l.mu.Lock()
	settled := l.settle()
	late := false
	if !settled {
		switch now := time.Now(); {
		case !l.pin.Recalled():
			l.wanted = time.Time{}
		case l.wanted.IsZero():
			l.wanted = now
		default:
			late = now.Sub(l.wanted) > l.grace
		}
		if !late {
			l.lookLater()
		}
	}
	l.mu.Unlock()
	if late {
		l.fail(errLoan)
	}
}

// close releases the pin at the end of a connection, when the client has what
// was sent, or is gone, or has had its time.
func (l *loan) close(ctx context.Context) {
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	for end := time.Now().Add(l.grace); !l.settled(); {
		select {
		case <-ctx.Done():
		case <-time.After(loanLook):
			if time.Now().Before(end) {
				continue
			}
		}
		l.mu.Lock()
		l.pin.Release()
		l.pin = image.Pin{}
		l.mu.Unlock()
	}
}

func (l *loan) settled() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.settle()
}
