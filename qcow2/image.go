package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Format returns the row of the table of formats.
func Format() image.Format {
	return image.Format{
		Name:  "qcow2",
		Probe: probe,
		Open: func(ctx context.Context, s storage.Store, opt image.Options) (image.Device, error) {
			return Open(ctx, s, opt)
		},
		Inspect:      inspect,
		Check:        check,
		Create:       create,
		CreateParams: createParams(),
		Journal:      true,
		Grows:        true,
	}
}

func probe(r io.ReaderAt, _ int64) bool {
	var b [8]byte
	_, err := r.ReadAt(b[:], 0)
	return (err == nil || errors.Is(err, io.EOF)) && binary.BigEndian.Uint32(b[:]) == magic && binary.BigEndian.Uint32(b[4:]) >= 2
}

// An Image is an open qcow2 image: an [image.Device] with the abilities
// [image.Checker], [image.Snapshotter] and [image.BitmapSource].
type Image struct {
	*disk
	writer    *writer // nil if read-only
	header    *header
	opt       Options
	snapshots []snapshot
	bitmaps   []bitmap
}

// files is what the disks of one image share: the active one, and those of its
// snapshots that are open.
type files struct {
	geo     *geometry
	store   storage.Store
	data    storage.Store // store, or the external data file
	backing image.Device  // nil if there is none
	decoder *decoder
	users   atomic.Int32 // open disks
}

// Open opens an image. It takes ownership of s if it succeeds.
func Open(ctx context.Context, s storage.Store, opt image.Options) (*Image, error) {
	return open(ctx, s, opt, new(hooks))
}

func open(ctx context.Context, s storage.Store, opt image.Options, hooks *hooks) (_ *Image, err error) {
	o, err := parseOptions(opt.Params)
	if err != nil {
		return nil, err
	}
	h, err := readHeader(s)
	if err != nil {
		return nil, err
	}
	p := forReading
	if !opt.ReadOnly {
		p = forWriting
	}
	if err := h.check(p); err != nil {
		return nil, err
	}
	if h.crypt != cryptNone {
		return nil, errEncrypted
	}
	if opt.Untrusted {
		if err := h.checkStrict(); err != nil {
			return nil, err
		}
		o.strictCache()
	}
	im := &Image{opt: o}
	if im.snapshots, err = readSnapshots(s, h); err != nil {
		return nil, fmt.Errorf("Could not read snapshots: %w", err) // QEMU's words
	}
	if im.bitmaps, err = readBitmaps(s, h, opt.Warn); err != nil {
		return nil, err
	}
	if opt.Untrusted {
		if err := checkStrictTables(im.snapshots, im.bitmaps); err != nil {
			return nil, err
		}
	}
	if !opt.ReadOnly && h.incompatible&incompatDirty != 0 {
		if opt.Untrusted {
			if err := checkStrictDirty(s, h, im.snapshots); err != nil {
				return nil, err
			}
		}
		// A repair gives up bitmaps that make no sense; nobody asked for one, and
		// those have been refused above.
		if h, err = repairDirty(ctx, s, h, opt.Warn); err != nil {
			return nil, err
		}
		if im.snapshots, err = readSnapshots(s, h); err != nil {
			return nil, fmt.Errorf("Could not read snapshots: %w", err)
		}
	}
	im.header = h
	f := &files{geo: newGeometry(h), store: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.closeRefs())
		}
	}()
	if f.data, err = openDataFile(ctx, h, s, &opt, &o); err != nil {
		return nil, err
	}
	if f.backing, err = openBacking(ctx, h, s, &opt); err != nil {
		return nil, err
	}
	f.decoder = newDecoder(f.geo, h.compression, s)
	if im.disk, err = newDisk(f, opt.Name, int64(h.l1Offset), int(h.l1Size), h.diskSize(), o.l2Budget()); err != nil {
		return nil, err
	}
	if !opt.ReadOnly {
		if im.writer, err = newWriter(im.disk, h, im.snapshots, im.bitmaps, &opt, hooks); err != nil {
			im.mapping.close()
			return nil, err
		}
	}
	return im, nil
}

var (
	errEncrypted = &fault{errors.Join(image.ErrKey, errors.ErrUnsupported), "encrypted images are not supported"}
)

// readHeader reads the header of an image. As parseHeader it may return one
// with an error.
func readHeader(s storage.Store) (*header, error) {
	b := make([]byte, 4096)
	n, err := s.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("Could not read qcow2 header: %w", err)
	}
	b = b[:n]
	if span := headerSpan(b); n == 4096 && span > 4096 {
		rest := make([]byte, span)
		copy(rest, b)
		if n, err = s.ReadAt(rest[4096:], 4096); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("Could not read qcow2 header: %w", err)
		}
		b = rest[:4096+n]
	}
	return parseHeader(b)
}

// closeRefs closes what the image names.
func (f *files) closeRefs() error {
	var errs []error
	if f.backing != nil {
		errs = append(errs, f.backing.Close())
	}
	if f.data != nil && f.data != f.store {
		errs = append(errs, f.data.Close())
	}
	return errors.Join(errs...)
}

// release closes everything when the last disk is closed.
func (f *files) release() error {
	if f.users.Add(-1) > 0 {
		return nil
	}
	f.decoder.close()
	return errors.Join(f.closeRefs(), f.store.Close())
}

// A disk is one L1 table and the bytes that it stands for: an [image.Device],
// read-only.
type disk struct {
	*files
	name    string
	info    image.Info
	epochs  *epochs
	mapping *mapping
	loans   *loans // nil: there are none

	holes sync.Once // guards holey
	holey bool
}

func newDisk(f *files, name string, l1At int64, l1Size int, size, budget int64) (*disk, error) {
	epochs := newEpochs()
	m, err := newMapping(f.geo, f.store, f.data, l1At, l1Size, size, budget, epochs)
	if err != nil {
		return nil, err
	}
	si := f.data.Info()
	d := &disk{
		files: f, name: name, epochs: epochs, mapping: m,
		info: image.Info{
			Size:       size,
			Format:     "qcow2",
			ReadOnly:   true,
			Rotational: si.Rotational,
			BlockSize:  image.BlockSize{Min: 1, Preferred: int(max(f.geo.clusterSize, 4096)), Max: si.MaxIO},
			QueueDepth: max(si.QueueDepth, 1),
		},
	}
	f.users.Add(1)
	return d, nil
}

func (d *disk) Info() image.Info { return d.info }

func (d *disk) WriteAt([]byte, int64, image.WriteFlags) error    { return image.ErrReadOnly }
func (d *disk) WriteZeroes(_, _ int64, _ image.WriteFlags) error { return image.ErrReadOnly }
func (d *disk) Discard(_, _ int64) error                         { return image.ErrReadOnly }

// Flush has nothing to make durable.
func (d *disk) Flush() error {
	v, err := d.epochs.enter()
	if err == nil {
		v.leave()
	}
	return err
}

// Pin pins nothing: of an image that is only read, no cluster is ever reused.
func (d *disk) Pin() image.Pin { return image.Pin{} }

func (d *disk) Close() error {
	if err := d.epochs.close(); err != nil {
		return err
	}
	d.mapping.close()
	return image.Wrap("close", d.name, d.files.release())
}
