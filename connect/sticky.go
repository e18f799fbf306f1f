package connect

import (
	"fmt"
	"os"
	"path/filepath"
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
