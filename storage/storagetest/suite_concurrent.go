package storagetest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

const workers = 64

// together runs f in many goroutines. f returns what is wrong; it may not
// call t.Fatal.
func together(t testing.TB, count int, f func(worker int) error) {
	t.Helper()
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("goroutine %d: %v", i, err)
		}
	}
}

// checkConcurrent gives each goroutine a range of its own that shares sectors
// and pages with its neighbours'. What one does must never show in another's.
func checkConcurrent(t testing.TB, target Target) {
	const each = 1021
	m := newModel(t, target, 128*kib)
	together(t, workers, func(w int) error {
		r := rand.New(rand.NewPCG(uint64(w), 7))
		base := int64(w * each)
		mine := m.want[base : base+each]
		p := make([]byte, each)
		for range 40 {
			off := r.Int64N(each)
			n := 1 + r.Int64N(each-off)
			var err error
			switch r.IntN(10) {
			case 0, 1, 2, 3:
				for i := range p[:n] {
					p[i] = byte(r.Uint32() | 1)
				}
				err = m.s.WriteAt(p[:n], base+off, storage.WriteFlags(r.IntN(16)/15)*storage.FUA)
				copy(mine[off:], p[:n])
			case 4:
				err = m.s.WriteZeroes(base+off, n, storage.MayUnmap)
				clear(mine[off : off+n])
			case 5:
				err = m.s.WriteZeroes(base+off, n, 0)
				clear(mine[off : off+n])
			case 6:
				if err = m.s.Discard(base+off, n); err == nil {
					err = m.adopt(mine[off:off+n], base+off)
				}
			case 7:
				_, err = m.s.AppendExtents(nil, base+off, n)
			case 8:
				if r.IntN(8) == 0 {
					err = m.s.Sync()
				}
			case 9:
				if err = m.s.TryReadAt(p[:n], base+off); err == nil && !bytes.Equal(p[:n], mine[off:off+n]) {
					err = errors.New("TryReadAt returned other bytes")
				} else if errors.Is(err, storage.ErrWouldBlock) {
					err = nil
				}
			}
			if err != nil {
				return err
			}
			if _, err := m.s.ReadAt(p, base); err != nil {
				return err
			}
			if i := firstDifference(p, mine); i >= 0 {
				return errors.New("a range was changed by work on its neighbours")
			}
		}
		return nil
	})
	m.verify("concurrent work side by side")
}

// adopt takes over what the store made of a discarded range.
func (m *model) adopt(mine []byte, off int64) error {
	p := make([]byte, len(mine))
	if _, err := m.s.ReadAt(p, off); err != nil && err != io.EOF {
		return err
	}
	for i, b := range p {
		if b != 0 && b != mine[i] {
			return errors.New("Discard left other bytes")
		}
	}
	copy(mine, p)
	return nil
}

// checkConcurrentGrowth lets many calls lengthen a store at once: none may cut
// off what another has written.
func checkConcurrentGrowth(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if m.s.Info().FixedSize {
		return // it cannot grow
	}
	const piece = 1543
	order := rand.New(rand.NewPCG(3, 4)).Perm(workers * 8)
	base := int64(len(m.want))
	m.grow(base + int64(len(order))*piece)
	data := random(piece)
	var next atomic.Int64
	together(t, workers, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(order) {
				return nil
			}
			off := base + int64(order[i])*piece
			var err error
			switch order[i] % 4 {
			case 0:
				err = m.s.WriteZeroes(off, piece, storage.MayUnmap)
			case 1:
				err = m.s.WriteZeroes(off, piece, 0)
			default:
				err = m.s.WriteAt(data, off, 0)
				copy(m.want[off:], data)
			}
			if err != nil {
				return err
			}
		}
	})
	m.verify("growing from many sides")
}

// checkConcurrentExtents asks for extents while holes come and go. The answers
// must tile, end, and never call a hole what is always data.
func checkConcurrentExtents(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	var stop atomic.Bool
	var wg sync.WaitGroup
	page := random(64 * kib)
	wg.Go(func() {
		defer stop.Store(true)
		for i := range 300 {
			// Only odd pieces of 64 KiB change.
			off := int64(i%8)*128*kib + 64*kib
			err := m.s.WriteZeroes(off, 64*kib, storage.MayUnmap)
			if err == nil && i%3 != 0 {
				err = m.s.WriteAt(page, off, 0)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	var exts []storage.Extent
	for !stop.Load() {
		for off := int64(0); off < mib; {
			var err error
			exts, err = m.s.AppendExtents(exts[:0], off, mib-off)
			if err != nil || len(exts) == 0 {
				t.Errorf("AppendExtents during changes: %d extents, error %v", len(exts), err)
				stop.Store(true)
				break
			}
			for _, e := range exts {
				if e.Offset != off || e.Length <= 0 || off+e.Length > mib {
					t.Errorf("AppendExtents during changes: %+v at %d", e, off)
				}
				if e.Hole && (e.Offset/(64*kib)%2 == 0 || e.Length > 64*kib) {
					t.Errorf("AppendExtents during changes: hole %+v over what is always data", e)
				}
				off += max(e.Length, 1)
			}
		}
		runtime.Gosched()
	}
	wg.Wait()
}

// checkCloseWhileUsed closes a store that is in use. A call that begins after
// Close has returned must be refused; one that began before may do either, but
// not fail otherwise.
func checkCloseWhileUsed(t testing.TB, target Target) {
	for range 5 {
		s := open(t, target, 64*kib)
		var after atomic.Bool
		var busy sync.WaitGroup
		busy.Add(workers)
		var once [workers]sync.Once
		go func() {
			busy.Wait()
			if err := s.Close(); err != nil {
				t.Errorf("Close of a store in use: %v", err)
			}
			after.Store(true)
		}()
		together(t, workers, func(w int) error {
			defer once[w].Do(busy.Done)
			p := make([]byte, 700)
			for {
				late := after.Load()
				var err error
				off := int64(w * 700)
				switch w % 8 {
				case 0, 1:
					_, err = s.ReadAt(p, off)
				case 2, 3:
					err = s.WriteAt(p, off, 0)
				case 4:
					err = s.WriteZeroes(off, 700, storage.MayUnmap)
				case 5:
					_, err = s.AppendExtents(nil, off, 700)
				case 6:
					if err = s.TryReadAt(p, off); errors.Is(err, storage.ErrWouldBlock) {
						err = nil
					}
				case 7:
					_, err = s.Size()
				}
				once[w].Do(busy.Done)
				switch {
				case errors.Is(err, fs.ErrClosed):
					return nil
				case err != nil:
					return err
				case late:
					return errors.New("a call that began after Close succeeded")
				}
				runtime.Gosched()
			}
		})
	}
}
