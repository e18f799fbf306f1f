package image

import (
	"errors"
	"iter"
)

// CheckRange returns ErrOutOfRange unless [off, off+n) lies within size bytes.
func CheckRange(size, off, n int64) error {
	if off < 0 || n < 0 || off > size-n {
		return ErrOutOfRange
	}
	return nil
}

// errNoExtents is a fault of a driver, not of an image.
var errNoExtents = errors.New("the driver broke the rules of AppendExtents")

// Extents walks the description of [off, off+n) of d, asking as often as it
// takes. It yields what d answers, uncombined; after an error it ends.
func Extents(d Device, off, n int64, want Want) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var buf []Extent
		for end := off + n; off < end; {
			var err error
			buf, err = d.AppendExtents(buf[:0], off, end-off, want)
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if len(buf) == 0 {
				yield(Extent{}, errNoExtents)
				return
			}
			for _, e := range buf {
				// What does not advance would loop for ever.
				if e.Offset != off || e.Length <= 0 || e.Length > end-off {
					yield(Extent{}, errNoExtents)
					return
				}
				off += e.Length
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

// zeros is what ZeroByWriting writes; nobody writes to it.
var zeros [64 << 10]byte

// ZeroByWriting zeroes a range of d with WriteAt, for drivers that know no
// faster way. flags may hold FUA; with FastOnly it returns
// errors.ErrUnsupported, as nothing here is fast.
func ZeroByWriting(d Device, off, n int64, flags WriteFlags) error {
	if flags&FastOnly != 0 {
		return errors.ErrUnsupported
	}
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if err := d.WriteAt(p, off, flags&FUA); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}
