package imagetest

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"sync"

	"github.com/imgnbd/imgnbd/image"
)

func checkInfo(d *disk) error {
	info := d.Info()
	switch {
	case info.Size < 0:
		return fmt.Errorf("size %d", info.Size)
	case info.Format == "":
		return errors.New("no format")
	case info.QueueDepth < 1:
		return fmt.Errorf("queue depth %d", info.QueueDepth)
	case info.BlockSize.Min < 0 || info.BlockSize.Preferred < 0 || info.BlockSize.Max < 0:
		return fmt.Errorf("block size %+v", info.BlockSize)
	case info != d.Info():
		return errors.New("two answers differ")
	}
	return nil
}

// calls are the methods that take a range, by name.
func calls(d image.Device) map[string]func(off, n int64) error {
	return map[string]func(off, n int64) error{
		"ReadAt": func(off, n int64) error {
			k, err := d.ReadAt(make([]byte, n), off)
			if err == nil && int64(k) != n {
				err = fmt.Errorf("%d of %d bytes and no error", k, n)
			}
			return err
		},
		"TryReadAt": func(off, n int64) error { return d.TryReadAt(make([]byte, n), off) },
		"AppendExtents": func(off, n int64) error {
			_, err := d.AppendExtents(nil, off, n, wantAll)
			return err
		},
		"WriteAt":     func(off, n int64) error { return d.WriteAt(make([]byte, n), off, 0) },
		"WriteZeroes": func(off, n int64) error { return d.WriteZeroes(off, n, 0) },
		"Discard":     func(off, n int64) error { return d.Discard(off, n) },
	}
}

// writes says which of calls change a device.
var writes = map[string]bool{"WriteAt": true, "WriteZeroes": true, "Discard": true}

func checkBounds(d *disk) error {
	size := d.size()
	ro := d.Info().ReadOnly
	for name, call := range calls(d) {
		for _, r := range []struct{ off, n int64 }{
			{-1, 1}, {-1, 2}, {-1, 0}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {size + 1, 1}, {0, size + 1},
			{math.MaxInt64, 1}, {math.MaxInt64 - 1, 512}, {math.MinInt64, 1}, {math.MaxInt64, 0},
		} {
			if r.off == size-1 && size == 0 {
				continue
			}
			err := call(r.off, r.n)
			if errors.Is(err, image.ErrOutOfRange) || ro && writes[name] && errors.Is(err, image.ErrReadOnly) ||
				name == "TryReadAt" && errors.Is(err, image.ErrWouldBlock) {
				continue
			}
			return fmt.Errorf("%s(%d+%d) of a device of %d bytes: %v, not %v", name, r.off, r.n, size, err, image.ErrOutOfRange)
		}
		if name == "AppendExtents" {
			continue // of nothing is not asked
		}
		for _, off := range []int64{0, size / 2, size} {
			err := call(off, 0)
			if err == nil || ro && writes[name] && errors.Is(err, image.ErrReadOnly) ||
				name == "TryReadAt" && errors.Is(err, image.ErrWouldBlock) {
				continue
			}
			return fmt.Errorf("%s(%d+0), which asks for nothing: %v", name, off, err)
		}
	}
	if _, err := d.AppendExtents(nil, 0, math.MaxInt64, 0); size > 0 && !errors.Is(err, image.ErrOutOfRange) {
		return fmt.Errorf("AppendExtents far past the end: %v", err)
	}
	return d.compareAll()
}

// stretches are ranges of a device of size bytes that lie badly.
func stretches(size int64) (all [][2]int64) {
	for _, off := range []int64{0, 1, 511, 512, 513, 4095, 4096, 65535, 65536, 65537, size / 3, size / 2, size - 513, size - 512, size - 1} {
		for _, n := range []int64{1, 2, 511, 512, 513, 4096, 65536, 65537, 200000, size} {
			if off >= 0 && off < size && n <= size-off {
				all = append(all, [2]int64{off, n})
			}
		}
	}
	return all
}

func checkContent(d *disk) error {
	for _, s := range stretches(d.size()) {
		if err := d.compare(s[0], s[1]); err != nil {
			return err
		}
	}
	return nil
}

func checkExtents(d *disk) error {
	for want := image.Want(0); want <= wantAll; want++ {
		for _, s := range stretches(d.size()) {
			if err := d.compareExtents(s[0], s[1], want); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkPin(d *disk) error {
	var pins []image.Pin
	for range 3 {
		pins = append(pins, d.Pin())
	}
	if err := d.compareAll(); err != nil {
		return err
	}
	for _, p := range pins {
		p.Release()
	}
	image.Pin{}.Release()
	return d.compareAll()
}

func checkReadOnly(d *disk) error {
	if !d.Info().ReadOnly {
		return nil
	}
	call := calls(d)
	for name := range writes {
		if err := call[name](0, min(512, d.size())); !errors.Is(err, image.ErrReadOnly) {
			return fmt.Errorf("%s on a read-only device: %v, not %v", name, err, image.ErrReadOnly)
		}
	}
	if err := d.Flush(); err != nil {
		return fmt.Errorf("Flush of a read-only device: %w", err)
	}
	return d.compareAll()
}

func checkClosed(d *disk) error {
	dev, ro := d.Device, d.Info().ReadOnly
	if err := d.close(); err != nil {
		return err
	}
	all := calls(dev)
	all["Flush"] = func(_, _ int64) error { return dev.Flush() }
	all["Close"] = func(_, _ int64) error { return dev.Close() }
	if d.size() == 0 {
		return nil
	}
	for name, call := range all {
		err := call(0, 1)
		if errors.Is(err, fs.ErrClosed) ||
			ro && writes[name] && errors.Is(err, image.ErrReadOnly) ||
			name == "TryReadAt" && errors.Is(err, image.ErrWouldBlock) {
			continue
		}
		return fmt.Errorf("%s after Close: %v, not %v", name, err, fs.ErrClosed)
	}
	return nil
}

// whileClosing runs call in several goroutines until it is refused, and closes
// the device in their midst.
func whileClosing(d *disk, call func(worker int) error) error {
	const workers = 8
	errs := make([]error, workers)
	var wg, begun sync.WaitGroup
	begun.Add(workers)
	for i := range workers {
		wg.Go(func() {
			for first := true; ; first = false {
				err := call(i)
				if first {
					begun.Done()
				}
				if err != nil {
					if !errors.Is(err, fs.ErrClosed) {
						errs[i] = err
					}
					return
				}
			}
		})
	}
	begun.Wait()
	err := d.close()
	wg.Wait()
	return errors.Join(append(errs, err)...)
}

func checkCloseWhileReading(d *disk) error {
	dev, size := d.Device, d.size()
	if size == 0 {
		return nil
	}
	return whileClosing(d, func(i int) error {
		n := min(size, 8192)
		off := (size - n) / 8 * int64(i)
		p := make([]byte, n)
		if _, err := dev.ReadAt(p, off); err != nil {
			return err
		}
		if err := differ("ReadAt", p, d.want[off:off+n], off); err != nil {
			return err
		}
		_, err := dev.AppendExtents(nil, off, n, wantAll)
		return err
	})
}
