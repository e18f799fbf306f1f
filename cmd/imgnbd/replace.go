package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
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
	if s.opt.temporary { // to close the overlay would be its end
		s.u.warning(fmt.Sprintf("process %d asks for a temporary overlay, which ends with its server", successor.PID))
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
		return &departed{errors.Join(fmt.Errorf("%s cannot be handed over: %w", a.Path(), err), successor.Close())}
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
	if err := os.Chdir(s.home); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Chdir("/")) }()
	s.opt.contexts = nil // of the image that was closed
	if s.opt.connect.origin, err = newOrigin(s.file, nil); err != nil {
		return err
	}
	if s.device, err = s.opt.open(context.Background(), s.u, s.file); err != nil {
		return err
	}
	e, err := s.newImageServer()
	if err != nil {
		return err
	}
	if err := a.Keep(s.opt.connect.origin.identity(s.opt, e)); err != nil {
		return err
	}
	if err := s.resume(conns, e); err != nil {
		return err
	}
	if err := s.lockPID(); err != nil {
		s.u.warning(err.Error())
	}
	notify(fmt.Sprintf("READY=1\nMAINPID=%d", os.Getpid()))
	return nil
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
