package imagetest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/imgnbd/imgnbd/image"
)

// fill makes the bytes that the write number id puts at [off, off+n). They
// depend on the place, so that misplaced ones show.
func fill(id uint64, off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = fillByte(id, off+int64(i))
	}
	return p
}

func fillByte(id uint64, off int64) byte {
	x := (uint64(off) + id*0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9
	x ^= x >> 29
	return byte(x*0x94d049bb133111eb>>56) | 1 // never zero
}

func (d *disk) write(id uint64, off, n int64, flags image.WriteFlags) error {
	p := fill(id, off, n)
	if err := d.WriteAt(p, off, flags); err != nil {
		return fmt.Errorf("WriteAt(%#x+%#x): %w", off, n, err)
	}
	copy(d.want[off:], p)
	return nil
}

// around compares a range, a little more than it, and what is said of it.
func (d *disk) around(off, n int64) error {
	if err := d.compare(off-600, n+1200); err != nil {
		return err
	}
	lo := max(off-600, 0)
	return d.compareExtents(lo, min(off+n+600, d.size())-lo, wantAll)
}

func checkWrite(d *disk) error {
	for i, s := range stretches(d.size()) {
		var flags image.WriteFlags
		if i%5 == 0 {
			flags = image.FUA
		}
		if err := d.write(uint64(i), s[0], s[1], flags); err != nil {
			return err
		}
		if err := d.around(s[0], s[1]); err != nil {
			return err
		}
	}
	if err := d.Flush(); err != nil {
		return fmt.Errorf("Flush: %w", err)
	}
	return d.compareAll()
}

func checkWriteZeroes(d *disk) error {
	for i, s := range stretches(d.size()) {
		if i%7 == 0 {
			if err := d.write(uint64(i), 0, d.size(), 0); err != nil {
				return err
			}
		}
		flags := []image.WriteFlags{0, image.FUA, image.MayUnmap, image.FUA | image.MayUnmap}[i%4]
		if err := d.WriteZeroes(s[0], s[1], flags); err != nil {
			return fmt.Errorf("WriteZeroes(%#x+%#x, %d): %w", s[0], s[1], flags, err)
		}
		clear(d.want[s[0] : s[0]+s[1]])
		if err := d.around(s[0], s[1]); err != nil {
			return err
		}
	}
	return d.compareAll()
}

func checkFastZeroes(d *disk) error {
	for i, s := range stretches(d.size()) {
		if i%7 == 0 {
			if err := d.write(uint64(i), 0, d.size(), 0); err != nil {
				return err
			}
		}
		flags := image.FastOnly
		if i%2 == 0 {
			flags |= image.MayUnmap
		}
		switch err := d.WriteZeroes(s[0], s[1], flags); {
		case err == nil:
			clear(d.want[s[0] : s[0]+s[1]])
		case !errors.Is(err, errors.ErrUnsupported): // it may refuse, having changed nothing
			return fmt.Errorf("WriteZeroes(%#x+%#x, %d): %w", s[0], s[1], flags, err)
		}
		if err := d.around(s[0], s[1]); err != nil {
			return err
		}
	}
	return d.compareAll()
}

func checkDiscard(d *disk) error {
	for i, s := range stretches(d.size()) {
		if i%7 == 0 {
			if err := d.write(uint64(i), 0, d.size(), 0); err != nil {
				return err
			}
		}
		off, n := s[0], s[1]
		if err := d.Discard(off, n); err != nil {
			return fmt.Errorf("Discard(%#x+%#x): %w", off, n, err)
		}
		got := make([]byte, n)
		if _, err := d.ReadAt(got, off); err != nil {
			return err
		}
		for j := range got {
			if got[j] == 0 {
				d.want[off+int64(j)] = 0
			}
		}
		if err := d.around(off, n); err != nil {
			return fmt.Errorf("after Discard(%#x+%#x): %w", off, n, err)
		}
	}
	return d.compareAll()
}

// checkFragments gives the device more extents than one answer may have.
func checkFragments(d *disk) error {
	if err := d.WriteZeroes(0, d.size(), image.MayUnmap); err != nil {
		return fmt.Errorf("WriteZeroes of everything: %w", err)
	}
	clear(d.want)
	for off := int64(0); off < d.size(); off += 8192 {
		if err := d.write(uint64(off), off, min(512, d.size()-off), 0); err != nil {
			return err
		}
	}
	return d.compareAll()
}

func checkWhole(d *disk) error {
	if err := d.write(1, 0, d.size(), 0); err != nil {
		return err
	}
	if err := d.compareAll(); err != nil {
		return err
	}
	if err := d.WriteZeroes(0, d.size(), image.MayUnmap); err != nil {
		return fmt.Errorf("WriteZeroes of all: %w", err)
	}
	clear(d.want)
	return d.compareAll()
}

// checkBuffers: no slice is kept, and none that is only read is changed.
func checkBuffers(d *disk) error {
	n := min(d.size(), 100_000)
	p := fill(7, 0, n)
	if err := d.WriteAt(p, 0, 0); err != nil {
		return fmt.Errorf("WriteAt: %w", err)
	}
	if !bytes.Equal(p, fill(7, 0, n)) {
		return errors.New("WriteAt changed the buffer of its caller")
	}
	copy(d.want, p)
	clear(p)
	if _, err := d.ReadAt(p, 0); err != nil {
		return err
	}
	for i := range p {
		p[i] ^= 0xff
	}
	if err := d.reopen(); err != nil {
		return err
	}
	return d.compareAll()
}

func checkReopen(d *disk) error {
	for i, s := range stretches(d.size()) {
		if i%3 == 0 {
			if err := d.write(uint64(i), s[0], s[1], 0); err != nil {
				return err
			}
		}
		if i%40 == 0 {
			if err := d.reopen(); err != nil {
				return err
			}
			if err := d.compareAll(); err != nil {
				return fmt.Errorf("after reopening: %w", err)
			}
		}
	}
	return d.compareAll()
}

// checkDisjoint lets 64 goroutines work, each on bytes of its own that lie
// between those of others: whatever a device does in larger units has to be
// done without touching them.
func checkDisjoint(d *disk) error {
	const workers, slot = 64, 700
	slots := d.size() / slot
	if slots < workers {
		return nil
	}
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			errs[w] = func() error {
				rnd := rand.New(rand.NewPCG(uint64(w), 1))
				for step := range 30 {
					off := (rnd.Int64N((slots-int64(w)+workers-1)/workers)*workers + int64(w)) * slot
					a := rnd.Int64N(slot)
					at, n := off+a, 1+rnd.Int64N(slot-a)
					mine := d.want[at : at+n]
					switch rnd.IntN(6) {
					case 0, 1, 2:
						p := fill(uint64(w*1000+step), at, n)
						if err := d.WriteAt(p, at, 0); err != nil {
							return err
						}
						copy(mine, p)
					case 3:
						if err := d.WriteZeroes(at, n, image.MayUnmap); err != nil {
							return err
						}
						clear(mine)
					case 4:
						if err := d.Flush(); err != nil {
							return err
						}
					case 5:
						if _, err := tiles(d.Device, at, n, wantAll); err != nil {
							return err
						}
					}
					got := make([]byte, n)
					if _, err := d.ReadAt(got, at); err != nil {
						return err
					}
					if err := differ("ReadAt among other requests", got, mine, at); err != nil {
						return err
					}
				}
				return nil
			}()
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return d.compareAll()
}

// checkOverlap lets writers meet. Every byte has to come from one of them.
func checkOverlap(d *disk) error {
	const workers = 8
	n := min(d.size(), 150_000)
	for round := range 5 {
		var wg sync.WaitGroup
		errs := make([]error, workers)
		for w := range workers {
			wg.Go(func() {
				off := n / (2 * workers) * int64(w)
				errs[w] = d.WriteAt(fill(uint64(round*workers+w), off, n-off), off, 0)
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		if _, err := d.ReadAt(d.want[:n], 0); err != nil {
			return err
		}
	bytes:
		for off := range n {
			for w := range workers {
				if off >= n/(2*workers)*int64(w) && d.want[off] == fillByte(uint64(round*workers+w), off) {
					continue bytes
				}
			}
			return fmt.Errorf("byte %#x is %#02x, which nobody wrote", off, d.want[off])
		}
	}
	return d.compareAll()
}

func checkCloseWhileWriting(d *disk) error {
	dev, size := d.Device, d.size()
	const workers = 8
	slot := size / workers
	if slot == 0 {
		return nil
	}
	// What returned before Close is there afterwards, and what was refused is not.
	judge := d.Judge
	d.Judge = nil
	var last [workers]uint64
	err := whileClosing(d, func(i int) error {
		id := last[i] + 1
		off := slot * int64(i)
		if err := dev.WriteAt(fill(id*workers+uint64(i), off, min(slot, 5000)), off, 0); err != nil {
			return err
		}
		last[i] = id
		return nil
	})
	if err != nil {
		return err
	}
	for i, id := range last {
		off := slot * int64(i)
		copy(d.want[off:], fill(id*workers+uint64(i), off, min(slot, 5000)))
	}
	d.Judge = judge
	if d.Device, err = d.Open(); err != nil {
		return fmt.Errorf("Open again: %w", err)
	}
	if err := d.compareAll(); err != nil {
		return fmt.Errorf("after Close among writes (the last that returned: %v): %w", last, err)
	}
	return nil
}
