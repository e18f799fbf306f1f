package image

import "math"

// A hole is what lies below an image that is opened alone: zeros without end
// that no layer holds. To the image it is a backing image as any other, so what
// is zeroed in it is marked as zeros, and hides what is below at other times.
type hole struct{}

func (hole) Info() Info { return Info{Size: math.MaxInt64, ReadOnly: true, QueueDepth: 1} }

func (hole) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (hole) TryReadAt(p []byte, _ int64) error {
	clear(p)
	return nil
}

func (hole) AppendExtents(dst []Extent, off, n int64, _ Want) ([]Extent, error) {
	return append(dst, Extent{Offset: off, Length: n, Zero: true}), nil
}

func (hole) WriteAt([]byte, int64, WriteFlags) error    { return ErrReadOnly }
func (hole) WriteZeroes(_, _ int64, _ WriteFlags) error { return ErrReadOnly }
func (hole) Discard(_, _ int64) error                   { return ErrReadOnly }
func (hole) Flush() error                               { return nil }
func (hole) Pin() Pin                                   { return Pin{} }
func (hole) Close() error                               { return nil }
