package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
)

// serveCommand is the bare command. args are needed to start it again as a
// daemon.
func serveCommand(args []string) *command {
	o := newServeOptions()
	return &command{flags: o.flags, run: func(u *ui, operands []string) error { return o.run(u, operands, args) }}
}

// run checks and acts in the order that qemu-nbd does, so that of several
// mistakes the same one is named.
func (o *serveOptions) run(u *ui, operands, args []string) error {
	d := asDaemon()
	if d != nil {
		setProcessName(u.name)
	}
	if err := o.check(operands); err != nil {
		return err
	}
	passed, err := activated()
	if err == nil && passed > 0 {
		err = o.checkActivation(u, passed)
	}
	if err != nil {
		return err
	}
	r, err := o.findRemote(u, operands)
	if err != nil {
		return err
	}
	if o.connect.device != "" && o.tls.creds != "" && r == nil {
		return says("TLS is not supported with a host device")
	}
	if err := o.tls.check(o.objects, o.list || r != nil); err != nil {
		return err
	}
	if o.selinuxLabel != "" && o.socket == "" {
		return says("--selinux-label is not permitted without --socket")
	}
	if o.list {
		return o.listExports(u)
	}
	if o.connect.disconnect {
		return o.disconnectDevice(u, operands[0])
	}
	var listen *os.File
	if passed > 0 {
		listen = os.NewFile(firstActivated, "activation")
	}
	if d != nil {
		listen = d.listen
	} else if o.fork || o.connect.device != "" && !o.verbose {
		err := startDaemon(context.Background(), u, args, listen, o.verbose)
		if err == errTalkative && o.connect.device != "" && !u.compat() {
			return nil // the device is there
		}
		return err
	}
	s := &service{opt: o, u: u, daemon: d}
	if r != nil {
		return s.runRemote(r)
	}
	s.file = operands[0]
	if o.connect.device != "" {
		return s.runConnected()
	}
	return s.run(listen)
}

// check refuses options that contradict each other.
func (o *serveOptions) check(operands []string) error {
	if o.list {
		if len(operands) > 0 {
			return says("List mode is incompatible with a file name")
		}
		for _, name := range []string{"export-name", "description", "offset", "connect", "disconnect", "format", "load-snapshot",
			"bitmap", "allocation-depth", "aio", "discard", "cache", "nocache"} {
			if o.flags.Changed(name) {
				return says("List mode is incompatible with per-device settings")
			}
		}
		if o.fork {
			return says("List mode is incompatible with forking")
		}
	} else if tab := o.connect.device != "" && o.connect.device != connect.Auto && len(operands) == 0; len(operands) != 1 && !tab {
		return &usage{text: "Invalid number of arguments"}
	}
	for _, pair := range [][2]string{
		{"stdio", "socket"}, {"stdio", "port"}, {"stdio", "bind"}, {"stdio", "vsock"}, {"stdio", "fork"},
		{"stdio", "run"}, {"stdio", "list"}, {"run", "fork"}, {"run", "list"}, {"vsock", "socket"},
		{"vsock", "bind"}, {"vsock", "list"}, {"partition", "offset"}, {"partition", "list"}, {"partition", "disconnect"},
	} {
		if o.flags.Changed(pair[0]) && o.flags.Changed(pair[1]) {
			return fmt.Errorf("--%s and --%s exclude each other", pair[0], pair[1])
		}
	}
	if err := o.connect.check(o); err != nil {
		return err
	}
	return o.confinement.check(o)
}

// open opens the image and wraps it in what the options ask for.
func (o *serveOptions) open(ctx context.Context, u *ui, file string) (image.Device, error) {
	t, err := o.images.target(file, o.flags.Changed("format"), nbdWords)
	if err != nil {
		return nil, err
	}
	if o.nativeAIO && !o.cache.direct {
		return nil, t.failed(says("aio=native was specified, but it requires cache.direct=on, which was not specified."))
	}
	t.opt.ReadOnly = o.readOnly || o.snapshot != nil || o.temporary
	if t.opt.Direct = o.cache.direct; t.opt.Direct {
		waitInKernel()
	}
	t.opt.Unmap = o.discard
	chain := o.images.chain(u)
	chain.Journals = o.journal.journals(u, o.fork)
	if !o.fork && !u.compat() {
		chain.Notice = u.warning
	}
	if o.connect.origin != nil {
		o.connect.origin.watch(chain)
	}
	dev, err := t.open(ctx, chain)
	if err != nil {
		switch {
		case o.images.imageOpts:
		case errors.Is(err, fs.ErrNotExist) && !u.compat() && likeCommand(file):
			err = hinted(err, "imgnbd help lists what else this program does")
		case remoteURI.MatchString(file):
			err = hinted(err, "the export of a server is not served again; -c makes it a block device of this machine")
		}
		return nil, err
	}
	if dev.Info().ReadOnly && !t.opt.ReadOnly {
		return nil, errors.Join(t.failed(hinted(says("Block node is read-only"), "use --read-only")), dev.Close())
	}
	if o.snapshot != nil {
		if dev, err = o.openSnapshot(dev); err != nil {
			return nil, err
		}
	}
	if o.bitmaps != nil && o.contexts == nil {
		if o.contexts, err = bitmapContexts(dev, o.bitmaps); err != nil {
			return nil, errors.Join(err, dev.Close())
		}
	}
	if o.temporary && !o.readOnly && o.snapshot == nil {
		if dev, err = overlay(ctx, dev); err != nil {
			return nil, t.failed(fmt.Errorf("temporary overlay: %w", err))
		}
	}
	return o.wrap(dev), nil
}

// waitInKernel prepares for threads that wait for a medium, as all do that read
// past the page cache. Such a thread keeps its turn until the runtime notices,
// some ten microseconds or more; so there are more turns than processors.
func waitInKernel() {
	const turns = 8 // measured: a quarter to a half more than with two
	if runtime.GOMAXPROCS(0) < turns {
		runtime.GOMAXPROCS(turns)
	}
}

// wrap makes dev behave as the options ask.
func (o *serveOptions) wrap(dev image.Device) image.Device {
	if o.readOnly || dev.Info().ReadOnly {
		return dev
	}
	if !o.discard {
		dev = image.IgnoreDiscard(dev)
	}
	if o.detectZeroes {
		dev = image.DetectZeroes(dev, o.unmapZeroes)
	}
	switch {
	case o.cache.writeThrough:
		dev = image.WriteThrough(dev)
	case o.cache.noFlush:
		dev = image.Unsafe(dev)
	}
	return dev
}

// openSnapshot opens an internal snapshot of dev, which it replaces.
func (o *serveOptions) openSnapshot(dev image.Device) (image.Device, error) {
	failed := func(err error) (image.Device, error) {
		return nil, errors.Join(says("Failed to load snapshot: %v", err), dev.Close())
	}
	s, ok := image.As[image.Snapshotter](dev)
	if !ok {
		return failed(says("Block format '%s' used by device '' does not support temporarily loading internal snapshots", dev.Info().Format))
	}
	snap, err := s.OpenSnapshot(*o.snapshot)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return failed(says("Can't find snapshot"))
	case err != nil:
		return failed(err)
	}
	if err := dev.Close(); err != nil { // the snapshot keeps the image open
		return nil, errors.Join(err, snap.Close())
	}
	return snap, nil
}

// export says how dev is shown, or the part of it that was asked for.
func (o *serveOptions) export(file string, dev image.Device) (*export.Export, error) {
	info := dev.Info()
	if o.offset > info.Size {
		return nil, says("Offset (%d) cannot be greater than size of the containing file (%d)", o.offset, info.Size)
	}
	off, length, err := findPartition(file, dev, o.partition)
	if err != nil {
		return nil, err
	}
	return &export.Export{
		Name:            o.exportName,
		Description:     o.description,
		Device:          dev,
		Offset:          o.offset + off,
		Length:          length,
		ReadOnly:        o.readOnly || info.ReadOnly,
		MultiConn:       o.shared != 1,
		AllocationDepth: o.depth,
		Contexts:        o.contexts,
	}, nil
}

// sparingly has the collector come earlier than usual: requests make next to no
// garbage, so what it costs is small, and most of the heap is what connections
// left that have come and gone. Who sets GOGC decides for himself.
func sparingly() {
	if _, set := os.LookupEnv("GOGC"); !set {
		debug.SetGCPercent(50)
	}
}

// newServer shows e, and nothing else, to clients.
func (o *serveOptions) newServer(u *ui, e *export.Export, v *visitors) *export.Server {
	sparingly()
	s := &export.Server{
		Authorize: func(_ context.Context, c *export.Client) error {
			if err := o.access.check(c); err != nil {
				return err
			}
			return o.tls.authorize(c)
		},
		TLSMode: tlsModes[o.tls.mode],
		Open: func(_ context.Context, _ *export.Client, name string) (*export.Export, error) {
			if name != e.Name {
				return nil, fs.ErrNotExist
			}
			return e, nil
		},
		List: func(context.Context, *export.Client) ([]export.Info, error) {
			return []export.Info{{Name: e.Name, Description: e.Description}}, nil
		},
		ConnState:  v.state,
		MaxClients: o.shared,
		Limits:     export.Limits{Handshake: o.handshake, Memory: o.memory},
		Log:        u.logger(o.verbose),
	}
	if o.tls.found != nil {
		s.TLS = o.tls.found.config()
	}
	return s
}
