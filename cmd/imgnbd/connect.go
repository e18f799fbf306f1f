package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
)

// connectOptions are those of --connect and --disconnect.
type connectOptions struct {
	device      string // that the image becomes; "": none
	disconnect  bool
	connections int
	blockSize   int // logical, bytes; 0: the least that is possible
	maxPart     int // negative: the module's default
	timeout     time.Duration
	deadTimeout time.Duration
	swap        bool
	force       bool
	replace     bool // a server that lives

	origin *origin // of the image, for whoever takes over its device; nil without one
}

// check refuses what contradicts --connect or --disconnect.
func (c *connectOptions) check(o *serveOptions) error {
	name := "connect"
	switch {
	case c.device != "" && c.disconnect:
		return errors.New("--connect and --disconnect exclude each other")
	case c.disconnect:
		name = "disconnect"
	case c.device == "":
		for _, only := range []string{"connections", "block-size", "max-part", "timeout", "dead-timeout", "replace", "swap"} {
			if o.flags.Changed(only) {
				return fmt.Errorf("--%s goes with --connect", only)
			}
		}
		if c.force {
			return errors.New("--force goes with --disconnect")
		}
		return nil
	}
	for _, other := range []string{"socket", "port", "bind", "vsock", "stdio", "run", "selinux-label"} {
		if o.flags.Changed(other) {
			return fmt.Errorf("--%s and --%s exclude each other: a device is attached without a socket", name, other)
		}
	}
	return nil
}

// runConnected is the bare command with --connect: the server of a device of
// this machine. The image is closed when nothing more can come from the
// kernel, and only then is whoever waits for that told.
func (s *service) runConnected() (err error) {
	defer s.catchSignals()()
	if err := s.protect(); err != nil { // not all of it is allowed everywhere
		s.u.logger(s.opt.verbose).Debug("not protected from a shortage of memory", "err", err)
	}
	ctx, done := s.untilSignal()
	pred, err := s.findPredecessor(ctx)
	if sig := done(); sig != nil && err == nil {
		s.signalLater(sig)
	}
	if err != nil {
		return err
	}
	if pred != nil {
		defer pred.Close() // of no effect if the device is ours
	}
	if err := s.startGuardian(); err != nil {
		return err
	}
	defer s.closeGuardian()
	a, err := s.begin(pred)
	if a == nil || err != nil {
		return err
	}
	err = s.serveDevice(a, pred != nil)
	if gone, ok := errors.AsType[*departed](err); ok {
		return gone.err
	}
	err = errors.Join(err, s.shutdown(), s.closeDevice())
	if s.abandoned {
		return err // that it is closed would be a lie
	}
	return errors.Join(err, a.Close(), s.awaitDetacher())
}

// begin opens the image and connects it to the kernel. nil without an error: a
// signal came first.
func (s *service) begin(pred *connect.Predecessor) (_ *connect.Attachment, err error) {
	if pred != nil && !pred.Lives() {
		s.watchSyncs(pred.Spoil) // to open the image may need one
	}
	s.device, err = unlessSignalled(s.signals, func(ctx context.Context) (image.Device, error) {
		return s.opt.open(ctx, s.u, s.file)
	})
	if pred != nil && err != nil {
		return nil, s.notTaken(pred, err)
	}
	if s.device == nil || err != nil {
		return nil, err
	}
	taken := false
	defer func() {
		// What waits for another server needs its journal: what this process
		// has not closed is as after its death.
		waits := pred != nil && (taken || !pred.Lives())
		if err != nil && !waits {
			err = errors.Join(err, s.closeDevice())
		}
	}()
	e, err := s.newImageServer()
	if err != nil {
		return nil, err
	}
	settled := s.visitors.expect()
	defer settled()
	a, err := s.attachImage(pred, e)
	if err == nil {
		taken = pred != nil
		err = s.resume(a.Handed(), e)
	}
	if err != nil {
		return nil, errors.Join(err, s.shutdown())
	}
	return a, nil
}

// syncFailed is why nobody can have a device any more once a sync of its image has
// failed: what the kernel drops then, and was answered, nobody else can know.
const syncFailed = "a sync of its image has failed"

// watchSyncs has the device know when one fails, before those who flush do.
func (s *service) watchSyncs(spoil func(why string) error) {
	s.opt.connect.origin.follow(func() {
		if err := spoil(syncFailed); err != nil {
			s.u.message(err.Error())
		}
	})
}

// newImageServer makes a server of the image that is open.
func (s *service) newImageServer() (*export.Export, error) {
	e, err := s.opt.export(s.file, s.device)
	if err != nil {
		return nil, err
	}
	e.MultiConn = s.opt.connect.connections > 1
	s.visitors = newVisitors()
	s.server = s.opt.newServer(s.u, e, s.visitors)
	s.server.Authorize = nil // the only client is ourselves
	s.over = s.visitors.over
	return e, nil
}

// protect is protectServer where the process is this program's.
func (s *service) protect() error {
	if !s.u.alone {
		return nil
	}
	return protectServer()
}

// startGuardian is startGuardian where the process is this program's.
func (s *service) startGuardian() (err error) {
	if s.u.alone {
		s.guardian, err = startGuardian(s.u)
	}
	return err
}

func (s *service) closeGuardian() {
	if s.guardian != nil {
		s.guardian.Close()
	}
}

// attachImage gives the kernel its connections, each to a server that is here,
// for a new device or for one that waits.
func (s *service) attachImage(pred *connect.Predecessor, e *export.Export) (*connect.Attachment, error) {
	return s.attach(pred, connect.Options{
		Export:    e.Name,
		Image:     s.opt.connect.origin.name,
		Partition: s.opt.partition,
		Identity:  s.opt.connect.origin.identity(s.opt, e),
		Follow:    s.watchSyncs,
		Dial: func(context.Context) (net.Conn, error) {
			ours, theirs, err := connect.SocketPair()
			if err != nil {
				return nil, err
			}
			go s.server.ServeConn(ours) // which logs what goes wrong
			return theirs, nil
		},
	})
}

// attach adds to opt what the command line says of the device. A signal ends
// the waiting. If it comes too late for that, it is one to the server of the device.
func (s *service) attach(pred *connect.Predecessor, opt connect.Options) (a *connect.Attachment, err error) {
	ctx, done := s.untilSignal()
	defer func() {
		if sig := done(); sig != nil && err == nil {
			s.signalLater(sig)
		}
	}()
	c := &s.opt.connect
	opt.Device, opt.Connections, opt.MaxPart = c.device, c.connections, c.maxPart
	opt.ReadOnly, opt.BlockSize = s.opt.readOnly, c.blockSize
	opt.Timeout, opt.DeadTimeout = c.timeout, c.deadTimeout
	opt.Log = s.u.logger(s.opt.verbose)
	if s.guardian != nil {
		opt.Guard = s.guardian.watch
	}
	if pred != nil {
		// What can fail does so before the device is ours. A server that lives
		// has the lock until then.
		if err := s.openPID(); err != nil {
			return nil, err
		}
		take := pred.TakeOver
		if opt.Server != "" {
			take = pred.Adopt
		}
		a, err = take(ctx, opt)
		return a, differs(err)
	}
	a, err = connect.Attach(ctx, opt)
	if errors.Is(err, connect.ErrUnavailable) {
		err = hinted(err, "serve with --socket=PATH, which needs no device; a container can use devices only where its host has nbd")
	}
	return a, err
}

// serveDevice tells everyone that the device is there, and returns when it no
// longer is. With a *departed it is there, without this process. One that was
// taken over may be in use: it is served whoever can be told.
func (s *service) serveDevice(a *connect.Attachment, taken bool) error {
	defer s.closePID()
	tolerate := func(err error) error {
		if err != nil && taken {
			s.u.warning(err.Error())
			return nil
		}
		return err
	}
	if err := s.announceDevice(a, tolerate); err != nil {
		e := s.detach(a)
		if gone, ok := errors.AsType[*departed](e); ok {
			return &departed{errors.Join(err, gone.err)}
		}
		return errors.Join(err, e)
	}
	for {
		select {
		case <-s.over: // somebody has detached it
			return nil
		case successor := <-a.Successors():
			if err := s.handOver(a, successor); err != nil {
				return err
			}
		case <-s.signals:
			notify("STOPPING=1")
			return s.detach(a)
		}
	}
}

// announceDevice is announce for a device. What fails ends it only if that is
// still an error when tolerate has seen it.
func (s *service) announceDevice(a *connect.Attachment, tolerate func(error) error) error {
	if err := tolerate(s.lockPID()); err != nil {
		return err
	}
	if s.opt.verbose {
		s.u.bare("NBD device " + a.Path() + " is now connected to " + s.file)
	}
	if err := tolerate(s.leaveHome()); err != nil {
		return err
	}
	var result string
	switch {
	case s.report != nil:
		result = s.report(a)
	case s.opt.connect.device == connect.Auto:
		result = a.Path() + "\n"
	}
	notify(fmt.Sprintf("READY=1\nMAINPID=%d\nSTATUS=%s is %s", os.Getpid(), s.file, a.Path()))
	if s.daemon != nil {
		return tolerate(s.daemon.readyWith(result))
	}
	s.u.printf("%s", result)
	return nil
}

// leaveHome keeps no file system busy.
func (s *service) leaveHome() (err error) {
	if s.home, err = os.Getwd(); err != nil {
		return err
	}
	return os.Chdir("/")
}
