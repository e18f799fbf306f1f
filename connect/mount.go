package connect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// An AbandonedError is the error of unmounting a file system that can be written
// to, whose server has ended: what was not flushed would be lost.
type AbandonedError struct {
	Path, Point string
	Record      Record // that the server has left; empty if none, and then no other can go on
}

func (e *AbandonedError) Error() string {
	return fmt.Sprintf("%s on %s: its server has ended, and what was not flushed would be lost", e.Path, e.Point)
}

// A Hold has a device open that goes when nobody has it open any more.
type Hold struct {
	host   *host
	index  int
	device block
	server server
}

// Holders returns who uses the device otherwise, as far as that can be seen.
func (x *Hold) Holders() []Holder { return x.host.holders(x.index) }

// Close leaves the device to whoever else has it open.
func (x *Hold) Close() error {
	x.server.close()
	return x.device.Close()
}

// Wait closes the device too, which nobody else has open, and returns when its
// server has closed the image.
func (x *Hold) Wait(ctx context.Context) error {
	return errors.Join(x.device.Close(), x.server.wait(ctx))
}

// DetachWhenClosed has the kernel detach a device, one of this module's, when
// nobody has it open any more: when its file system is unmounted, by whoever,
// or if the Hold ends, with its process at the latest, and it was not mounted.
// If there is an error, the device stays attached.
func DetachWhenClosed(path string) (*Hold, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.detachWhenClosed(path)
}

func (h *host) detachWhenClosed(path string) (*Hold, error) {
	index, err := h.index(path)
	if err != nil {
		return nil, err
	}
	held, err := h.open(h.path(index), false)
	if err != nil {
		return nil, err
	}
	if err := h.detachOnClose(index, h.backend(index)); err != nil {
		held.Close()
		return nil, fmt.Errorf("%s: %w", h.path(index), err)
	}
	return &Hold{h, index, held, h.server(index)}, nil
}

// backend returns what tells the attachment of a device from others.
func (h *host) backend(index int) string { return h.read(index, name(index), "backend") }

// Unmount has umount unmount the file system at dir, which has to be that of a
// device of this module's, and detaches the device. It returns when the device
// is free and its server has closed the image. If the device is in use
// otherwise, it is unmounted all the same, and the error is a *BusyError.
//
// If the server has ended, a file system that can be written to is left alone,
// unless it is to be by force.
func Unmount(ctx context.Context, dir string, force bool, umount func(dir string) error) error {
	h, err := newHost()
	if err != nil {
		return err
	}
	return h.unmount(ctx, dir, force, umount)
}

func (h *host) unmount(ctx context.Context, dir string, force bool, umount func(dir string) error) error {
	m, index, err := h.mountAt(dir)
	if err != nil {
		return err
	}
	// To others a server that lives looks like none.
	if _, err := os.ReadDir(h.run); errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%s: only root can unmount it: %w", m.point, err)
	}
	backend, s := h.backend(index), h.server(index)
	// A server that has finished with its image may have left the device to
	// its users: then there is no record.
	ended := s.dead() || !s.known()
	if ended && m.writable && !force {
		s.close()
		return &AbandonedError{h.path(index), m.point, s.Record}
	}
	if ended {
		// Its requests fail at once then.
		err = h.disconnect(index)
	}
	if err == nil {
		err = umount(m.point)
	}
	if err == nil && h.backend(index) == backend && h.connected(index) {
		err = h.detach(ctx, index, backend, false)
	}
	if err != nil {
		s.close()
		return err
	}
	return s.wait(ctx)
}

// mountAt returns the mount that is seen at dir, and whose device it is.
func (h *host) mountAt(dir string) (m mount, index int, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return m, 0, err
	}
	m, ok := h.topMount(dir)
	if !ok {
		// Not before: it may take a dead device to follow a link.
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			m, ok = h.topMount(real)
		}
	}
	if !ok {
		return m, 0, fmt.Errorf("%s: nothing is mounted there", dir)
	}
	for _, d := range h.devices() {
		index, err := h.index(d.Path)
		if err != nil || !strings.HasPrefix(h.backend(index), backendPrefix) {
			continue
		}
		if _, ok := m.node(h.nodes(index), true); ok {
			return m, index, nil
		}
	}
	return m, 0, fmt.Errorf("%s is %s, which is no device of imgnbd's: use umount", m.point, m.source)
}

// topMount returns the last mount at a place in this mount namespace, which
// covers others.
func (h *host) topMount(point string) (top mount, ok bool) {
	for _, m := range h.mountinfo("self") {
		if m.point == point {
			top, ok = m, true
		}
	}
	return top, ok
}
