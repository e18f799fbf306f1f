package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
)

// A departed is the end of serving a device that stays: another process has
// it, or is to take it over.
type departed struct{ err error } // nil: it was handed over

func (e *departed) Error() string { return fmt.Sprintf("the device stays: %v", e.err) }

func (e *departed) Unwrap() error { return e.err }

// handOver gives the device to a process that asks for it. Everything is
// finished and flushed, and the image closed, before that opens it. If it fails
// with that, this process goes on. What cannot be undone is a *departed.
func (s *service) handOver(a *connect.Attachment, successor *connect.Successor) error {
	why := ""
	switch {
	case s.opt.temporary: // to close the overlay would be its end
		why = "a temporary overlay, which ends with its server"
	case s.opt.connect.origin.isLost(): // to open the image again would be to forget it
		why = a.Path() + ", which nobody can have any more: " + syncFailed
	}
	if why != "" {
		s.u.warning(fmt.Sprintf("process %d asks for %s", successor.PID, why))
		if err := successor.Close(); err != nil {
			s.u.warning(err.Error())
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), detachTime) // the medium may be slow
	defer cancel()
	conns, err := s.server.HandOver(ctx)
	locks, e := s.opt.connect.origin.hold()
	if e != nil {
		s.u.warning(a.Path() + " is handed over without the locks of its image: " + e.Error())
	}
	if err == nil {
		err = s.device.Close()
	}
	if err != nil {
		// The device waits, as after the death of this process.
		return &departed{errors.Join(fmt.Errorf("%s cannot be handed over, and is left without a server: %w", a.Path(), err), successor.Close())}
	}
	var handed []connect.Handed
	for _, c := range conns {
		handed = append(handed, connect.Handed(c))
	}
	taken, err := a.HandOver(successor, handed, locks, func() {
		notify(fmt.Sprintf("MAINPID=%d", successor.PID))
		s.closePID()
	})
	if taken {
		return &departed{err}
	}
	s.u.message(err.Error() + ": this process goes on")
	if err := s.goOn(a, handed); err != nil {
		return &departed{fmt.Errorf("%s waits for a server: %w", a.Path(), err)}
	}
	return nil
}

// goOn serves a device again that nobody has taken.
func (s *service) goOn(a *connect.Attachment, conns []connect.Handed) (err error) {
	notHome := os.Chdir(s.home) // which matters if names are relative to it
	defer func() { err = errors.Join(err, os.Chdir("/")) }()
	s.opt.contexts = nil // of the image that was closed
	if s.device, err = s.reopen(a.Check); err != nil {
		return errors.Join(differs(err), notHome)
	}
	e, err := s.newImageServer()
	if err != nil {
		return errors.Join(err, s.closeDevice())
	}
	settled := s.visitors.expect()
	defer settled()
	if err := a.Keep(context.Background(), s.opt.connect.origin.identity(s.opt, e)); err != nil {
		return errors.Join(differs(err), s.shutdown(), s.closeDevice())
	}
	s.watchSyncs(a.Spoil)
	if err := s.resume(conns, e); err != nil {
		return err
	}
	if err := s.lockPID(); err != nil {
		s.u.warning(err.Error())
	}
	notify(fmt.Sprintf("READY=1\nMAINPID=%d", os.Getpid()))
	return nil
}

// reopen opens the image that was closed for a successor, unless check refuses what
// is there now. A signal is kept for when the device is served, which is what it
// takes to be detached; a second one ends the waiting.
func (s *service) reopen(check checker) (image.Device, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var device image.Device
	opened := make(chan error, 1)
	go func() {
		var err error
		device, err = s.openUnused(ctx, check)
		opened <- err
	}()
	var early os.Signal
	for {
		select {
		case err := <-opened:
			if early != nil {
				s.signalLater(early)
			}
			return device, err
		case sig := <-s.signals:
			if early != nil {
				return nil, fmt.Errorf("%s is not open again yet", s.file)
			}
			early = sig
		}
	}
}

// openUnused opens the image when nobody else has it: a successor may be about to
// end that has not closed it yet.
func (s *service) openUnused(ctx context.Context, check checker) (device image.Device, err error) {
	for told := false; ; {
		if s.opt.connect.origin, err = newOrigin(s.file, nil); err != nil {
			return nil, err
		}
		s.opt.connect.origin.check = check
		said := &heldBack{to: s.u.stderr}
		u := *s.u
		u.stderr = said
		device, err = s.opt.open(ctx, &u, s.file)
		if !errors.Is(err, image.ErrInUse) {
			said.pass()
			return device, err
		}
		if !told {
			s.u.message(err.Error() + ": it is tried again")
			told = true
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// A heldBack keeps what is said while an image is being opened until it is known that
// this is not tried again, which would say the same.
type heldBack struct {
	to io.Writer

	mu     sync.Mutex
	text   bytes.Buffer
	passes bool
}

func (w *heldBack) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.passes {
		return w.to.Write(b)
	}
	return w.text.Write(b)
}

// pass lets through what was said, and all that comes.
func (w *heldBack) pass() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.passes = true
	w.text.WriteTo(w.to)
}

// resume serves connections that another server has left.
func (s *service) resume(conns []connect.Handed, e *export.Export) error {
	for _, c := range conns {
		if err := s.server.Resume(export.Handed(c), e); err != nil {
			return err
		}
	}
	return nil
}
