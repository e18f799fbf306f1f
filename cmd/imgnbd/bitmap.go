package main

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// bitmapContexts returns a metadata context for each name. The last named
// comes first, as in qemu-nbd.
func bitmapContexts(dev image.Device, names []string) ([]export.MetaContext, error) {
	src, ok := image.As[image.BitmapSource](dev)
	var contexts []export.MetaContext
	for _, name := range slices.Backward(names) {
		if !ok {
			return nil, says("Bitmap '%s' is not found", name)
		}
		b, err := src.Bitmap(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, says("Bitmap '%s' is not found", name)
		case errors.Is(err, image.ErrCorrupt) && inconsistent(src, name):
			return nil, says("Bitmap '%s' is inconsistent and cannot be used", name)
		case err != nil:
			return nil, says("Bitmap '%s': %v", name, err)
		}
		contexts = append(contexts, &bitmapContext{name, b})
	}
	return contexts, nil
}

// inconsistent reports whether it is only the mark of an unfinished writer
// that makes a bitmap unusable.
func inconsistent(src image.BitmapSource, name string) bool {
	for _, b := range src.Bitmaps() {
		if b.Name == name {
			return b.Inconsistent
		}
	}
	return true // it is another image's of the chain
}

// A bitmapContext shows a dirty bitmap to clients.
type bitmapContext struct {
	name   string
	bitmap image.Bitmap
}

func (c *bitmapContext) Name() string { return nbd.ContextDirtyBitmap + c.name }

func (c *bitmapContext) AppendStatus(dst []export.Status, off, n int64) ([]export.Status, error) {
	extents, err := c.bitmap.AppendDirty(nil, off, n)
	for _, e := range extents {
		s := export.Status{Length: e.Length}
		if e.Dirty {
			s.Flags = nbd.StateDirty
		}
		dst = append(dst, s)
	}
	return dst, err
}
