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
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
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
	Connections int    // 0: one. More need an export that tells MULTI_CONN

	Image string // what is attached, for whoever lists the devices

	// DeadTimeout is how long requests to the device wait when its server has
	// ended, before they fail: rounded up to seconds; 0: not at all.
	DeadTimeout time.Duration

	// MaxPart is the parameter max_part of the module nbd, should it have to
	// be loaded; negative: the module's default.
	MaxPart int
}

// An Attachment is a device that Attach has made.
type Attachment struct {
	host    *host
	index   int
	backend string
	record  *record
}

// Path returns the name of the device.
func (a *Attachment) Path() string { return a.host.path(a.index) }

// Detach flushes the device and takes it from the kernel, as the function
// Detach does. The servers of its connections see an orderly end. If somebody
// else has detached it, there is nothing to do.
func (a *Attachment) Detach(ctx context.Context, force bool) error {
	if a.host.read(a.index, name(a.index), "backend") != a.backend {
		return nil
	}
	return a.host.detach(ctx, a.index, force)
}

// Close tells others that the server has finished: Detach in another process
// waits for that. It is called last, when the image is closed.
func (a *Attachment) Close() error { return a.record.close() }

// Attach connects an export to the kernel. It returns when the device can be
// used: it has its size, and for every partition of its table there is a node.
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
	c, conns, err := negotiate(ctx, opt)
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
	c.index, c.maxPart, c.deadTimeout, c.backend = index, opt.MaxPart, opt.DeadTimeout, newBackend()
	if index, err = h.connectWhenFree(ctx, c); err != nil {
		return nil, err
	}
	a := &Attachment{host: h, index: index, backend: c.backend}
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, h.disconnect(index))
		if a.record != nil {
			a.record.close()
		}
	}()
	if a.record, err = h.newRecord(ctx, index, Record{
		Backend: c.backend, PID: os.Getpid(), Image: opt.Image, Connections: len(conns),
	}); err != nil {
		return nil, err
	}
	if err := h.setRequestTimer(index, len(conns)); err != nil {
		return nil, err
	}
	if err := h.awaitReady(ctx, index, c.size); err != nil {
		return nil, err
	}
	return a, nil
}

// kernelFlags are the transmission flags that a kernel knows.
const kernelFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagRotational |
	nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn

// Block sizes of devices, in bytes. Larger than a page is not possible.
const (
	sector       = 512
	maxBlockSize = 4096
)

// negotiate opens the connections and finds what they are connected to. The
// connections are the caller's to close, also on an error.
func negotiate(ctx context.Context, opt Options) (*config, []net.Conn, error) {
	var conns []net.Conn
	var first *nbd.Session
	for range max(opt.Connections, 1) {
		conn, err := opt.Dial(ctx)
		if err != nil {
			return nil, conns, err
		}
		conns = append(conns, conn)
		s, err := nbd.Handshake(ctx, conn, nbd.Options{Export: opt.Export, Protocol: nbd.Simple})
		if err != nil {
			return nil, conns, err
		}
		if first == nil {
			first = s
		}
		if s.Size != first.Size || s.Flags != first.Flags {
			return nil, conns, fmt.Errorf("export '%s' changed between two connections: %d bytes, flags %#x; then %d, %#x",
				opt.Export, first.Size, first.Flags, s.Size, s.Flags)
		}
	}
	c := &config{
		blockSize: max(sector, uint64(first.BlockSize.Min)),
		flags:     uint64(first.Flags & kernelFlags),
		conns:     conns,
	}
	c.size = uint64(first.Size) &^ (c.blockSize - 1)
	switch {
	case c.blockSize > maxBlockSize:
		return nil, conns, fmt.Errorf("export '%s' has blocks of %d bytes, a device at most of %d", opt.Export, c.blockSize, maxBlockSize)
	case c.size == 0:
		return nil, conns, fmt.Errorf("export '%s' has %d bytes, less than a block", opt.Export, first.Size)
	case len(conns) > 1 && first.Flags&nbd.FlagCanMultiConn == 0:
		return nil, conns, fmt.Errorf("export '%s' allows one connection, not %d", opt.Export, len(conns))
	}
	return c, conns, nil
}

// connectWhenFree tries again while the device is merely open somewhere, which
// is what udev does when a device has been detached.
func (h *host) connectWhenFree(ctx context.Context, c *config) (int, error) {
	for end := time.Now().Add(patience); ; {
		index, err := h.connect(c)
		if err == nil {
			return index, nil
		}
		if c.index == anyIndex || !errors.Is(err, syscall.EBUSY) {
			return 0, attachError(c, h.path(c.index), err)
		}
		if h.connected(c.index) {
			return 0, fmt.Errorf("%s is in use: %s", h.path(c.index), h.describe(c.index))
		}
		if time.Now().After(end) {
			return 0, &BusyError{h.path(c.index), h.openers(c.index)}
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

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
// after it. With one connection it only looks whether that has been replaced;
// with several it gives up the one that has not answered.
func (h *host) setRequestTimer(index, conns int) error {
	timer := time.Second
	if conns > 1 {
		timer = 5 * time.Minute
	}
	return os.WriteFile(filepath.Join(h.sys, name(index), "queue/io_timeout"),
		[]byte(strconv.FormatInt(timer.Milliseconds(), 10)), 0)
}

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
	go func() { scanned <- h.rescan(ctx, index) }()
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

var deviceName = regexp.MustCompile(`^nbd(0|[1-9]\d{0,6})$`)

// index returns the number of a device, which may be given by a link.
func (h *host) index(path string) (int, error) {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		path = p
	}
	m := deviceName.FindStringSubmatch(filepath.Base(path))
	if m == nil || filepath.Dir(path) != h.dev {
		return 0, fmt.Errorf("%s is not the name of a device as %s", path, h.path(0))
	}
	return strconv.Atoi(m[1])
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
