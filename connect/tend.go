package connect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// ErrServerEnded is the error of tending a device whose server has ended, where
// nobody waits for another: DeadTimeout is 0.
var ErrServerEnded = errors.New("the server has ended")

// Times of opening a connection again.
const (
	// settling is how long the kernel, which is woken by the end of a
	// connection as this process is, has to note it. Until then it silently
	// has no place for another one.
	settling = 100 * time.Millisecond

	maxPause    = time.Second      // between two attempts
	attemptTime = 10 * time.Second // of one attempt
)

// Tend looks after the connections of a device to a server: those that end are
// replaced when the server is there again, however long that takes; meanwhile
// requests wait, up to DeadTimeout. A server that is there with another size
// or other abilities is not taken for the one before.
//
// It returns nil when the device has been detached, by anybody, and otherwise
// the cause of ctx or ErrServerEnded.
func (a *Attachment) Tend(ctx context.Context) error {
	for {
		ended, err := a.lines.wait(ctx)
		if err != nil {
			return err
		}
		for _, place := range ended {
			for again := true; again; {
				if again, err = a.renew(ctx, place); errors.Is(err, ErrNotAttached) {
					return nil
				} else if err != nil {
					return err
				}
			}
		}
	}
}

// renew replaces a connection that has ended. It reports whether that which takes
// its place has ended, too.
func (a *Attachment) renew(ctx context.Context, place int) (again bool, err error) {
	began := time.Now()
	told, failing := "", false
	for pause := settling; ; pause = min(2*pause, maxPause) {
		// What ends the connections of a device that is detached looks the
		// same from here.
		if err := a.attached(); err != nil {
			return false, err
		}
		if a.opt.DeadTimeout == 0 {
			if err := a.endPatience(); err != nil {
				return false, err
			}
			a.setAway(true)
			return false, fmt.Errorf("%s: %w", a.Path(), ErrServerEnded)
		}
		if err := sleep(ctx, pause); err != nil {
			return false, err
		}
		conn, err := a.replace(ctx, place)
		switch {
		case err == nil:
			defer conn.Close()
			a.opt.Log.Info("connected again", "device", a.Path(), "after", time.Since(began).Round(time.Millisecond))
			a.setAway(false)
			return a.insist(ctx, conn)
		case errors.Is(err, ErrNotAttached) || ctx.Err() != nil:
			return false, err
		}
		a.setAway(true)
		if text := err.Error(); text != told {
			told = text
			a.opt.Log.Warn("not connected again yet", "device", a.Path(), "server", a.opt.Server, "err", text)
		}
		if !failing && time.Since(began) > a.opt.DeadTimeout {
			failing = true
			a.opt.Log.Warn("the server has been away for too long: what is waiting fails", "device", a.Path(), "server", a.opt.Server)
			if err := a.endPatience(); err != nil {
				return false, err
			}
		}
	}
}

// replace opens a connection and gives it to the kernel. The hold that this
// process has on it is the caller's to end.
func (a *Attachment) replace(ctx context.Context, place int) (_ net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	conn, s, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if !same(a.session, s) {
		return nil, fmt.Errorf("export '%s' is not the same: %s, and not %s", a.opt.Export, terms(s), terms(a.session))
	}
	if err := a.bePatient(); err != nil {
		return nil, err
	}
	if err := a.attached(conn); err != nil {
		return nil, err
	}
	return conn, a.lines.set(place, conn)
}

// insist offers the kernel a connection again that it may have ignored: when it
// has the connection, it has no other place for it. That it dropped a socket is
// seen by nobody, since this process holds it too, but for the end of a socket
// pair. With several connections there may be another place, which is not for
// the same socket. One that has ended is not offered.
func (a *Attachment) insist(ctx context.Context, conn net.Conn) (ended bool, err error) {
	if _, ok := conn.(*kernelEnd); ok || a.opt.Connections > 1 {
		return false, nil
	}
	for pause := settling; pause < 2*time.Second; pause *= 2 {
		if ended, err := a.endsWithin(ctx, pause); ended || err != nil {
			return ended, err
		}
		if err := a.attached(conn); errors.Is(err, ErrNotAttached) {
			return false, err
		} else if err != nil {
			a.opt.Log.Warn("the connection is not offered again", "device", a.Path(), "err", err)
		}
	}
	return false, nil
}

// endsWithin waits for the end of the only connection, but not for longer than d.
func (a *Attachment) endsWithin(ctx context.Context, d time.Duration) (bool, error) {
	soon, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	_, err := a.lines.wait(soon)
	if err != nil && soon.Err() != nil {
		return false, context.Cause(ctx)
	}
	return err == nil, err
}

// attached gives the kernel connections, if there are any. Its answer tells
// whether the device is still that of this attachment.
func (a *Attachment) attached(conns ...net.Conn) error {
	if a.host.read(a.index, name(a.index), "backend") != a.backend {
		return ErrNotAttached
	}
	return a.told(a.host.reconfigure(&reconfiguration{index: a.index, backend: a.backend, conns: conns, deadTimeout: a.opt.DeadTimeout}))
}

// told says what the answer to a reconfiguration means.
func (a *Attachment) told(err error) error {
	switch {
	case errors.Is(err, syscall.EINVAL):
		return ErrNotAttached
	case err != nil:
		return fmt.Errorf("%s: %w", a.Path(), err)
	}
	return nil
}

// setAway notes whether the server can be reached, for others. Where that
// cannot be written, the device is no worse off.
func (a *Attachment) setAway(away bool) {
	if a.record.Away == away {
		return
	}
	if err := a.record.update(func(r *Record) { r.Away = away }); err != nil {
		a.opt.Log.Warn("the state of the device is not noted", "device", a.Path(), "err", err)
	}
}
