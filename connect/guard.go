package connect

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// A request that the kernel has sent is looked after by its timer alone. With
// one connection that waits for the answer, however long it takes, and should
// the server die, for another server. Nothing else in the kernel ends the wait:
// somebody has to who outlives the server, its guardian.

// A Ward is a device as its guardian knows it.
type Ward struct {
	Device      string        `json:"device"`
	Backend     string        `json:"backend"`
	PID         int           `json:"pid"` // of the server
	Connections int           `json:"connections"`
	DeadTimeout time.Duration `json:"deadTimeout"`
}

// Release is called when the server has ended, or is about to. If it has left
// the device to wait for another one, which has not come after DeadTimeout, what
// was under way fails, and so does all that comes until there is one. With
// several connections that is not possible: the device is given up if anybody
// uses it, and Release returns when it is gone.
//
// It returns as soon as another server has the device, or nobody. One that nobody
// can take over, since its server had no record yet, is given up at once.
func (w Ward) Release(ctx context.Context) error {
	h, err := newHost()
	if err != nil {
		return err
	}
	return h.release(ctx, w)
}

func (h *host) release(ctx context.Context, w Ward) error {
	index, err := h.index(w.Device)
	if err != nil {
		return err
	}
	for end := time.Now().Add(w.DeadTimeout); ; {
		f, err := h.orphan(ctx, index, w)
		if errors.Is(err, errUnrecorded) {
			if h.backend(index) != w.Backend { // it was attached anew meanwhile, and the record is of that
				return nil
			}
			return h.disconnect(index)
		}
		if f == nil || err != nil {
			return err
		}
		if left := time.Until(end); left > 0 {
			f.Close()
			if err := sleep(ctx, min(left, time.Second)); err != nil {
				return err
			}
			continue
		}
		if w.Connections == 1 {
			err = h.setTimeout(index, w.Backend, overdue, 0)
			f.Close()
			if errors.Is(err, syscall.EINVAL) { // it was detached
				return nil
			}
			return err
		}
		// What is under way cannot be counted: the kernel leaves out flushes.
		used := len(h.holders(index))+len(h.openers(index)) > 0
		if used {
			err = h.disconnect(index)
		}
		f.Close()
		if !used || err != nil {
			return err
		}
		return h.clearAway(ctx, index, w)
	}
}

// errUnrecorded means that the server of a device has ended before it had a record,
// without which nobody can take the device over.
var errUnrecorded = errors.New("it has no record")

// orphan returns the record of a device whose server is gone, with a lock that
// nobody takes for a server's, and that a takeover waits for. nil: another
// server has the device, or nobody.
func (h *host) orphan(ctx context.Context, index int, w Ward) (*os.File, error) {
	for h.backend(index) == w.Backend {
		f, err := os.Open(h.recordPath(index))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, errUnrecorded
		}
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
		r, readErr := readRecord(f)
		here := isAt(f, h.recordPath(index))
		if here && err == nil && readErr == nil && r.Backend == w.Backend && r.PID == w.PID {
			return f, nil
		}
		f.Close()
		switch {
		case !here: // it was that of the server before
		case readErr == nil && r.Backend != w.Backend, err == nil && readErr != nil:
			return nil, errUnrecorded
		case readErr == nil && r.PID != w.PID:
			return nil, nil
		case !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR):
			return nil, err
		}
		// It is about to end, or somebody looks whether he can take it over.
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// clearAway removes what is left of a device that was given up, its record and
// nodes of partitions, once all have closed it.
func (h *host) clearAway(ctx context.Context, index int, w Ward) error {
	for h.backend(index) == w.Backend {
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	f, err := os.Open(h.recordPath(index))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil // it is another server's
	}
	if r, err := readRecord(f); err != nil || r.Backend != w.Backend || !isAt(f, h.recordPath(index)) {
		return err
	}
	return errors.Join(h.awaitFree(ctx, index), removeRecord(h.recordPath(index)))
}

// patient reports whether the kernel waits for an answer for ever.
func (o *Options) patient() bool { return o.Connections <= 1 && o.Timeout == 0 }

// guard tells the guardian of the device, if it can need one.
func (a *Attachment) guard() error {
	through := a.opt.Server == "" || a.relays.used && a.opt.patient()
	if a.opt.Guard == nil || !through {
		return nil
	}
	return a.opt.Guard(Ward{
		Device: a.Path(), Backend: a.backend, PID: os.Getpid(),
		Connections: max(a.opt.Connections, 1), DeadTimeout: a.opt.DeadTimeout,
	})
}

// overdue is the timeout of a device whose requests nobody will answer. The kernel
// gives up the connection, which has ended, and takes back what it has sent by
// it. In io_timeout it is told from what setRequestTimer writes.
const overdue = 2 * time.Second

// endPatience has what is under way fail, and all that comes, until bePatient.
func (a *Attachment) endPatience() error {
	if !a.opt.patient() {
		return nil
	}
	return a.told(a.host.setTimeout(a.index, a.backend, overdue, 0))
}

// bePatient undoes endPatience, or Release, before there is a connection: a
// request that takes long must not cost it. The timer of requests, which only
// looks whether there is another connection, is the kernel's own from then on:
// since Linux 6.12 to write it waits for all that is under way.
func (a *Attachment) bePatient() error {
	if !a.opt.patient() || a.host.read(a.index, name(a.index), "queue/io_timeout") != milliseconds(overdue) {
		return nil
	}
	return a.told(a.host.setTimeout(a.index, a.backend, 0, a.opt.DeadTimeout))
}
