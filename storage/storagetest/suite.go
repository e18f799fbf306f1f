// Package storagetest tests Stores, and is what tests build on that need one:
// a store in memory, one that fails when told to, one that records what
// happens to it, and the disks that a power cut may leave behind.
package storagetest

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

// A Target says how Run gets the stores that it tests. It closes what it got;
// closing twice must do no harm, so New may close in a cleanup too.
type Target struct {
	// New returns a store of size bytes, a multiple of 64 KiB, to be read and
	// written. It may grow unless its Info says otherwise; what it holds does
	// not matter. nil: there are none, as nothing can be written.
	New func(t testing.TB, size int64) storage.Store

	// NewReadOnly returns a store that holds content and can only be read.
	// nil: there is none.
	NewReadOnly func(t testing.TB, content []byte) storage.Store

	// Reopen opens again what a store of New held, after it was closed. nil:
	// that is gone.
	Reopen func(t testing.TB, closed storage.Store) storage.Store
}

// Run tests that the stores of a target keep the contract of storage.Store.
func Run(t *testing.T, target Target) {
	for _, c := range checks {
		if c.of(target) {
			t.Run(c.name, func(t *testing.T) { c.run(t, target) })
		}
	}
}

// A check is one part of the suite. It passes where it does not apply.
type check struct {
	name string
	of   func(Target) bool // whether the target has what it needs
	run  func(testing.TB, Target)
}

func writable(t Target) bool   { return t.New != nil }
func readOnly(t Target) bool   { return t.NewReadOnly != nil }
func reopenable(t Target) bool { return t.New != nil && t.Reopen != nil }

var checks = []check{
	{"Info", writable, checkInfo},
	{"Bounds", writable, checkBounds},
	{"ReadWrite", writable, checkReadWrite},
	{"End", writable, checkEnd},
	{"Growth", writable, checkGrowth},
	{"FixedSize", writable, checkFixedSize},
	{"Truncate", writable, checkTruncate},
	{"WriteZeroes", writable, checkWriteZeroes},
	{"WriteZeroesGrows", writable, checkWriteZeroesGrows},
	{"Discard", writable, checkDiscard},
	{"Extents", writable, checkExtents},
	{"TryRead", writable, checkTryRead},
	{"File", writable, checkFile},
	{"Closed", writable, checkClosed},
	{"CloseWhileUsed", writable, checkCloseWhileUsed},
	{"Concurrent", writable, checkConcurrent},
	{"ConcurrentGrowth", writable, checkConcurrentGrowth},
	{"ConcurrentExtents", writable, checkConcurrentExtents},
	{"Reopen", reopenable, checkReopen},
	{"ReadOnly", readOnly, checkReadOnly},
	{"ReadOnlyClosed", readOnly, checkReadOnlyClosed},
}

const kib, mib = 1 << 10, 1 << 20

// A model is a store with what it ought to hold.
type model struct {
	testing.TB
	s    storage.Store
	want []byte
}

// newModel fills a new store with random bytes.
func newModel(t testing.TB, target Target, size int64) *model {
	t.Helper()
	m := &model{TB: t, s: open(t, target, size), want: random(size)}
	m.pass(m.s.WriteAt(m.want, 0, 0))
	return m
}

// open returns a new store, which is closed at the end.
func open(t testing.TB, target Target, size int64) storage.Store {
	t.Helper()
	s := target.New(t, size)
	t.Cleanup(func() { s.Close() })
	if got, err := s.Size(); err != nil || got != size {
		t.Fatalf("a new store of %d bytes has the size %d (error %v)", size, got, err)
	}
	return s
}

// random returns n bytes, up to 2 MiB, the same each time. None is zero, so
// that whatever was lost shows.
func random(n int64) []byte { return bytes.Clone(noise()[:n]) }

var noise = sync.OnceValue(func() []byte {
	p := make([]byte, 2*mib)
	rand.NewChaCha8([32]byte{1}).Read(p)
	for i := range p {
		p[i] |= 1
	}
	return p
})

func (m *model) pass(err error) {
	m.Helper()
	if err != nil {
		m.Fatalf("unexpected error: %v", err)
	}
}

func (m *model) fail(what string, err, want error) {
	m.Helper()
	if !errors.Is(err, want) {
		m.Errorf("%s: error %v, want %v", what, err, want)
	}
}

// write writes p to both, growing the model as a store does.
func (m *model) write(p []byte, off int64, flags storage.WriteFlags) {
	m.Helper()
	kept := bytes.Clone(p)
	m.pass(m.s.WriteAt(p, off, flags))
	if !bytes.Equal(kept, p) {
		m.Fatalf("WriteAt changed the bytes that it was given")
	}
	m.grow(off + int64(len(p)))
	copy(m.want[off:], p)
	clear(p) // whoever keeps it keeps zeros
}

func (m *model) zero(off, n int64) {
	m.grow(off + n)
	clear(m.want[off : off+n])
}

func (m *model) grow(size int64) {
	if extra := size - int64(len(m.want)); extra > 0 {
		m.want = append(m.want, make([]byte, extra)...)
	}
}

// verify compares everything, the size included.
func (m *model) verify(after string) {
	m.Helper()
	size, err := m.s.Size()
	m.pass(err)
	if size != int64(len(m.want)) {
		m.Fatalf("%s: the size is %d, want %d", after, size, len(m.want))
	}
	got := make([]byte, size+1)
	n, err := m.s.ReadAt(got, 0)
	if int64(n) != size || err != io.EOF {
		m.Fatalf("%s: reading everything and one byte: %d bytes and error %v, want %d and EOF", after, n, err, size)
	}
	if i := firstDifference(got[:n], m.want); i >= 0 {
		m.Fatalf("%s: byte %d is %#x, want %#x", after, i, got[i], m.want[i])
	}
}

// firstDifference returns where a differs from b, which is no shorter, or -1.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b[:len(a)]) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func checkInfo(t testing.TB, target Target) {
	s := open(t, target, mib)
	i := s.Info()
	switch {
	case i.URL == nil:
		t.Error("no URL")
	case i.Alignment < 1:
		t.Errorf("Alignment %d", i.Alignment)
	case i.PreferredIO < i.Alignment:
		t.Errorf("PreferredIO %d below Alignment %d", i.PreferredIO, i.Alignment)
	case i.MaxIO != 0 && i.MaxIO < i.PreferredIO:
		t.Errorf("MaxIO %d below PreferredIO %d", i.MaxIO, i.PreferredIO)
	case i.QueueDepth < 1:
		t.Errorf("QueueDepth %d", i.QueueDepth)
	case i.ReadOnly:
		t.Error("ReadOnly, but New returns what can be written")
	}
	if other := open(t, target, mib).Info(); i.ID != "" && i.ID == other.ID {
		t.Errorf("two stores have the identity %q", i.ID)
	}
	if s.Info() != i {
		t.Errorf("Info changes: %+v, then %+v", i, s.Info())
	}
}

func checkBounds(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	for _, r := range []struct{ off, n int64 }{{-1, 1}, {-512, 1024}, {math.MaxInt64, 1}, {math.MaxInt64 - 10, 20}, {math.MinInt64, 5}} {
		p := make([]byte, r.n)
		_, err := m.s.ReadAt(p, r.off)
		m.fail("ReadAt", err, storage.ErrOutOfRange)
		m.fail("TryReadAt", m.s.TryReadAt(p, r.off), storage.ErrOutOfRange)
		m.fail("WriteAt", m.s.WriteAt(p, r.off, 0), storage.ErrOutOfRange)
		m.fail("WriteZeroes", m.s.WriteZeroes(r.off, r.n, 0), storage.ErrOutOfRange)
		m.fail("Discard", m.s.Discard(r.off, r.n), storage.ErrOutOfRange)
		_, err = m.s.AppendExtents(nil, r.off, r.n)
		m.fail("AppendExtents", err, storage.ErrOutOfRange)
	}
	m.fail("WriteZeroes of a negative length", m.s.WriteZeroes(5, -1, 0), storage.ErrOutOfRange)
	m.fail("Discard of a negative length", m.s.Discard(5, -1), storage.ErrOutOfRange)
	m.fail("Truncate to a negative size", m.s.Truncate(-1), storage.ErrOutOfRange)
	_, err := m.s.AppendExtents(nil, 5, -1)
	m.fail("AppendExtents of a negative length", err, storage.ErrOutOfRange)

	for _, off := range []int64{0, 1, 64 * kib} {
		n, err := m.s.ReadAt(nil, off)
		if n != 0 || err != nil && err != io.EOF {
			t.Errorf("reading nothing: %d, %v", n, err)
		}
		m.pass(m.s.WriteAt(nil, off, storage.FUA))
		m.pass(m.s.WriteZeroes(off, 0, storage.MayUnmap))
		m.pass(m.s.Discard(off, 0))
	}
	m.pass(m.s.WriteAt(nil, 100*kib, 0))
	m.pass(m.s.WriteZeroes(100*kib, 0, 0))
	m.pass(m.s.Discard(100*kib, 5))
	m.pass(m.s.Discard(63*kib, 0))
	m.verify("operations of length 0")
}

// spans are ranges of many alignments within 1 MiB.
func spans(count int) (in []struct{ off, n int64 }) {
	r := rand.New(rand.NewPCG(1, 2))
	add := func(off, n int64) { in = append(in, struct{ off, n int64 }{off, n}) }
	for _, n := range []int64{1, 511, 512, 513, 4095, 4096, 4097, 65536, 300000} {
		for _, off := range []int64{0, 1, 511, 512, 4095, 4096, 8193, 65536 - 1} {
			add(off, n)
		}
	}
	for len(in) < count {
		off := r.Int64N(mib)
		add(off, 1+r.Int64N(min(mib-off, 1<<(1+r.IntN(19)))))
	}
	r.Shuffle(len(in), func(i, j int) { in[i], in[j] = in[j], in[i] })
	return in[:count]
}

func checkReadWrite(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	m.verify("the first write")
	data := random(2 * mib)
	for i, r := range spans(160) {
		flags := storage.WriteFlags(0)
		if i%16 == 0 {
			flags = storage.FUA
		}
		from := int64(i * 1021)
		m.write(bytes.Clone(data[from:from+r.n]), r.off, flags)

		// A few bytes more on both sides, at an address of its own alignment.
		start, end := max(r.off-3, 0), min(r.off+r.n+5, mib)
		p := make([]byte, end-start+16)[i%16:][:end-start]
		n, err := m.s.ReadAt(p, start)
		if n != len(p) || err != nil && err != io.EOF {
			t.Fatalf("ReadAt of %d bytes at %d: %d, %v", len(p), start, n, err)
		}
		if j := firstDifference(p, m.want[start:end]); j >= 0 {
			t.Fatalf("after writing %d bytes at %d, byte %d is %#x, want %#x",
				r.n, r.off, start+int64(j), p[j], m.want[start+int64(j)])
		}
	}
	m.pass(m.s.Sync())
	m.verify("many writes")
}

func checkEnd(t testing.TB, target Target) {
	sizes := []int64{64 * kib}
	if !open(t, target, 64*kib).Info().FixedSize {
		sizes = append(sizes, 1, 511, 513, 4097, 64*kib-1)
	}
	for _, size := range sizes {
		m := newModel(t, target, 64*kib)
		if size != 64*kib {
			m.pass(m.s.Truncate(size))
			m.want = m.want[:size]
		}
		for _, r := range []struct{ off, n, want int64 }{
			{0, size, size}, {0, size + 1, size}, {size - 1, 1, 1}, {size - 1, 2, 1}, {size - 1, 9000, 1},
			{size / 2, size, size - size/2}, {size, 1, 0}, {size + 1, 5, 0}, {size + 1<<40, 4096, 0},
		} {
			p := bytes.Repeat([]byte{0}, int(r.n))
			n, err := m.s.ReadAt(p, r.off)
			switch {
			case int64(n) != r.want:
				t.Errorf("size %d: ReadAt of %d at %d: %d bytes, want %d", size, r.n, r.off, n, r.want)
			case r.want < r.n && err != io.EOF, r.want == r.n && err != nil && err != io.EOF:
				t.Errorf("size %d: ReadAt of %d at %d: error %v", size, r.n, r.off, err)
			case n > 0 && !bytes.Equal(p[:n], m.want[r.off:r.off+r.want]):
				t.Errorf("size %d: ReadAt of %d at %d: wrong bytes", size, r.n, r.off)
			}
			err = m.s.TryReadAt(p, r.off)
			if !errors.Is(err, storage.ErrWouldBlock) && (r.want < r.n && err != io.EOF || r.want == r.n && err != nil) {
				t.Errorf("size %d: TryReadAt of %d at %d: error %v", size, r.n, r.off, err)
			}
		}
		m.verify("reading past the end")
	}
}

func checkGrowth(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if m.s.Info().FixedSize {
		return // it cannot grow
	}
	data := random(256 * kib)
	for i, step := range []struct{ gap, n int64 }{
		{0, 1}, {0, 511}, {1, 512}, {3000, 4096}, {4096, 4096}, {0, 100}, {123456, 7}, {512, 70000}, {1, 1},
	} {
		flags := storage.WriteFlags(0)
		if i%3 == 2 {
			flags = storage.FUA
		}
		m.write(bytes.Clone(data[:step.n]), int64(len(m.want))+step.gap, flags)
		m.verify("growing by a write")
	}
	// What is within and what is past the end, by one write.
	m.write(bytes.Clone(data[:5000]), int64(len(m.want))-3333, 0)
	m.verify("a write across the end")
}
