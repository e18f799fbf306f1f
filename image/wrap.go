package image

import (
	"bytes"
	"errors"
)

// The wrappers below change what a request asks for, never a byte or an
// offset, so they leave reading and extents to the device they embed.

// ReadOnly returns d without the ability to write.
func ReadOnly(d Device) Device { return &readOnly{d} }

type readOnly struct{ Device }

func (r *readOnly) Info() Info {
	info := r.Device.Info()
	info.ReadOnly, info.Discard, info.FastZero = true, false, false
	return info
}

func (r *readOnly) WriteAt([]byte, int64, WriteFlags) error    { return ErrReadOnly }
func (r *readOnly) WriteZeroes(_, _ int64, _ WriteFlags) error { return ErrReadOnly }
func (r *readOnly) Discard(_, _ int64) error                   { return ErrReadOnly }

// IgnoreDiscard returns d with requests to give space back answered with
// success and otherwise ignored, as QEMU's discard=ignore.
func IgnoreDiscard(d Device) Device { return &ignoreDiscard{d, d.Info().Size} }

type ignoreDiscard struct {
	Device
	size int64
}

func (w *ignoreDiscard) Info() Info {
	info := w.Device.Info()
	info.Discard = false
	return info
}

func (w *ignoreDiscard) WriteZeroes(off, n int64, flags WriteFlags) error {
	return w.Device.WriteZeroes(off, n, flags&^MayUnmap)
}

func (w *ignoreDiscard) Discard(off, n int64) error {
	if err := CheckRange(w.size, off, n); err != nil {
		return err
	}
	return w.Device.Discard(off, 0) // refused if d is closed or read-only
}

// DetectZeroes returns d with writes of nothing but zeros turned into
// WriteZeroes, and with unmap into WriteZeroes that gives the space back.
func DetectZeroes(d Device, unmap bool) Device {
	w := &detectZeroes{Device: d}
	if unmap {
		w.flags = MayUnmap
	}
	return w
}

type detectZeroes struct {
	Device
	flags WriteFlags
}

func (w *detectZeroes) WriteAt(p []byte, off int64, flags WriteFlags) error {
	if len(p) == 0 || !allZero(p) {
		return w.Device.WriteAt(p, off, flags)
	}
	err := w.Device.WriteZeroes(off, int64(len(p)), flags|w.flags)
	if errors.Is(err, errors.ErrUnsupported) {
		return w.Device.WriteAt(p, off, flags)
	}
	return err
}

func allZero(p []byte) bool {
	// Most data shows itself at once.
	if p[0] != 0 || p[len(p)-1] != 0 || p[len(p)/2] != 0 {
		return false
	}
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// WriteThrough returns d with every change durable before the call returns.
func WriteThrough(d Device) Device { return &writeThrough{d} }

type writeThrough struct{ Device }

func (w *writeThrough) WriteAt(p []byte, off int64, flags WriteFlags) error {
	return w.Device.WriteAt(p, off, flags|FUA)
}

func (w *writeThrough) WriteZeroes(off, n int64, flags WriteFlags) error {
	return w.Device.WriteZeroes(off, n, flags|FUA)
}

func (w *writeThrough) Discard(off, n int64) error {
	if err := w.Device.Discard(off, n); err != nil {
		return err
	}
	return w.Device.Flush()
}

// Unsafe returns d with all requests for durability ignored until Close. A
// crash of the host may lose everything that was ever written through it.
func Unsafe(d Device) Device { return &unsafe{d} }

type unsafe struct{ Device }

func (w *unsafe) WriteAt(p []byte, off int64, flags WriteFlags) error {
	return w.Device.WriteAt(p, off, flags&^FUA)
}

func (w *unsafe) WriteZeroes(off, n int64, flags WriteFlags) error {
	return w.Device.WriteZeroes(off, n, flags&^FUA)
}

func (w *unsafe) Flush() error {
	_, err := w.Device.ReadAt(nil, 0) // refused if d is closed
	return err
}
