// Package connect makes NBD exports block devices of the Linux kernel:
// /dev/nbdX, with partitions.
//
// It speaks the generic netlink family nbd, and needs CAP_SYS_ADMIN in the
// first user namespace. The kernel is given connections that have been
// negotiated here, and from then on is the client of whoever is at their other
// end.
//
// A process that serves a device of its own machine must never wait for that
// device where its server would wait with it: Attach and Detach open it, so
// the server runs in other goroutines meanwhile. Nor may the process keep its
// log, its program or its swap on the device.
package connect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// Auto is the device that means any free one.
const Auto = "auto"

// Errors of this package, to be found with errors.Is.
var (
	// ErrNotAttached is the error of detaching a device that is free.
	ErrNotAttached = errors.New("not attached")
	// ErrUnavailable means that this kernel, or this container, has no nbd.
	ErrUnavailable = errors.New("no NBD devices here")
)

// Options say what becomes a device, and which.
type Options struct {
	Device string // as /dev/nbd0; Auto takes a free one, without a race

	// Dial connects to a server. It is called once for each connection. The
	// result is a TCP or Unix stream socket; Attach owns it.
	Dial        func(ctx context.Context) (net.Conn, error)
	Export      string // name of the export there
	NoGo        bool   // it is not asked for by option GO
	Connections int    // 0: one. More need an export that tells MULTI_CONN

	// Image and Server say what is attached, for whoever lists the devices: an
	// image that this process serves, or the server that Dial connects to. For
	// a server the Attachment is to be tended.
	Image, Server string
	Partition     int      // of Image, which alone is attached; 0: all of it
	Identity      Identity // of an image

	ReadOnly  bool  // also where the server allows writes
	BlockSize int   // logical, bytes: 512 to 4096, a power of 2; 0: the least that the export allows
	Size      int64 // bytes; 0: that of the export

	// Timeout is how long a request may take until its connection is given up:
	// rounded up to seconds. 0: with one connection, for ever.
	Timeout time.Duration

	// DeadTimeout is how long requests to the device wait when its server has
	// ended, before they fail: rounded up to seconds; 0: not at all.
	DeadTimeout time.Duration

	// Guard is told of the device before anything can be under way that needs
	// this process. Should that end without Close, somebody who outlives it
	// calls Release. nil: what is under way then waits for another server.
	Guard func(Ward) error

	// Follow is told what notes that answered writes may be lost, see
	// [Attachment.Spoil], before the device has a record by which another server
	// could take it over from this one. nil: nobody wants to note that.
	Follow func(spoil func(why string) error)

	Log *slog.Logger // what Attach and Tend have to say; nil: nowhere

	// MaxPart is the parameter max_part of the module nbd, should it have to
	// be loaded; negative: the module's default.
	MaxPart int
}

// An Attachment is a device that Attach has made.
type Attachment struct {
	host    *host
	opt     Options
	index   int
	backend string
	record  *record

	// Of a server's export only: what all its connections have agreed on, what
	// is seen of them, and those that this process has a part in.
	session *nbd.Session
	lines   lines
	relays  relays

	// Of an image only: how others ask for the device, and what this process
	// was handed when it asked itself.
	control    *net.UnixListener
	successors chan *Successor
	handed     []Handed
	replaces   bool // a server that lives, until that has let go
}

// Path returns the name of the device.
func (a *Attachment) Path() string { return a.host.path(a.index) }

// Size returns the size of the device in bytes.
func (a *Attachment) Size() uint64 { return a.host.size(a.index) }

// Seen reports whether this process sees what the kernel says of the device. It
// does not if the root file system was switched under it.
func (a *Attachment) Seen() bool {
	_, err := os.Stat(filepath.Join(a.host.sys, name(a.index)))
	return err == nil
}

// Ours reports whether the device is still that of this Attachment. It is where
// nobody can tell, see Seen.
func (a *Attachment) Ours() bool { return !a.Seen() || a.host.backend(a.index) == a.backend }

// Holders returns who uses the device, as far as that can be seen.
func (a *Attachment) Holders() []Holder { return a.host.holders(a.index) }

// Answered returns what changes when a request to the device is.
func (a *Attachment) Answered() string { return a.host.answered(a.index) }

// Detach flushes the device and takes it from the kernel, as the function
// Detach does. The servers of its connections see an orderly end. If somebody
// else has detached it, there is nothing to do.
func (a *Attachment) Detach(ctx context.Context, force bool) error {
	if !a.Ours() {
		return nil
	}
	return a.host.detach(ctx, a.index, a.backend, force)
}

// Close tells others that the server has finished: Detach in another process
// waits for that. It is called last, when the image is closed. A device whose
// server has left it stays marked as such.
func (a *Attachment) Close() error {
	if a.lines != nil {
		a.lines.close()
	}
	if a.record.Away && a.host.read(a.index, name(a.index), "backend") == a.backend {
		return a.record.f.Close()
	}
	a.relays.wait()
	return errors.Join(a.stopListening(), a.record.close())
}

// Attach connects an export to the kernel. It returns when the device can be
// used: it has its size, and for every partition of its table there is a node. If
// that fails, or ctx ends, while somebody has mounted it already, it is attached all
// the same, which Log is told.
func Attach(ctx context.Context, opt Options) (*Attachment, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.attach(ctx, opt)
}

// patience bounds what is done at once unless something is wrong.
const patience = 10 * time.Second

func (h *host) attach(ctx context.Context, opt Options) (_ *Attachment, err error) {
	index := anyIndex
	if opt.Device != Auto {
		if index, err = h.index(opt.Device); err != nil {
			return nil, err
		}
	}
	a := h.attachment(opt)
	a.backend = newBackend()
	conns, err := a.negotiate(ctx, max(opt.Connections, 1))
	defer func() {
		// The kernel has its own hold on the sockets. With ours they would
		// not end when its does.
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	c, err := opt.config(a.session)
	if err != nil {
		return nil, err
	}
	c.index, c.conns, c.backend = index, conns, a.backend
	if a.index, err = h.connectFresh(ctx, c); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, h.giveBack(a.index, a.backend), a.stopListening())
		if a.record != nil {
			a.record.close()
		}
		if a.lines != nil {
			a.lines.close()
		}
	}()
	// To get the record may take long, and requests are under way already.
	if err := a.guard(); err != nil {
		return nil, err
	}
	if a.record, err = h.newRecord(ctx, a.index, Record{
		Backend: a.backend, PID: os.Getpid(), Image: opt.Image, Partition: opt.Partition, Server: opt.Server, Connections: len(conns),
		Identity: opt.Identity.with(c.properties()), Direct: opt.Server != "" && !a.relays.used,
	}, opt.Follow); err != nil {
		return nil, err
	}
	if opt.Server != "" {
		a.lines, err = h.watch(conns)
	} else {
		err = a.listen()
	}
	if err != nil {
		return nil, err
	}
	if err := h.setRequestTimer(a.index, &opt); err != nil {
		return nil, err
	}
	if err := h.setRotational(a.index, c.flags&uint64(nbd.FlagRotational) != 0); err != nil {
		return nil, err
	}
	if err := h.awaitReady(ctx, a.index, c.size); err != nil {
		// Others know of it already. To detach what they have mounted would cost
		// them what they write.
		holders := a.Holders()
		if !a.Ours() || len(holders) == 0 {
			return nil, err
		}
		a.opt.Log.Warn("in use before it is ready", "device", a.Path(), "by", holders[0].String(), "err", err)
	}
	return a, nil
}

// giveBack disconnects a device, unless somebody else has attached it anew.
func (h *host) giveBack(index int, backend string) error {
	if is := h.backend(index); is != "" && is != backend {
		return nil
	}
	return h.disconnect(index)
}

func (h *host) attachment(opt Options) *Attachment {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return &Attachment{host: h, opt: opt}
}

// negotiate opens the connections and finds what they are connected to. They
// are the caller's to close, also on an error.
func (a *Attachment) negotiate(ctx context.Context, connections int) (conns []net.Conn, err error) {
	export := a.opt.Export
	for range connections {
		if len(conns) == 1 && a.session.Flags&nbd.FlagCanMultiConn == 0 {
			return conns, fmt.Errorf("export '%s' allows one connection, not %d", export, a.opt.Connections)
		}
		conn, s, err := a.open(ctx)
		if err != nil {
			return conns, err
		}
		conns = append(conns, conn)
		if a.session == nil {
			a.session = s
		}
		if !same(a.session, s) {
			return conns, fmt.Errorf("export '%s' changed between two connections: %s; then %s", export, terms(a.session), terms(s))
		}
	}
	return conns, nil
}

// open opens one connection, as it is for the kernel.
func (a *Attachment) open(ctx context.Context) (net.Conn, *nbd.Session, error) {
	conn, err := a.opt.Dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	s, err := nbd.Handshake(ctx, conn, nbd.Options{Export: a.opt.Export, Protocol: nbd.Simple, NoGo: a.opt.NoGo})
	if err != nil {
		conn.Close()
		if a.opt.Server != "" {
			err = fmt.Errorf("%s: %w", a.opt.Server, err)
		}
		return nil, nil, err
	}
	if ours, err := a.relays.socket(conn); err != nil {
		conn.Close()
		return nil, nil, err
	} else {
		return ours, s, nil
	}
}

// same reports whether two connections lead to exports that look the same.
func same(a, b *nbd.Session) bool {
	return a.Size == b.Size && a.Flags == b.Flags && a.BlockSize.Min == b.BlockSize.Min
}

// terms is what same compares.
func terms(s *nbd.Session) string {
	return fmt.Sprintf("%d bytes, flags %#x, blocks of %d", s.Size, uint16(s.Flags), s.BlockSize.Min)
}

// kernelFlags are the transmission flags that a kernel knows.
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagRotational |
	nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn

// Block sizes of devices, in bytes. Larger than a page is not possible.
const (
	sector       = 512
	maxBlockSize = 4096
)

// config is what the kernel is told of an export.
func (o *Options) config(s *nbd.Session) (*config, error) {
	least := max(sector, uint64(s.BlockSize.Min))
	c := &config{
		blockSize:   least,
		flags:       uint64(s.Flags & kernelFlags),
		maxPart:     o.MaxPart,
		timeout:     o.Timeout,
		deadTimeout: o.DeadTimeout,
	}
	if o.BlockSize != 0 {
		c.blockSize = uint64(o.BlockSize)
	}
	if o.ReadOnly {
		c.flags |= uint64(nbd.FlagReadOnly)
	}
	size := s.Size
	if o.Size != 0 {
		size = o.Size
	}
	c.size = uint64(size) &^ (c.blockSize - 1)
	switch {
	case least > maxBlockSize:
		return nil, fmt.Errorf("export '%s' has blocks of %d bytes, a device at most of %d", o.Export, least, maxBlockSize)
	case c.blockSize > maxBlockSize || c.blockSize&(c.blockSize-1) != 0 || c.blockSize < least:
		return nil, fmt.Errorf("blocks of %d bytes: for export '%s' a power of 2 from %d to %d is possible", c.blockSize, o.Export, least, maxBlockSize)
	case size > s.Size:
		return nil, fmt.Errorf("export '%s' has %d bytes, less than %d", o.Export, s.Size, size)
	case c.size == 0:
		return nil, fmt.Errorf("export '%s' has %d bytes, less than a block", o.Export, size)
	}
	return c, nil
}

// connectWhenFree tries again while the device is merely open somewhere, which
// is what udev does when a device has been detached.
func (h *host) connectWhenFree(ctx context.Context, c *config) (int, error) {
	for end := time.Now().Add(patience); ; {
		index, err := h.connectOnceGone(ctx, c)
		if err == nil {
			return index, nil
		}
		if c.index == anyIndex || !errors.Is(err, syscall.EBUSY) {
			return 0, attachError(c, h.path(c.index), err)
		}
		if h.connected(c.index) {
			return 0, &takenError{h.path(c.index), h.describe(c.index)}
		}
		if time.Now().After(end) {
			return 0, &BusyError{h.path(c.index), h.openers(c.index)}
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// A takenError says what is attached to a device.
type takenError struct{ path, what string }

func (e *takenError) Error() string { return e.path + " is in use: " + e.what }

// attachError says what a refusal of the kernel means.
func attachError(c *config, path string, err error) error {
	if c.index == anyIndex {
		path = "a free device"
	}
	switch {
	case errors.Is(err, ErrUnavailable):
		return err
	case errors.Is(err, syscall.EPERM):
		return fmt.Errorf("%s: attaching needs root, and a container needs CAP_SYS_ADMIN on the host itself: %w", path, err)
	case errors.Is(err, syscall.EINVAL) && c.index != anyIndex:
		return fmt.Errorf("%s: the kernel refuses, or has no device of that number: %w", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// setRequestTimer sets how long a request may take until the kernel looks
// after it. With one connection it only looks whether that has been replaced,
// and sends the request again; with several it gives up the one that has not
// answered. That is a loss unless somebody opens another.
func (h *host) setRequestTimer(index int, opt *Options) error {
	timer := time.Second
	switch {
	case opt.Timeout > 0:
		return nil // the kernel has set it
	case opt.Connections > 1 && opt.Server != "":
		timer = 30 * time.Second
	case opt.Connections > 1:
		timer = 5 * time.Minute
	}
	return os.WriteFile(filepath.Join(h.sys, name(index), "queue/io_timeout"),
		[]byte(milliseconds(timer)), 0)
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// awaitReady makes the kernel read the partition table, and waits for what it
// finds there.
func (h *host) awaitReady(ctx context.Context, index int, size uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s is not ready after %v", h.path(index), patience))
	defer cancel()
	if err := h.awaitNodes(ctx, index, name(index)); err != nil {
		return err
	}
	// To open the device reads it, which waits for its server.
	scanned := make(chan error, 1)
	go func() { scanned <- errors.Join(h.endReadOnly(index), h.rescan(ctx, index)) }()
	select {
	case err := <-scanned:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if got := h.size(index); got != size {
		return fmt.Errorf("%s has %d bytes, not %d: somebody else has changed it", h.path(index), got, size)
	}
	return h.awaitNodes(ctx, index, h.partitions(index)...)
}

// rescan has the partition table read, also with max_part=0, where to open the
// device does not. Nodes of what was attached before go away.
func (h *host) rescan(ctx context.Context, index int) error {
	for {
		d, err := h.open(h.path(index), false)
		if err != nil {
			return err
		}
		err = d.rescan()
		d.Close()
		// A table that cannot be read has no partitions: the disk may be
		// there to be repaired, or too small for one.
		if err == nil || errors.Is(err, syscall.EIO) {
			return nil
		}
		// Others scan too, and claim the device for that. What they find is
		// as good.
		if !errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("%s: partitions: %w", h.path(index), err)
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("%s: partitions: %w", h.path(index), err)
		}
	}
}

// awaitNodes waits until /dev has the nodes of these devices. In a container
// it may never.
func (h *host) awaitNodes(ctx context.Context, index int, names ...string) error {
	for _, n := range names {
		path := filepath.Join(h.dev, n)
		for {
			want := h.read(index, n, "dev")
			got, err := h.number(path)
			if err == nil && got == want {
				break
			}
			if sleep(ctx, 5*time.Millisecond) != nil {
				if err == nil {
					err = fmt.Errorf("it is device %s, not %s", got, want)
				}
				return fmt.Errorf("%s, which the kernel has, is not in %s: %w", n, h.dev, err)
			}
		}
	}
	return nil
}

// index returns the number of a device, which may be given by a link.
func (h *host) index(path string) (int, error) {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		path = p
	}
	dir, base := filepath.Split(path)
	const minors = 20 // bits, of the kernel's numbers
	i, err := strconv.ParseUint(strings.TrimPrefix(base, "nbd"), 10, minors)
	if err != nil || base != name(int(i)) || filepath.Clean(dir) != h.dev {
		return 0, fmt.Errorf("%s is not the name of a device as %s", path, h.path(0))
	}
	return int(i), nil
}

func name(index int) string { return "nbd" + strconv.Itoa(index) }

func (h *host) path(index int) string { return filepath.Join(h.dev, name(index)) }

// sleep waits, or returns why it should not.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
