package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
)

// drainTime is how long clients have to take the replies to what they had
// asked for when the server was told to stop.
const drainTime = 10 * time.Second

// closeTime is how long an image that is told to hurry has to be closed.
const closeTime = 3 * time.Second

// A service is the bare command while it runs.
type service struct {
	opt    *serveOptions
	u      *ui
	file   string
	daemon *daemon // nil in the foreground

	signals   chan os.Signal // that ask for the end
	asked     chan os.Signal // that ask what limits were reached
	place     *place
	only      net.Conn // of --stdio, nil without
	device    image.Device
	server    *export.Server
	visitors  *visitors
	over      <-chan struct{}                  // closed when a device is nobody's; of --connect
	report    func(*connect.Attachment) string // what is printed when it is there; nil: as usual
	pid       *pidFile                         // nil if there is none
	guardian  *guardian                        // of the device; nil: it has none
	home      string                           // the directory that names are relative to
	command   *exec.Cmd                        // of --run, nil if there is none
	stalled   bool                             // clients were cut off whose requests have not ended
	hurried   atomic.Bool                      // a second signal has come
	abandoned bool                             // the image was not closed, since it does not answer
	detacher  <-chan error                     // the end of a process that detaches the device; nil without
	ended     chan error
}

// run serves until it is told to stop, or nobody is left to serve. The socket
// is there before the image is opened, and clients wait in it.
func (s *service) run(passed *os.File) (err error) {
	defer s.catchSignals()()
	if err := s.listen(passed); err != nil {
		return err
	}
	defer s.place.close()
	s.place.uri.TLS = s.opt.tls.found != nil
	s.device, err = unlessSignalled(s.signals, func(ctx context.Context) (image.Device, error) {
		return s.opt.open(ctx, s.u, s.file)
	})
	if s.device == nil || err != nil {
		return err
	}
	defer func() {
		if e := s.closeDevice(); err == nil {
			err = e
		}
	}()
	e, err := s.opt.export(s.file, s.device)
	if err != nil {
		return err
	}
	s.visitors = newVisitors()
	s.server = s.opt.newServer(s.u, e, s.visitors)
	defer s.closePID()
	if err := s.announce(); err != nil {
		return err
	}
	return s.serve()
}

// catchSignals makes signals end the service in good order, from now on: also
// while the image is being opened. It returns what undoes that.
func (s *service) catchSignals() (undo func()) {
	s.signals = make(chan os.Signal, 2)
	signal.Notify(s.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	ignored := make(chan os.Signal, 1) // they do nothing to qemu-nbd either
	signal.Notify(ignored, syscall.SIGPIPE, syscall.SIGUSR1)
	s.asked = make(chan os.Signal, 1)
	if !s.u.compat() {
		signal.Notify(s.asked, syscall.SIGUSR1)
	}
	return func() {
		signal.Stop(s.signals)
		signal.Stop(s.asked)
		signal.Stop(ignored)
	}
}

// untilSignal returns a context that a signal ends. done is called when nobody needs
// it any more, and returns that signal, nil if none came.
func (s *service) untilSignal() (_ context.Context, done func() os.Signal) {
	ctx, cancel := context.WithCancelCause(context.Background())
	over, came := make(chan struct{}), make(chan os.Signal, 1)
	go func() {
		defer close(came)
		select {
		case sig := <-s.signals:
			cancel(fmt.Errorf("ended by a signal: %v", sig))
			came <- sig
		case <-over:
		}
	}()
	return ctx, func() os.Signal {
		defer cancel(nil)
		close(over)
		return <-came
	}
}

// signalLater puts back a signal that comes too early to be followed.
func (s *service) signalLater(sig os.Signal) {
	select {
	case s.signals <- sig:
	default: // there are others
	}
}

func (s *service) listen(passed *os.File) (err error) {
	switch {
	case passed != nil:
		s.place, err = listenOn(passed)
	case s.opt.stdio:
		s.place = &place{}
		s.only, err = stdioConn(s.u)
	default:
		s.place, err = s.opt.listen(context.Background())
	}
	return err
}

// unlessSignalled opens an image unless a signal comes first; then both results
// are nil. Opening may wait for a slow medium, and cannot be interrupted there.
func unlessSignalled(signals <-chan os.Signal, open func(context.Context) (image.Device, error)) (image.Device, error) {
	type opened struct {
		device image.Device
		err    error
	}
	done := make(chan opened, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		device, err := open(ctx)
		done <- opened{device, err}
	}()
	select {
	case r := <-done:
		return r.device, r.err
	case <-signals:
		return nil, nil
	}
}

// announce tells everyone who waits that clients can be served.
func (s *service) announce() (err error) {
	if err := s.lockPID(); err != nil {
		return err
	}
	if s.opt.verbose && !s.opt.stdio {
		uri := s.place.uri
		uri.Export = s.opt.exportName
		s.u.message("serving " + s.file + " at " + uri.String())
	}
	if s.opt.runCommand != "" {
		s.ended = make(chan error, 1)
		if s.command, err = s.opt.startCommand(s.u, s.place); err != nil {
			return err
		}
		go func() { s.ended <- s.command.Wait() }()
	}
	if err := s.confine(); err != nil {
		return errors.Join(err, s.killCommand())
	}
	if s.command == nil {
		if err := os.Chdir("/"); err != nil { // keep no file system busy
			return err
		}
	}
	if s.daemon != nil {
		return s.daemon.ready()
	}
	return nil
}

// killCommand ends a command that nobody will serve.
func (s *service) killCommand() error {
	if s.command == nil {
		return nil
	}
	err := s.command.Process.Kill()
	<-s.ended
	return err
}

// serve accepts clients until something ends that, and then lets those that
// are there finish.
func (s *service) serve() error {
	failed := make(chan error, len(s.place.listeners)+1)
	var serving sync.WaitGroup
	for _, l := range s.place.listeners {
		serving.Go(func() {
			if err := s.server.Serve(l); !errors.Is(err, export.ErrServerClosed) {
				failed <- err
			}
		})
	}
	if s.only != nil {
		serving.Go(func() { failed <- s.server.ServeConn(s.only) })
	}
	err := s.wait(failed)
	if e := s.shutdown(); err == nil {
		err = e
	}
	select {
	case <-s.asked: // shortly before the end
		s.tellLimits()
	default:
		if s.opt.verbose && len(s.server.Reached()) > 0 {
			s.tellLimits()
		}
	}
	if !s.stalled {
		serving.Wait()
	}
	return err
}

// wait returns when the service is to end. With --run that is when the command
// ends, which is told of signals; a second one does not wait for it.
func (s *service) wait(failed <-chan error) error {
	over := s.visitors.over
	if s.opt.persistent || s.command != nil {
		over = nil
	}
	for waiting := true; waiting; {
		select {
		case <-s.signals:
			waiting = false
		case <-over:
			waiting = false
		case <-s.asked:
			s.tellLimits()
		case err := <-s.ended:
			return exitOf(err)
		case err := <-failed:
			return err
		}
	}
	if s.command == nil {
		return nil
	}
	s.command.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-s.ended:
		return exitOf(err)
	case <-s.signals:
		return &exit{code: 1}
	}
}

// tellLimits says how often clients have reached which limit.
func (s *service) tellLimits() {
	text := "limits reached: none"
	for i, c := range s.server.Reached() {
		if i == 0 {
			text = "limits reached:"
		}
		text += fmt.Sprintf("\n%8d  %s", c.N, c.What)
	}
	s.u.message(text)
}

// shutdown finishes what clients have asked for, and flushes it. Clients who
// do not take their replies are cut off after a while, or by a signal; that is
// no failure.
func (s *service) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	go func() {
		select {
		case <-s.signals:
			s.hurried.Store(true)
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.server.Shutdown(ctx)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		s.stalled = true
		return nil
	}
	return err
}

// closeDevice closes the image, which waits for what was asked of it. A medium
// that does not answer would make that take for ever: who has sent a second
// signal waits no longer than closeTime.
func (s *service) closeDevice() error {
	closed := make(chan error, 1)
	go func() { closed <- s.device.Close() }()
	var late <-chan time.Time
	for {
		if s.hurried.Load() && late == nil {
			late = time.After(closeTime)
		}
		select {
		case err := <-closed:
			return err
		case <-s.signals:
			s.hurried.Store(true)
		case <-late:
			s.abandoned = true
			return &exit{1, fmt.Errorf("%s does not answer: given up without closing it", s.file)}
		}
	}
}

// visitors counts clients, to know when the last has left.
type visitors struct {
	over chan struct{} // closed when nobody is left and somebody was served

	mu     sync.Mutex
	here   int
	served bool // a client has agreed on an export
	closed bool
}

func newVisitors() *visitors { return &visitors{over: make(chan struct{})} }

// expect keeps it from being over until settled is called: meanwhile visitors
// may come and go.
func (v *visitors) expect() (settled func()) {
	v.state(nil, export.StateNew)
	return func() { v.state(nil, export.StateClosed) }
}

func (v *visitors) state(_ *export.Client, s export.State) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch s {
	case export.StateNew:
		v.here++
	case export.StateActive:
		v.served = true
	case export.StateClosed:
		v.here--
	}
	if v.here == 0 && v.served && !v.closed {
		v.closed = true
		close(v.over)
	}
}
