package asif

import (
	"context"
	"fmt"
	"io/fs"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Format returns the row of the table of formats.
func Format() image.Format {
	return image.Format{
		Name:  "asif",
		Probe: probe,
		Open: func(_ context.Context, s storage.Store, opt image.Options) (image.Device, error) {
			return Open(s, opt)
		},
		Inspect: inspect,
	}
}

// Open opens an image, which has to be asked for read-only. It takes ownership
// of s if it succeeds.
func Open(s storage.Store, opt image.Options) (*Disk, error) {
	if err := refuse(opt.Params); err != nil {
		return nil, err
	}
	if !opt.ReadOnly {
		return nil, &image.Hint{
			Err:    fmt.Errorf("ASIF images are only read: %w", image.ErrReadOnly),
			Advice: "open it read-only",
		}
	}
	h, err := readHeader(s)
	if err != nil {
		return nil, err
	}
	d := &Disk{
		name: opt.Name,
		m:    mapping{geometry: h.geometry(), store: s, pages: make(map[int64]*[pageSize]byte)},
	}
	if d.m.fileSize, err = s.Size(); err != nil {
		return nil, err
	}
	if d.m.tables, err = readDirectory(s, &h, d.m.fileSize); err != nil {
		return nil, err
	}
	si := s.Info()
	d.info = image.Info{
		Size:       h.size,
		Format:     "asif",
		ReadOnly:   true,
		Rotational: si.Rotational,
		BlockSize:  image.BlockSize{Min: 1, Preferred: si.PreferredIO, Max: si.MaxIO},
		QueueDepth: max(si.QueueDepth, 1),
	}
	return d, nil
}

// refuse returns an error if there are parameters: the format has none.
func refuse(params []image.Param) error {
	for _, p := range params {
		return fmt.Errorf("asif: unknown option %s", p.Key)
	}
	return nil
}

func inspect(_ context.Context, s storage.Store, params []image.Param) (*image.Inspection, error) {
	if err := refuse(params); err != nil {
		return nil, err
	}
	h, err := readHeader(s)
	if err != nil {
		return nil, err
	}
	return &image.Inspection{Format: "asif", VirtualSize: h.size, ClusterSize: h.chunk}, nil
}

// A Disk is an open image.
type Disk struct {
	info image.Info
	name string
	m    mapping
	gate storage.Gate
}

func (d *Disk) Info() image.Info { return d.info }

func (d *Disk) enter(off, n int64) error {
	if err := image.CheckRange(d.info.Size, off, n); err != nil {
		return err
	}
	if !d.gate.Enter() {
		return fs.ErrClosed
	}
	return nil
}

func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.enter(off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.gate.Leave()
	for done := 0; done < len(p); {
		s, err := d.m.next(off+int64(done), int64(len(p)-done), false)
		if err == nil {
			q := p[done : done+int(s.n)]
			if s.host < 0 {
				clear(q)
			} else {
				err = readFull(d.m.store, q, s.host)
			}
		}
		if err != nil {
			return done, image.Wrap("read", d.name, err)
		}
		done += int(s.n)
	}
	return len(p), nil
}

func (d *Disk) TryReadAt(p []byte, off int64) error {
	if err := d.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer d.gate.Leave()
	for len(p) > 0 {
		s, err := d.m.next(off, int64(len(p)), true)
		if err == nil {
			if s.host < 0 {
				clear(p[:s.n])
			} else {
				err = d.m.store.TryReadAt(p[:s.n], s.host)
			}
		}
		if err != nil {
			// ReadAt will say what is wrong, if it was not just the waiting.
			return image.ErrWouldBlock
		}
		p, off = p[s.n:], off+s.n
	}
	return nil
}

// maxSteps bounds the work of one AppendExtents, which may find few extents.
const maxSteps = 4096

func (d *Disk) AppendExtents(dst []image.Extent, off, n int64, _ image.Want) ([]image.Extent, error) {
	if n == 0 {
		return dst, image.ErrOutOfRange
	}
	if err := d.enter(off, n); err != nil {
		return dst, err
	}
	defer d.gate.Leave()
	first := len(dst)
	for end, step := off+n, 0; off < end && step < maxSteps && len(dst)-first < image.MaxExtents; step++ {
		s, err := d.m.next(off, end-off, false)
		if err != nil {
			if len(dst) > first {
				break // the caller comes back for it
			}
			return dst, image.Wrap("map", d.name, err)
		}
		e := image.Extent{Offset: off, Length: s.n}
		if s.host < 0 {
			e.Zero = true
		} else {
			e.Data, e.Allocated = true, true
			e.At = image.Location{Store: d.m.store, Offset: s.host}
		}
		if k := len(dst) - 1; k >= first && continues(dst[k], e) {
			dst[k].Length += e.Length
		} else {
			dst = append(dst, e)
		}
		off += s.n
	}
	return dst, nil
}

// continues reports whether b, which follows a, is more of the same.
func continues(a, b image.Extent) bool {
	return a.Zero == b.Zero && (a.Zero || a.At.Offset+a.Length == b.At.Offset)
}

// Pin pins nothing: nobody writes the image.
func (d *Disk) Pin() image.Pin { return image.Pin{} }

func (d *Disk) WriteAt([]byte, int64, image.WriteFlags) error    { return image.ErrReadOnly }
func (d *Disk) WriteZeroes(_, _ int64, _ image.WriteFlags) error { return image.ErrReadOnly }
func (d *Disk) Discard(_, _ int64) error                         { return image.ErrReadOnly }

func (d *Disk) Flush() error {
	if !d.gate.Enter() {
		return fs.ErrClosed
	}
	d.gate.Leave()
	return nil
}

func (d *Disk) Close() error {
	if !d.gate.Close() {
		return fs.ErrClosed
	}
	return image.Wrap("close", d.name, d.m.store.Close())
}
