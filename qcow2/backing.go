package qcow2

import (
	"context"
	"fmt"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// openBacking opens the backing image, nil if there is none.
func openBacking(ctx context.Context, h *header, s storage.Store, opt *image.Options) (image.Device, error) {
	if h.backing == "" {
		return nil, nil
	}
	if opt.Refs == nil {
		return nil, fmt.Errorf("backing image %q: %w", h.backing, image.ErrReference)
	}
	d, err := opt.Refs.OpenImage(ctx, image.Reference{Name: h.backing, Format: h.backingFormat(), From: s})
	if err != nil {
		return nil, fmt.Errorf("Could not open backing file: %w", err) // QEMU's words
	}
	return d, nil
}

// readBacking fills p from the backing image, with zeros where that has ended.
func (f *files) readBacking(p []byte, off int64) error {
	n := f.backed(off, int64(len(p)))
	if n > 0 {
		if _, err := f.backing.ReadAt(p[:n], off); err != nil {
			return err
		}
	}
	clear(p[n:])
	return nil
}

func (f *files) tryReadBacking(p []byte, off int64) error {
	n := f.backed(off, int64(len(p)))
	if n > 0 {
		if err := f.backing.TryReadAt(p[:n], off); err != nil {
			return err
		}
	}
	clear(p[n:])
	return nil
}

// backed returns how many of the n bytes at off the backing image has.
func (f *files) backed(off, n int64) int64 {
	if f.backing == nil {
		return 0
	}
	return max(0, min(n, f.backing.Info().Size-off))
}

// appendBacking describes a hole of n bytes as the backing image does.
func (f *files) appendBacking(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	if f.backing == nil {
		return append(dst, image.Extent{Offset: off, Length: n, Zero: true}), nil
	}
	backed := f.backed(off, n)
	if backed == 0 {
		// These zeros are there because the backing image ends: they are its own.
		return append(dst, image.Extent{Offset: off, Length: n, Zero: true, Allocated: true, Depth: 1}), nil
	}
	start := len(dst)
	dst, err := f.backing.AppendExtents(dst, off, backed, want)
	for i := range dst[start:] {
		dst[start+i].Depth++
	}
	return dst, err
}
