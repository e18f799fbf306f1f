package main

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"slices"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/drivers"
	"github.com/imgnbd/imgnbd/storage"
)

// overlay returns a device that begins as base, which it owns, and keeps what
// is written to it in a temporary qcow2 image.
func overlay(ctx context.Context, base image.Device) (_ image.Device, err error) {
	defer func() {
		if err != nil {
			if e := base.Close(); !errors.Is(e, fs.ErrClosed) {
				err = errors.Join(err, e)
			}
		}
	}()
	s, err := temporaryStore(ctx)
	if err != nil {
		return nil, err
	}
	formats := drivers.Formats()
	f := formats[slices.IndexFunc(formats, func(f image.Format) bool { return f.Name == "qcow2" })]
	err = f.Create(ctx, s, image.CreateOptions{
		Size:   base.Info().Size,
		Params: []image.Param{{Key: "backing_file", Value: "base"}, {Key: "backing_fmt", Value: base.Info().Format}},
	})
	if err == nil {
		var top image.Device
		if top, err = f.Open(ctx, s, image.Options{Name: "temporary overlay", Refs: only{base}, Unmap: true}); err == nil {
			return top, nil
		}
	}
	return nil, errors.Join(err, s.Close())
}

// only is the Opener of an image whose backing is open already.
type only struct{ base image.Device }

func (o only) OpenImage(context.Context, image.Reference) (image.Device, error) { return o.base, nil }

func (o only) OpenStore(ctx context.Context, ref image.Reference, write bool) (storage.Store, error) {
	return image.DenyReferences{}.OpenStore(ctx, ref, write)
}

// temporaryStore makes a file whose name is gone at once, as the file is when
// the store is closed, or the process dies.
func temporaryStore(ctx context.Context) (storage.Store, error) {
	// Not /tmp, which may be memory. QEMU too.
	file, err := os.CreateTemp(cmp.Or(os.Getenv("TMPDIR"), "/var/tmp"), "imgnbd-*.qcow2")
	if err != nil {
		return nil, err
	}
	protocols := drivers.Protocols()
	p := protocols[slices.IndexFunc(protocols, func(p storage.Protocol) bool { return p.Name == "file" })]
	s, err := p.Open(ctx, &url.URL{Scheme: "file", Path: file.Name()}, storage.Options{Access: storage.WriteGrow})
	err = errors.Join(err, os.Remove(file.Name()), file.Close())
	if err == nil {
		return &temporary{s}, nil
	}
	if s != nil {
		err = errors.Join(err, s.Close())
	}
	return nil, err
}

// A temporary store need not be durable.
type temporary struct{ storage.Store }

func (t *temporary) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	return t.Store.WriteAt(p, off, flags&^storage.FUA)
}

func (t *temporary) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	return t.Store.WriteZeroes(off, n, flags&^storage.FUA)
}

func (t *temporary) Sync() error { return nil }
