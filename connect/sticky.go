package connect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A device keeps some of its settings beyond its attachment. They are set here
// for the next one.

// setRotational says so whatever the kernel does with the flag: older ones
// ignore it, and newer ones keep it for whatever is attached afterwards.
func (h *host) setRotational(index int, rotational bool) error {
	text := "0"
	if rotational {
		text = "1"
	}
	return os.WriteFile(filepath.Join(h.sys, name(index), "queue/rotational"), []byte(text), 0)
}

// endReadOnly undoes what blockdev --setro has done to a device, which would
// outlast its attachment. One that was attached read-only is so regardless.
func (h *host) endReadOnly(index int) error {
	d, err := h.open(h.path(index), false)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.endReadOnly(); err != nil {
		return fmt.Errorf("%s: BLKROSET: %w", h.path(index), err)
	}
	return nil
}

// connectFresh is connectWhenFree, with a device that does not ask for zeroing
// if the export does not offer it. Since Linux 6.12 a device that was once
// attached to one that did goes on asking, and what it asks for fails. Of a
// read-only device nobody can ask.
func (h *host) connectFresh(ctx context.Context, c *config) (int, error) {
	switch {
	case c.flags&uint64(nbd.FlagSendWriteZeroes|nbd.FlagReadOnly) != 0:
		return h.connectWhenFree(ctx, c)
	case c.index != anyIndex:
		var err error
		if c.replaces, err = h.forgetZeroing(ctx, c.index); err != nil {
			return 0, err
		}
		return h.connectWhenFree(ctx, c)
	}
	// The kernel would not say which it takes until it is too late.
	for index := 0; ; index++ {
		_, err := os.Stat(filepath.Join(h.sys, name(index)))
		if errors.Is(err, fs.ErrNotExist) {
			return h.connectWhenFree(ctx, c) // there is no free one that is used to it
		}
		if h.connected(index) {
			continue
		}
		one := *c
		one.index = index
		if one.replaces, err = h.forgetZeroing(ctx, index); err == nil {
			if _, err = h.connectOnceGone(ctx, &one); err == nil {
				return index, nil
			}
			err = attachError(c, "", err)
		}
		if !elsewhere(err) {
			return 0, err
		}
	}
}

// elsewhere reports whether a device could not be had because of others, since it
// was found to be free: it is attached, kept open, or being destroyed.
func elsewhere(err error) bool {
	_, taken := errors.AsType[*takenError](err)
	_, busy := errors.AsType[*BusyError](err)
	return taken || busy || errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EINVAL)
}

// connectOnceGone is connect, but waits for the end of a device that is being
// replaced: the kernel goes on with that after the last sign of it.
func (h *host) connectOnceGone(ctx context.Context, c *config) (int, error) {
	for end := time.Now().Add(patience); ; {
		index, err := h.connect(c)
		if !c.replaces || !errors.Is(err, syscall.EINVAL) || time.Now().After(end) {
			return index, err
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

// forgetZeroing has a free device that asks for zeroing replaced by a new one.
func (h *host) forgetZeroing(ctx context.Context, index int) (replaced bool, err error) {
	if most := h.read(index, name(index), "queue/write_zeroes_max_bytes"); most == "" || most == "0" || h.connected(index) {
		return false, nil
	}
	ours, theirs, err := SocketPair()
	if err != nil {
		return false, err
	}
	defer ours.Close()
	_, err = h.connectWhenFree(ctx, &config{index: index, size: sector, blockSize: sector, flags: uint64(nbd.FlagHasFlags),
		conns: []net.Conn{theirs}, backend: newBackend(), maxPart: -1, destroy: true})
	theirs.Close()
	if err != nil {
		return false, err
	}
	if err := h.disconnect(index); err != nil {
		return false, fmt.Errorf("%s: %w", h.path(index), err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if _, err := os.Stat(filepath.Join(h.sys, name(index))); errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if sleep(ctx, 5*time.Millisecond) != nil {
			return false, &BusyError{h.path(index), h.openers(index)}
		}
	}
}
