package storagetest

import (
	"errors"
	"io"
	"io/fs"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/storage"
)

// walkExtents asks for [off, off+n) until it is described, and compares every
// hole with what the store ought to hold.
func (m *model) walkExtents(off, n int64) {
	m.Helper()
	end := min(off+n, int64(len(m.want)))
	before := storage.Extent{Offset: 1, Length: 2}
	for off < end {
		got, err := m.s.AppendExtents([]storage.Extent{before}, off, end-off)
		m.pass(err)
		if len(got) < 2 || got[0] != before {
			m.Fatalf("AppendExtents at %d, size %d: nothing was appended to what was there: %v", off, len(m.want), got)
		}
		for _, e := range got[1:] {
			if e.Offset != off || e.Length <= 0 || e.Length > end-off {
				m.Fatalf("AppendExtents: extent %+v does not follow at %d or passes the end %d: %v", e, off, end, got)
			}
			if e.Hole {
				held := m.want[off : off+e.Length]
				if i := firstDifference(held, make([]byte, len(held))); i >= 0 {
					m.Fatalf("AppendExtents: hole %+v, but byte %d is data", e, off+int64(i))
				}
			}
			off += e.Length
		}
	}
}

func checkExtents(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	m.walkExtents(0, mib)
	for i, r := range spans(60) {
		switch i % 4 {
		case 0:
			m.pass(m.s.WriteZeroes(r.off, r.n, storage.MayUnmap))
			m.zero(r.off, r.n)
		case 1:
			m.write(random(r.n), r.off, 0)
		case 2:
			m.pass(m.s.WriteZeroes(r.off, r.n, 0))
			m.zero(r.off, r.n)
		case 3:
			m.pass(m.s.Discard(r.off, r.n))
			if _, err := m.s.ReadAt(m.want, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
		m.walkExtents(0, mib)
		m.walkExtents(r.off, r.n)
		m.walkExtents(max(r.off-1, 0), r.n+2)
		m.walkExtents(r.off, 1)
	}
	for _, r := range []struct{ off, n int64 }{{mib, 1}, {mib + 5, 100}, {2 * mib, mib}} {
		got, err := m.s.AppendExtents(nil, r.off, r.n)
		m.pass(err)
		if len(got) != 0 {
			t.Errorf("AppendExtents past the end: %v", got)
		}
	}
	m.walkExtents(mib-1, 100)
	if m.s.Info().FixedSize {
		return
	}
	m.write(random(3), 5*mib+1, 0)
	m.walkExtents(0, 100*mib)
	m.walkExtents(mib, 4*mib)
}

func tryRead(m *model, count int) {
	m.Helper()
	for _, r := range spans(count) {
		off := r.off % int64(len(m.want))
		n := min(r.n, int64(len(m.want))-off)
		p := make([]byte, n)
		switch err := m.s.TryReadAt(p, off); {
		case errors.Is(err, storage.ErrWouldBlock):
			if _, err := m.s.ReadAt(p, off); err != nil && err != io.EOF {
				m.Fatal(err)
			}
		case err != nil:
			m.Fatalf("TryReadAt of %d at %d: %v", n, off, err)
		}
		if i := firstDifference(p, m.want[off:off+n]); i >= 0 {
			m.Fatalf("TryReadAt of %d at %d: byte %d is %#x, want %#x", n, off, off+int64(i), p[i], m.want[off+int64(i)])
		}
	}
}

func checkTryRead(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	tryRead(m, 200)
	m.pass(m.s.WriteZeroes(3000, 500000, storage.MayUnmap))
	m.zero(3000, 500000)
	tryRead(m, 100)
	if !m.s.Info().FixedSize {
		m.pass(m.s.Truncate(70001))
		m.want = m.want[:70001]
		tryRead(m, 100)
	}
}

// checkFile compares what is sent from File with what ReadAt says.
func checkFile(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if m.s.File() == nil {
		return
	}
	m.write(random(5000), 777, 0)
	m.pass(m.s.WriteZeroes(20000, 30000, storage.MayUnmap))
	m.zero(20000, 30000)
	got := make([]byte, len(m.want))
	if n, err := m.s.File().ReadAt(got, 0); n != len(got) {
		t.Fatal(err)
	}
	if i := firstDifference(got, m.want); i >= 0 {
		t.Errorf("the file has %#x at byte %d, the store %#x", got[i], i, m.want[i])
	}
}

// closed tests that every method refuses.
func closed(t testing.TB, s storage.Store) {
	t.Helper()
	p := make([]byte, 100)
	_, readErr := s.ReadAt(p, 0)
	_, sizeErr := s.Size()
	_, extentsErr := s.AppendExtents(nil, 0, 100)
	for _, c := range []struct {
		method string
		writes bool
		err    error
	}{
		{"ReadAt", false, readErr}, {"Size", false, sizeErr}, {"AppendExtents", false, extentsErr},
		{"TryReadAt", false, s.TryReadAt(p, 0)},
		{"WriteAt", true, s.WriteAt(p, 0, 0)},
		{"WriteZeroes", true, s.WriteZeroes(0, 100, 0)},
		{"Discard", true, s.Discard(0, 100)},
		{"Truncate", true, s.Truncate(100)},
		{"Close", false, s.Close()},
	} {
		if c.writes && s.Info().ReadOnly && errors.Is(c.err, storage.ErrReadOnly) {
			continue
		}
		if !errors.Is(c.err, fs.ErrClosed) {
			t.Errorf("%s after Close: error %v, want %v", c.method, c.err, fs.ErrClosed)
		}
	}
	if !s.Info().ReadOnly {
		if err := s.Sync(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("Sync after Close: error %v, want %v", err, fs.ErrClosed)
		}
	}
}

func checkClosed(t testing.TB, target Target) {
	s := open(t, target, 64*kib)
	before := s.Info()
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	closed(t, s)
	if d := cmp.Diff(before, s.Info()); d != "" {
		t.Errorf("Info changed by Close: %s", d)
	}
}
