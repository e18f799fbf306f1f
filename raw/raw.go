// Package raw gives a store the plainest meaning: byte n of the disk is byte n
// of the store.
//
// The disk is as long as the store, rounded up to whole sectors of 512 bytes
// as QEMU does. What lies past the end of the store reads as zeros; writing
// there extends it as far as the write reaches, discarding or unmapping does not.
//
// The parameters are those of QEMU's raw driver: offset, the first byte of the
// store that is shown, and size, how many are.
package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

const sector = 512

// Format returns the row of the table of formats.
func Format() image.Format {
	return image.Format{
		Name: "raw",
		Open: func(_ context.Context, s storage.Store, opt image.Options) (image.Device, error) {
			return Open(s, opt)
		},
		Inspect:      inspect,
		Create:       create,
		CreateParams: createParams(),
		ShareWrite:   true,
	}
}

// Open returns the disk that s is. It takes ownership of s if it succeeds.
func Open(s storage.Store, opt image.Options) (*Disk, error) {
	d := &Disk{store: s, name: opt.Name}
	end, err := s.Size()
	if err != nil {
		return nil, err
	}
	if end > math.MaxInt64-sector {
		return nil, fmt.Errorf("size %d is too large", end)
	}
	offset, size, err := window(opt.Params, roundUp(end))
	if err != nil {
		return nil, err
	}
	d.start = offset
	d.stored = min(max(end-offset, 0), size)

	si := s.Info()
	d.info = image.Info{
		Size:       size,
		Format:     "raw",
		ReadOnly:   opt.ReadOnly || si.ReadOnly,
		Rotational: si.Rotational,
		BlockSize:  image.BlockSize{Min: 1, Preferred: si.PreferredIO, Max: si.MaxIO},
		Discard:    si.Discard,
		FastZero:   si.FastZero,
		QueueDepth: max(si.QueueDepth, 1),
	}
	return d, nil
}

func roundUp(n int64) int64 { return (n + sector - 1) &^ (sector - 1) }

// window returns the part of a store of total bytes that params ask for.
func window(params []image.Param, total int64) (offset, size int64, err error) {
	size = -1
	for _, p := range params {
		to := map[string]*int64{"offset": &offset, "size": &size}[p.Key]
		if to == nil {
			return 0, 0, p.Unknown("raw")
		}
		n, err := p.Size()
		if err != nil {
			return 0, 0, err
		}
		*to = int64(min(n, math.MaxInt64))
	}
	if size >= 0 && size%sector != 0 && offset <= total {
		return 0, 0, fmt.Errorf("Specified size is not multiple of %d", sector)
	}
	if err := storage.CheckSection(total, offset, size); err != nil {
		return 0, 0, err
	}
	if size < 0 { // QEMU shows whole sectors; those that end past the store read as zeros there.
		size = roundUp(total - offset)
	}
	return offset, size, nil
}

func inspect(_ context.Context, s storage.Store, params []image.Param) (*image.Inspection, error) {
	d, err := Open(s, image.Options{ReadOnly: true, Params: params})
	if err != nil {
		return nil, err
	}
	return &image.Inspection{Format: "raw", VirtualSize: d.info.Size}, nil
}

// A Disk is a store seen as a disk. Everything is passed to the store, which
// does the locking, the waiting at Close and the refusing after it.
type Disk struct {
	store  storage.Store
	name   string
	info   image.Info
	start  int64 // of the disk in the store
	stored int64 // bytes of the disk that the store held at Open
}

func (d *Disk) Info() image.Info { return d.info }

func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := image.CheckRange(d.info.Size, off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.store.ReadAt(p, d.start+off)
	if err == nil && n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		if n == len(p) || off+int64(n) >= d.stored {
			clear(p[n:])
			return len(p), nil
		}
		// Somebody cut the store short. Zeros would be a guess.
		err = io.ErrUnexpectedEOF
	}
	return n, d.fail("read", off, len(p), err)
}

func (d *Disk) TryReadAt(p []byte, off int64) error {
	if err := image.CheckRange(d.info.Size, off, int64(len(p))); err != nil {
		return err
	}
	err := d.store.TryReadAt(p, d.start+off)
	switch {
	case err == nil, err == storage.ErrWouldBlock, err == storage.ErrUnderWay:
		return err
	case errors.Is(err, io.EOF):
		return storage.ErrWouldBlock // ReadAt knows what the end means
	}
	return d.fail("read", off, len(p), err)
}

func (d *Disk) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	if err := d.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	if err := d.store.WriteAt(p, d.start+off, flags); err != nil {
		return d.fail("write", off, len(p), err)
	}
	return nil
}

func (d *Disk) WriteZeroes(off, n int64, flags image.WriteFlags) error {
	if err := d.checkWrite(off, n); err != nil {
		return err
	}
	var err error
	stored := n
	if flags&image.MayUnmap != 0 && off+n > d.stored {
		// What is past the end is unmapped already; as in QEMU it stays so.
		var end int64
		if end, err = d.store.Size(); err == nil {
			stored = min(n, max(end-d.start-off, 0))
		}
	}
	if err == nil {
		err = d.store.WriteZeroes(d.start+off, stored, flags)
	}
	if err != nil {
		return d.fail("zero", off, n, err)
	}
	return nil
}

func (d *Disk) Discard(off, n int64) error {
	if err := d.checkWrite(off, n); err != nil {
		return err
	}
	if err := d.store.Discard(d.start+off, n); err != nil {
		return d.fail("discard", off, n, err)
	}
	return nil
}

func (d *Disk) Flush() error {
	return image.Wrap("flush", d.name, d.store.Sync())
}

// AppendExtents: all of a raw disk is allocated, in layer 0, and lies in the
// store at a constant distance; what is a hole in the store reads as zeros.
func (d *Disk) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	if err := image.CheckRange(d.info.Size, off, n); err != nil {
		return dst, err
	}
	if n == 0 {
		return dst, image.ErrOutOfRange
	}
	if want&image.WantZero == 0 && off < d.stored {
		// No need to ask the file system.
		return append(dst, d.extent(off, min(n, d.stored-off), false)), nil
	}
	var buf [16]storage.Extent
	exts, err := d.store.AppendExtents(buf[:0], d.start+off, n)
	if err != nil {
		return dst, d.fail("map", off, n, err)
	}
	if len(exts) == 0 && off < d.stored { // cut short: who reads it is told
		return append(dst, d.extent(off, min(n, d.stored-off), false)), nil
	}
	if len(exts) == 0 { // past the end of the store
		return append(dst, image.Extent{Offset: off, Length: n, Zero: true, Allocated: true}), nil
	}
	for _, e := range exts[:min(len(exts), image.MaxExtents)] {
		dst = append(dst, d.extent(e.Offset-d.start, e.Length, e.Hole))
	}
	return dst, nil
}

func (d *Disk) extent(off, n int64, hole bool) image.Extent {
	return image.Extent{
		Offset: off, Length: n,
		Zero: hole, Data: !hole, Allocated: true,
		At: image.Location{Store: d.store, Offset: d.start + off},
	}
}

// Pin pins nothing: a byte of the disk never lies elsewhere.
func (d *Disk) Pin() image.Pin { return image.Pin{} }

func (d *Disk) Close() error {
	var err error
	if !d.info.ReadOnly {
		err = d.store.Sync()
	}
	return image.Wrap("close", d.name, errors.Join(err, d.store.Close()))
}

func (d *Disk) checkWrite(off, n int64) error {
	if d.info.ReadOnly {
		return image.ErrReadOnly
	}
	return image.CheckRange(d.info.Size, off, n)
}

// fail says where err happened. What callers ask for and expect to be refused
// stays bare.
func (d *Disk) fail(op string, off int64, n any, err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return image.Wrap(op, d.name, fmt.Errorf("%v bytes at %#x: %w", n, off, err))
}
