package raw

import (
	"context"
	"fmt"
	"math"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// createParams are the parameters of create, in QEMU's order and words.
func createParams() []image.CreateParam {
	return []image.CreateParam{
		{Name: "size", Kind: image.SizeParam, Help: "Virtual disk size"},
		{Name: "nocow", Kind: image.BoolParam, Refused: image.NoCOWAdvice},
		{Name: "preallocation", Help: "Preallocation mode (allowed values: off, falloc, full)"},
		{Name: "extent_size_hint", Kind: image.SizeParam, Refused: image.ExtentSizeAdvice},
	}
}

// create makes s a disk of zeros. A device may be larger than the disk; of
// that only the beginning is erased, so that nothing recognises what it held.
func create(_ context.Context, s storage.Store, opt image.CreateOptions) error {
	fill := func(int64) error { return nil }
	for _, p := range opt.Params {
		if p.Key != "preallocation" {
			return fmt.Errorf("raw: unknown option %s", p.Key)
		}
		switch p.Value {
		case "off":
			fill = func(int64) error { return nil }
		case "falloc":
			fill = func(n int64) error { return s.WriteZeroes(0, n, 0) }
		case "full":
			fill = func(n int64) error { return writeZeros(s, n) }
		case "metadata":
			return fmt.Errorf("Unsupported preallocation mode: metadata") // QEMU's words
		default:
			return fmt.Errorf("invalid parameter value: %s", p.Value)
		}
	}
	if opt.Size < 0 || opt.Size > math.MaxInt64-sector {
		return syscall.EFBIG
	}
	n := roundUp(opt.Size)
	if s.Info().FixedSize {
		size, err := s.Size()
		if err != nil {
			return err
		}
		if size < n {
			return syscall.ENOSPC
		}
		if err := s.WriteZeroes(0, min(sector, size), 0); err != nil {
			return err
		}
		return fill(n)
	}
	if err := storage.Clear(s, n); err != nil {
		return err
	}
	return fill(n)
}

// writeZeros takes up the space of the first n bytes for certain.
func writeZeros(s storage.Store, n int64) error {
	zeros := make([]byte, min(n, 1<<20))
	for off := int64(0); off < n; off += int64(len(zeros)) {
		if err := s.WriteAt(zeros[:min(n-off, int64(len(zeros)))], off, 0); err != nil {
			return err
		}
	}
	return nil
}
