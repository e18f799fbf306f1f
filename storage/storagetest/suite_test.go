package storagetest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imgnbd/imgnbd/storage"
)

// memTarget makes stores in memory, each wrapped.
func memTarget(wrap func(*Mem) storage.Store, opt ...MemOption) Target {
	if wrap == nil {
		wrap = func(m *Mem) storage.Store { return m }
	}
	return Target{
		New: func(_ testing.TB, size int64) storage.Store { return wrap(NewMem(size, opt...)) },
		NewReadOnly: func(_ testing.TB, content []byte) storage.Store {
			return wrap(MemOf(content, append(opt, ReadOnly)...))
		},
	}
}

func TestMem(t *testing.T) {
	for _, opt := range [][]MemOption{{}, {FixedSize}, {NeverTry}, {NoHoles}, {FixedSize, NoHoles, NeverTry}} {
		t.Run(fmt.Sprint(opt), func(t *testing.T) { Run(t, memTarget(nil, opt...)) })
	}
}

func TestFaultWithoutFaults(t *testing.T) {
	Run(t, memTarget(func(m *Mem) storage.Store { return Fault(m, nil) }))
}

func TestRecorderKeepsTheContract(t *testing.T) {
	name := &url.URL{Scheme: "recorder"}
	for _, info := range []storage.Info{{URL: name}, {URL: name, FixedSize: true}, {URL: name, Discard: true, FastZero: true}} {
		Run(t, Target{New: func(_ testing.TB, size int64) storage.Store {
			return new(Log).NewStore(make([]byte, size), info)
		}})
	}
}

// Each of these breaks the contract in one way; named is the check that is to
// notice.
var broken = []struct {
	check string
	wrap  func(storage.Store) storage.Store
}{
	{"Bounds", func(s storage.Store) storage.Store { return &lenient{Store: s} }},
	{"ReadWrite", func(s storage.Store) storage.Store { return &keepsBuffer{Store: s} }},
	{"ReadWrite", func(s storage.Store) storage.Store { return &dropsUnaligned{Store: s} }},
	{"End", func(s storage.Store) storage.Store { return &silentEnd{Store: s} }},
	{"Growth", func(s storage.Store) storage.Store { return &dirtyGap{Store: s} }},
	{"WriteZeroes", func(s storage.Store) storage.Store { return &zeroesTooMuch{Store: s} }},
	{"WriteZeroes", func(s storage.Store) storage.Store { return &halfFast{Store: s} }},
	{"WriteZeroesGrows", func(s storage.Store) storage.Store { return &zeroesWithin{Store: s} }},
	{"Discard", func(s storage.Store) storage.Store { return &discardsOnes{Store: s} }},
	{"Discard", func(s storage.Store) storage.Store { return &discardsTail{Store: s} }},
	{"Extents", func(s storage.Store) storage.Store { return &allHoles{Store: s} }},
	{"Extents", func(s storage.Store) storage.Store { return &coarseExtents{Store: s} }},
	{"Extents", func(s storage.Store) storage.Store { return &truncatesDst{Store: s} }},
	{"TryRead", func(s storage.Store) storage.Store { return &triesTooHard{Store: s} }},
	{"Closed", func(s storage.Store) storage.Store { return &neverClosed{Store: s} }},
	{"Concurrent", func(s storage.Store) storage.Store { return &unlocked{Store: s} }},
	{"ConcurrentGrowth", func(s storage.Store) storage.Store { return &cuts{Store: s} }},
	{"Truncate", func(s storage.Store) storage.Store { return &lazyTruncate{Store: s} }},
	{"ReadOnly", func(s storage.Store) storage.Store { return &silentReadOnly{Store: s} }},
}

type (
	lenient        struct{ storage.Store } // a negative offset is no error
	keepsBuffer    struct{ storage.Store } // writes what the buffer holds later
	dropsUnaligned struct{ storage.Store }
	silentEnd      struct{ storage.Store } // short without EOF
	dirtyGap       struct{ storage.Store }
	zeroesTooMuch  struct{ storage.Store }
	halfFast       struct{ storage.Store } // FastOnly fails, but changed something
	zeroesWithin   struct{ storage.Store }
	discardsOnes   struct{ storage.Store }
	discardsTail   struct{ storage.Store } // makes the store smaller
	allHoles       struct{ storage.Store }
	coarseExtents  struct{ storage.Store } // begins at a page, not at the offset
	truncatesDst   struct{ storage.Store }
	triesTooHard   struct{ storage.Store } // success without the bytes
	neverClosed    struct{ storage.Store }
	unlocked       struct{ storage.Store } // read-modify-write without a lock
	lazyTruncate   struct{ storage.Store } // old bytes come back
	silentReadOnly struct{ storage.Store }

	// cuts grows by Truncate to what it believes. It waits until its belief is
	// wrong, once: that two calls happen to meet is not what a test can rely on.
	cuts struct {
		storage.Store
		written atomic.Int64 // the furthest end of a write
		done    atomic.Bool
	}
)

func (s *lenient) ReadAt(p []byte, off int64) (int, error) { return s.Store.ReadAt(p, max(off, 0)) }

func (s *keepsBuffer) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if len(p) > 4096 {
		defer func() { p = append(p[:4096:4096], make([]byte, len(p)-4096)...); s.Store.WriteAt(p, off, flags) }()
	}
	return nil
}

func (s *dropsUnaligned) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	return s.Store.WriteAt(p[:len(p)&^511], off, flags)
}

func (s *silentEnd) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Store.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

func (s *dirtyGap) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if size, _ := s.Size(); size > 0 && off > size {
		s.Store.WriteAt([]byte{9}, size, 0)
	}
	return s.Store.WriteAt(p, off, flags)
}

func (s *zeroesTooMuch) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	return s.Store.WriteZeroes(off&^511, n+off&511, flags)
}

func (s *halfFast) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	if flags&storage.FastOnly != 0 {
		s.Store.WriteZeroes(off, n/2, 0)
		return errors.ErrUnsupported
	}
	return s.Store.WriteZeroes(off, n, flags)
}

func (s *zeroesWithin) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	size, _ := s.Size()
	return s.Store.WriteZeroes(off, max(0, min(n, size-off)), flags)
}

func (s *discardsOnes) Discard(off, n int64) error { return s.Store.WriteAt([]byte{0xff}, off, 0) }

func (s *discardsTail) Discard(off, n int64) error {
	if size, _ := s.Size(); off+n >= size {
		return s.Truncate(off)
	}
	return s.Store.Discard(off, n)
}

func (s *allHoles) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	size, err := s.Size()
	if n = min(n, size-off); n <= 0 {
		return dst, err
	}
	return append(dst, storage.Extent{Offset: off, Length: n, Hole: true}), err
}

func (s *coarseExtents) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	return s.Store.AppendExtents(dst, off&^4095, n)
}

func (s *truncatesDst) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	return s.Store.AppendExtents(dst[:0], off, n)
}

func (s *triesTooHard) TryReadAt(p []byte, off int64) error { return nil }

func (s *neverClosed) Close() error { return nil }

func (s *unlocked) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	start, end := off&^511, (off+int64(len(p))+511)&^511
	whole := make([]byte, end-start)
	n, _ := s.Store.ReadAt(whole, start)
	time.Sleep(time.Nanosecond) // which, in a bubble of synctest, others come in
	copy(whole[off-start:], p)
	return s.Store.WriteAt(whole[:max(n, int(off-start)+len(p))], start, flags)
}

func (s *cuts) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	err := s.Store.WriteAt(p, off, flags)
	for end := off + int64(len(p)); ; {
		if old := s.written.Load(); old >= end || s.written.CompareAndSwap(old, end) {
			return err
		}
	}
}

func (s *cuts) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	size, err := s.Size()
	if err != nil || off+n <= size {
		return s.Store.WriteZeroes(off, n, flags)
	}
	for s.written.Load() <= off+n && !s.done.Load() {
		runtime.Gosched()
	}
	if s.done.Swap(true) {
		return s.Store.WriteZeroes(off, n, flags)
	}
	return s.Truncate(off + n)
}

func (s *lazyTruncate) Truncate(size int64) error {
	old, _ := s.Size()
	p := make([]byte, old)
	s.ReadAt(p, 0)
	if size >= old {
		p = make([]byte, size-old)
		for i := range p {
			p[i] = 5
		}
		return s.Store.WriteAt(p, old, 0)
	}
	return s.Store.Truncate(size)
}

func (s *silentReadOnly) WriteAt([]byte, int64, storage.WriteFlags) error { return nil }

// verdict is a testing.TB that only notes what became of a check.
type verdict struct {
	testing.TB
	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (v *verdict) Helper()          {}
func (v *verdict) Cleanup(f func()) { v.cleanups = append(v.cleanups, f) }
func (v *verdict) Logf(string, ...any) {
}
func (v *verdict) Errorf(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.failures = append(v.failures, fmt.Sprintf(format, args...))
}
func (v *verdict) Error(args ...any)                 { v.Errorf("%s", fmt.Sprint(args...)) }
func (v *verdict) Fatalf(format string, args ...any) { v.Errorf(format, args...); runtime.Goexit() }
func (v *verdict) Fatal(args ...any)                 { v.Errorf("%s", fmt.Sprint(args...)); runtime.Goexit() }

// judge runs a check and returns what it found wrong.
func judge(c check, target Target) *verdict {
	v := &verdict{}
	var wg sync.WaitGroup
	wg.Go(func() { c.run(v, target) })
	wg.Wait()
	for _, f := range v.cleanups {
		f()
	}
	return v
}

func TestSuiteCanFail(t *testing.T) { synctest.Test(t, testSuiteCanFail) }

func testSuiteCanFail(t *testing.T) {
	named := make(map[string]check)
	for _, c := range checks {
		named[c.name] = c
	}
	for _, b := range broken {
		c, ok := named[b.check]
		if !ok {
			t.Fatalf("no check is called %s", b.check)
		}
		name := strings.TrimPrefix(fmt.Sprintf("%T", b.wrap(nil)), "*storagetest.")
		target := memTarget(func(m *Mem) storage.Store { return b.wrap(m) })
		if v := judge(c, target); len(v.failures) == 0 {
			t.Errorf("check %s did not notice %s", b.check, name)
		} else {
			t.Logf("%s: %s: %s", b.check, name, v.failures[0])
		}
		if v := judge(c, memTarget(nil)); len(v.failures) != 0 {
			t.Errorf("check %s refuses a good store: %v", b.check, v.failures)
		}
	}
}

func TestFaults(t *testing.T) {
	eio := Failure{Err: syscall.EIO}
	f := Fault(NewMem(64*kib), FirstOf(
		Nth(OpWrite, 2, Failure{Err: syscall.ENOSPC, Done: 3}),
		From(OpSync, 2, eio),
		Within(OpRead|OpTryRead, 1000, 10, eio),
		Nth(OpZero, 1, Failure{Err: syscall.EIO, Done: 1 << 40}),
		Nth(OpTruncate, 1, Failure{Err: syscall.EIO, Done: 1}),
	))
	mustPass(t, f.WriteAt([]byte("abcdef"), 0, 0))
	wantErr(t, f.WriteAt([]byte("ABCDEF"), 0, 0), syscall.ENOSPC)
	p := make([]byte, 6)
	_, err := f.ReadAt(p, 0)
	mustPass(t, err)
	if string(p) != "ABCdef" {
		t.Errorf("a write of which 3 bytes were to be done left %q", p)
	}
	mustPass(t, f.Sync())
	wantErr(t, f.Sync(), syscall.EIO)
	wantErr(t, f.Sync(), syscall.EIO)
	_, err = f.ReadAt(p, 995)
	wantErr(t, err, syscall.EIO)
	_, err = f.ReadAt(p, 994)
	mustPass(t, err)
	wantErr(t, f.TryReadAt(p, 1009), syscall.EIO)
	mustPass(t, f.TryReadAt(p, 1010))
	wantErr(t, f.WriteZeroes(1, 2, 0), syscall.EIO)
	_, err = f.ReadAt(p, 0)
	mustPass(t, err)
	if string(p) != "A\x00\x00def" {
		t.Errorf("zeroing that was done before it failed left %q", p)
	}
	wantErr(t, f.Truncate(5), syscall.EIO)
	if size, err := f.Size(); err != nil || size != 5 {
		t.Errorf("size %d, error %v after Truncate(5)", size, err)
	}
	if n, lines := f.Calls(), f.Injected(); n != 14 || len(lines) != 7 {
		t.Errorf("%d calls, injected:\n%s", n, strings.Join(lines, "\n"))
	}
	if f.File() != nil {
		t.Error("a faulty store has a file, which fails nobody")
	}
}

// TestHold also shows that Close waits for a call in progress.
func TestHold(t *testing.T) {
	release, started := make(chan struct{}), make(chan Op, 1)
	f := Fault(NewMem(kib), Hold(OpWrite, started, release))
	wrote, closed := make(chan error), make(chan error, 1)
	go func() { wrote <- f.WriteAt([]byte{1}, 0, 0) }()
	<-started
	go func() { closed <- f.Close() }()
	for { // until Close has begun
		if _, err := f.Size(); errors.Is(err, fs.ErrClosed) {
			break
		}
		runtime.Gosched()
	}
	select {
	case <-closed:
		t.Error("Close did not wait for a write in progress")
	default:
	}
	close(release)
	mustPass(t, <-wrote)
	mustPass(t, <-closed)
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}
