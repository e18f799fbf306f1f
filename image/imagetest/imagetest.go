// Package imagetest judges implementations of [image.Device].
//
// [Run] is the suite that every device and every wrapper passes. [Random]
// drives a device with random operations, concurrent ones among them, beside a
// model that knows what may come of them.
//
// A test describes how to make its disks by a [Target], in a few lines:
//
//	imagetest.Run(t, imagetest.Target{New: func(t testing.TB) imagetest.Disk {
//		store := storagetest.NewMem(1 << 20)
//		return imagetest.Disk{Open: func() (image.Device, error) { ... }}
//	}})
package imagetest

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/imgnbd/imgnbd/image"
)

// A Target makes disks to be tested.
type Target struct {
	// New makes a disk that shares nothing with those made before. A few
	// clusters are enough: all of it is read and compared, often.
	New func(t testing.TB) Disk
}

// A Disk is something that can be opened as a Device again and again.
type Disk struct {
	// Open opens it. It is called again only after Close of what it returned.
	Open func() (image.Device, error)
	// Content is what it holds at first; nil is zeros.
	Content []byte
	// Judge, if set, is asked for an independent verdict while the disk is
	// closed: whether its structure is sound and its bytes are want.
	Judge func(want []byte) error
}

// A check is one statement about devices. Its error says what does not hold.
type check struct {
	name  string
	write bool // needs a device that can be written
	run   func(d *disk) error
}

var checks = []check{
	{"info", false, checkInfo},
	{"bounds", false, checkBounds},
	{"content", false, checkContent},
	{"extents", false, checkExtents},
	{"pin", false, checkPin},
	{"read-only", false, checkReadOnly},
	{"closed", false, checkClosed},
	{"close while reading", false, checkCloseWhileReading},
	{"write", true, checkWrite},
	{"write zeroes", true, checkWriteZeroes},
	{"fast zeroes", true, checkFastZeroes},
	{"discard", true, checkDiscard},
	{"fragments", true, checkFragments},
	{"whole", true, checkWhole},
	{"buffers", true, checkBuffers},
	{"reopen", true, checkReopen},
	{"disjoint", true, checkDisjoint},
	{"overlap", true, checkOverlap},
	{"close while writing", true, checkCloseWhileWriting},
}

// Run checks that what target makes keeps the contract of image.Device. Under
// the race detector it also finds unguarded state.
func Run(t *testing.T, target Target) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			d, err := open(target.New(t))
			if err != nil {
				t.Fatal(err)
			}
			if c.write && d.Info().ReadOnly {
				d.Close()
				return
			}
			if err := c.verdict(d); err != nil {
				t.Error(err)
			}
		})
	}
}

// verdict runs a check on an open disk, closes it and asks the judge.
func (c check) verdict(d *disk) error {
	err := c.run(d)
	if d.Device != nil {
		err = errors.Join(err, d.close())
	}
	return err
}

// disk is a Disk while it is being checked: open, with what it should hold.
type disk struct {
	image.Device // nil once a check has closed it
	Disk
	want []byte
}

func open(target Disk) (*disk, error) {
	dev, err := target.Open()
	if err != nil {
		return nil, fmt.Errorf("Open: %w", err)
	}
	d := &disk{Device: dev, Disk: target, want: make([]byte, dev.Info().Size)}
	if target.Content != nil {
		if len(target.Content) != len(d.want) {
			return nil, errors.Join(fmt.Errorf("the size is %d, not %d", len(d.want), len(target.Content)), dev.Close())
		}
		copy(d.want, target.Content)
	}
	return d, nil
}

// close closes the device and asks the judge.
func (d *disk) close() error {
	err := d.Device.Close()
	d.Device = nil
	if err != nil {
		return fmt.Errorf("Close: %w", err)
	}
	if d.Judge != nil {
		if err := d.Judge(d.want); err != nil {
			return fmt.Errorf("judge: %w", err)
		}
	}
	return nil
}

// reopen closes the device and opens it again.
func (d *disk) reopen() error {
	if err := d.close(); err != nil {
		return err
	}
	dev, err := d.Open()
	if err != nil {
		return fmt.Errorf("Open again: %w", err)
	}
	d.Device = dev
	if size := dev.Info().Size; size != int64(len(d.want)) {
		return fmt.Errorf("the size is %d after reopening, and was %d", size, len(d.want))
	}
	return nil
}

// size is Info().Size.
func (d *disk) size() int64 { return int64(len(d.want)) }

// compare reads [off, off+n) in every way there is and compares it with what
// should be there.
func (d *disk) compare(off, n int64) error {
	off = max(off, 0)
	n = min(n, d.size()-off)
	if n <= 0 {
		return nil
	}
	want := d.want[off : off+n]
	got := bytes.Repeat([]byte{0xa5}, int(n))
	if k, err := d.ReadAt(got, off); err != nil || int64(k) != n {
		return fmt.Errorf("ReadAt(%#x+%#x) = %d, %v", off, n, k, err)
	}
	if err := differ("ReadAt", got, want, off); err != nil {
		return err
	}
	got = bytes.Repeat([]byte{0x5a}, int(n))
	switch err := d.TryReadAt(got, off); {
	case errors.Is(err, image.ErrWouldBlock):
	case err != nil:
		return fmt.Errorf("TryReadAt(%#x+%#x): %w", off, n, err)
	default:
		return differ("TryReadAt", got, want, off)
	}
	return nil
}

// compareAll is compare of everything, and its extents.
func (d *disk) compareAll() error {
	if err := d.compare(0, d.size()); err != nil {
		return err
	}
	if d.size() == 0 {
		return nil
	}
	return d.compareExtents(0, d.size(), wantAll)
}

func differ(what string, got, want []byte, off int64) error {
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("%s: byte %#x is %#02x, not %#02x", what, off+int64(i), got[i], want[i])
		}
	}
	return nil
}

const wantAll = image.WantZero | image.WantAllocated | image.WantLocation

// compareExtents asks for the extents of a range and holds every claim against
// the bytes.
func (d *disk) compareExtents(off, n int64, want image.Want) error {
	pin := d.Pin()
	defer pin.Release()
	exts, err := tiles(d.Device, off, n, want)
	if err != nil {
		return err
	}
	for _, e := range exts {
		if err := d.compareExtent(e, want); err != nil {
			return fmt.Errorf("%w (extent %+v, asked for %#x+%#x, want %d)", err, e, off, n, want)
		}
	}
	return nil
}

// tiles collects the extents of a range and checks their shape.
func tiles(d image.Device, off, n int64, want image.Want) (all []image.Extent, err error) {
	// What is there already has to stay.
	const sentinel = -12345
	for end := off + n; off < end; {
		got, err := d.AppendExtents([]image.Extent{{Offset: sentinel}}, off, end-off, want)
		if err != nil {
			return nil, fmt.Errorf("AppendExtents(%#x+%#x): %w", off, end-off, err)
		}
		if len(got) < 2 || got[0].Offset != sentinel {
			return nil, fmt.Errorf("AppendExtents(%#x+%#x) appended nothing, or in the wrong place", off, end-off)
		}
		if len(got)-1 > image.MaxExtents {
			return nil, fmt.Errorf("AppendExtents(%#x+%#x) appended %d extents, %d are allowed", off, end-off, len(got)-1, image.MaxExtents)
		}
		for _, e := range got[1:] {
			if e.Offset != off || e.Length <= 0 || e.Length > end-off {
				return nil, fmt.Errorf("AppendExtents: extent %#x+%#x where one from %#x, ending by %#x, has to be", e.Offset, e.Length, off, end)
			}
			off += e.Length
		}
		all = append(all, got[1:]...)
	}
	return all, nil
}

func (d *disk) compareExtent(e image.Extent, want image.Want) error {
	bytesWant := d.want[e.Offset : e.Offset+e.Length]
	if want&image.WantZero != 0 {
		if e.Zero && !zero(bytesWant) {
			return errors.New("said to be zeros, and holds data")
		}
		if !e.Data && !zero(bytesWant) {
			return errors.New("said to be a hole, and holds data")
		}
	}
	if want&image.WantAllocated != 0 {
		if !e.Allocated && !zero(bytesWant) {
			return errors.New("said to be in no layer, and holds data")
		}
		if e.Depth < 0 {
			return errors.New("depth below 0")
		}
	}
	if e.At.Store == nil {
		return nil
	}
	if e.Compressed {
		return errors.New("compressed, and said to lie somewhere verbatim")
	}
	got := make([]byte, e.Length)
	if n, err := e.At.Store.ReadAt(got, e.At.Offset); n != len(got) {
		return fmt.Errorf("location %#x cannot be read: %d bytes, %w", e.At.Offset, n, err)
	}
	if !bytes.Equal(got, bytesWant) {
		return fmt.Errorf("location %#x holds other bytes", e.At.Offset)
	}
	return nil
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
