package connect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Detach takes a device from the kernel, whichever program attached it. It
// flushes it first, and returns when it is free, its partitions are gone, and
// its server, if it is one of this module's, has closed the image.
//
// A device that is mounted or claimed otherwise is left alone, with a
// *BusyError. With force it is detached all the same, after those of its file
// systems have been flushed that are mounted in this mount namespace; what is
// written to them later is lost. A server that
// answers nothing is killed then, if it is one of this module's.
//
// A ctx that is cancelled ends the waiting; a deadline does so only for what comes
// after the flush, which takes as long as it takes.
func Detach(ctx context.Context, path string, force bool) error {
	h, err := newHost()
	if err != nil {
		return err
	}
	index, err := h.index(path)
	if err != nil {
		return err
	}
	if err := h.attached(index); err != nil {
		return fmt.Errorf("%s: %w", h.path(index), err)
	}
	return h.detachAndWait(ctx, index, force)
}

// attached returns ErrNotAttached for a device that is free, as far as that can be seen.
func (h *host) attached(index int) error {
	if h.connected(index) {
		return nil
	}
	if _, err := os.Stat(h.sys); err != nil {
		return fmt.Errorf("whether it is attached cannot be seen: %w", err)
	}
	return ErrNotAttached
}

// hung is how long a server answers nothing before it is not waited for, by
// force.
const hung = 30 * time.Second

func (h *host) detachAndWait(ctx context.Context, index int, force bool) error {
	backend, s := h.backend(index), h.server(index)
	if err := h.detach(ctx, index, backend, force); err != nil {
		s.close()
		return err
	}
	return s.wait(ctx)
}

// detach ends the attachment that a backend names.
func (h *host) detach(ctx context.Context, index int, backend string, force bool) error {
	done := make(chan flushed, 1)
	go func() {
		held, err := h.flush(ctx, index, force)
		done <- flushed{held, err}
	}()
	f, waits := h.awaitFlush(ctx, index, done, force)
	// While the block is held, or waits, it stays the same attachment.
	if !waits && h.backend(index) != backend && (f.err == nil || h.connected(index)) {
		if f.held != nil {
			f.held.Close()
		}
		if h.connected(index) {
			return nil // somebody has detached it, and attached something else
		}
		return h.awaitFree(ctx, index)
	}
	if f.err != nil {
		return f.err
	}
	if waits {
		if err := h.endServer(ctx, index); err != nil {
			return err
		}
	}
	err := h.disconnect(index)
	if waits && err == nil {
		f = <-done // which fails now
	}
	if f.held != nil {
		f.held.Close()
	}
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%s: detaching needs root, and a container needs CAP_SYS_ADMIN on the host itself: %w", h.path(index), err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", h.path(index), err)
	}
	return h.awaitFree(ctx, index)
}

// endServer kills a server that hangs, if it is one of this module's. The kernel
// may be waiting to send it more, and until that ends would keep whoever
// disconnects the device, and with him all who use generic netlink.
func (h *host) endServer(ctx context.Context, index int) error {
	s := h.server(index)
	defer s.close()
	if !s.known() || s.Direct {
		return nil
	}
	p, err := os.FindProcess(s.PID)
	if err != nil {
		return err
	}
	defer p.Release()
	why := errors.New("another process has its lock: one that takes the device over, or a server in a container, to be killed there")
	if s.alive() && h.hasOpen(s.PID, s.f) { // so that p, which keeps its number, is the server
		if err := h.kill(p); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("process %d does not answer: %w", s.PID, err)
		}
		why = errors.New("it was killed, and has not ended: its medium does not answer")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, hung, why)
	defer cancel()
	if err := lock(ctx, s.f, syscall.LOCK_SH); err != nil {
		return fmt.Errorf("%s stays attached, process %d does not answer: %w", h.path(index), s.PID, err)
	}
	return nil
}

// flushed is the outcome of a flush.
type flushed struct {
	held block
	err  error
}

// flush claims a device and writes back what is cached of it. While the block is
// held nobody can mount the device.
func (h *host) flush(ctx context.Context, index int, force bool) (block, error) {
	abandoned := h.abandoned(index, force)
	held, err := h.claim(ctx, index)
	if _, busy := errors.AsType[*BusyError](err); busy && force {
		if !abandoned {
			h.syncMounts(index)
		}
		held, err = h.open(h.path(index), false)
	}
	if err != nil || abandoned || !h.connected(index) { // others have detached it, who had it claimed
		return held, err
	}
	// Each partition has a page cache of its own.
	if err := h.syncAll(index, held); err != nil && !force {
		held.Close()
		return nil, err
	}
	return held, nil
}

// awaitFlush waits for a flush, by force only as long as requests are answered.
func (h *host) awaitFlush(ctx context.Context, index int, done <-chan flushed, force bool) (f flushed, waits bool) {
	stop := ctx.Done()
	for answered := h.answered(index); ; {
		var late <-chan time.Time
		if force {
			late = time.After(hung)
		}
		select {
		case f := <-done:
			return f, false
		case <-late:
		case <-stop:
			if errors.Is(ctx.Err(), context.DeadlineExceeded) { // it takes as long as it takes
				stop = nil
				continue
			}
			go func() { // which goes on until somebody answers
				if f := <-done; f.held != nil {
					f.held.Close()
				}
			}()
			return flushed{err: fmt.Errorf("%s stays attached, it is not flushed yet: %w", h.path(index), context.Cause(ctx))}, false
		}
		now := h.answered(index)
		if now == answered {
			return flushed{}, true
		}
		answered = now
	}
}

// abandoned reports whether there is nobody who could take what is flushed. By
// force, nobody waits for a server that may come back.
func (h *host) abandoned(index int, force bool) bool {
	s := h.server(index)
	defer s.close()
	return s.dead() || force && s.Away
}

// claim opens the device so that nobody else can use it but by opening it.
func (h *host) claim(ctx context.Context, index int) (block, error) {
	for end := time.Now().Add(2 * time.Second); ; {
		b, err := h.open(h.path(index), true)
		if !errors.Is(err, syscall.EBUSY) {
			return b, err
		}
		// Programs that make partitions or file systems claim it for a moment.
		holders := h.holders(index)
		if len(holders) > 0 || time.Now().After(end) {
			return nil, &BusyError{h.path(index), holders}
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// syncMounts flushes the file systems of a device that are mounted where this
// process sees them: the same names elsewhere may lead to anything. Where that
// fails, they will say so themselves when they find their device gone.
func (h *host) syncMounts(index int) {
	for _, x := range h.mountsHere(h.nodes(index)) {
		_ = h.syncFS(x.Name)
	}
}

func (h *host) syncAll(index int, whole block) error {
	for _, p := range h.partitions(index) {
		path := filepath.Join(h.dev, p)
		b, err := h.open(path, false)
		if err != nil {
			return err
		}
		err = b.sync()
		b.Close()
		if err != nil {
			return fmt.Errorf("%s: flush: %w", path, err)
		}
	}
	if err := whole.sync(); err != nil {
		return fmt.Errorf("%s: flush: %w", h.path(index), err)
	}
	return nil
}

// awaitFree waits until the device can be attached again, and nothing is left
// of its partitions.
func (h *host) awaitFree(ctx context.Context, index int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for h.connected(index) || h.size(index) > 0 {
		if sleep(ctx, 5*time.Millisecond) != nil {
			users := append(h.holders(index), h.openers(index)...)
			return fmt.Errorf("%s is detached, but stays until all have closed it: %w", h.path(index), &BusyError{h.path(index), users})
		}
	}
	for len(h.partitions(index)) > 0 {
		if h.connected(index) {
			return nil // somebody has attached something else
		}
		if err := h.rescan(ctx, index); err != nil {
			return err
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("%s is detached, but %s stays: %w", h.path(index), h.partitions(index)[0], err)
		}
	}
	return nil
}
