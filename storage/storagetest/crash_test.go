package storagetest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

func sector(b byte) []byte { return bytes.Repeat([]byte{b}, SectorSize) }

// outcomes returns every distinct image that many samples of a crash at the
// end of l give.
func outcomes(l *Log) map[string]bool {
	d := l.NewDisk(rand.New(rand.NewPCG(1, 2)))
	for _, e := range l.Events() {
		d.Step(e)
	}
	seen := map[string]bool{}
	for range 2000 {
		seen[string(d.Crash()[0])] = true
	}
	return seen
}

func join(parts ...[]byte) string { return string(bytes.Join(parts, nil)) }

func TestCrashKeepsWhatWasSynced(t *testing.T) {
	var l Log
	s := l.NewStore(make([]byte, 2*SectorSize), storage.Info{})
	mustPass(t, s.WriteAt(sector('a'), 0, 0))
	mustPass(t, s.Sync())
	mustPass(t, s.WriteAt(sector('b'), SectorSize, 0))
	mustPass(t, s.WriteAt(sector('c'), SectorSize, 0))
	got := outcomes(&l)
	for _, want := range []string{
		join(sector('a'), sector(0)), join(sector('a'), sector('b')), join(sector('a'), sector('c')),
	} {
		if !got[want] {
			t.Errorf("an image that may be left was never built")
		}
		delete(got, want)
	}
	if len(got) != 0 {
		t.Errorf("%d images that cannot be left", len(got))
	}
}

func TestCrashReordersAndTears(t *testing.T) {
	var l Log
	s := l.NewStore(make([]byte, 2*SectorSize), storage.Info{})
	mustPass(t, s.WriteAt(join2(sector('a'), sector('b')), 0, 0))
	got := outcomes(&l)
	if len(got) != 4 {
		t.Errorf("a write of two sectors left %d images, want all 4", len(got))
	}
}

func TestCrashSize(t *testing.T) {
	var l Log
	s := l.NewStore(sector('x'), storage.Info{})
	mustPass(t, s.WriteAt(sector('a'), 3*SectorSize, 0))
	sizes := map[int]bool{}
	for img := range outcomes(&l) {
		sizes[len(img)] = true
		if len(img) == SectorSize && img != string(sector('x')) {
			t.Error("lost what was there")
		}
	}
	if !sizes[SectorSize] || !sizes[4*SectorSize] || len(sizes) != 2 {
		t.Errorf("sizes %v, want old and new", sizes)
	}
}

func TestCrashAfterFailedSync(t *testing.T) {
	l := Log{Fail: func(e Event) error {
		if e.Kind == EventSyncEnd && e.Sync == 0 {
			return errors.New("lost")
		}
		return nil
	}}
	s := l.NewStore(sector(0), storage.Info{})
	mustPass(t, s.WriteAt(sector('a'), 0, 0))
	if s.Sync() == nil {
		t.Fatal("sync succeeded")
	}
	mustPass(t, s.Sync())
	lost := false
	for seed := range uint64(64) {
		d := l.NewDisk(rand.New(rand.NewPCG(seed, 0)))
		for _, e := range l.Events() {
			d.Step(e)
		}
		lost = lost || bytes.Equal(d.Crash()[0], sector(0))
	}
	if !lost {
		t.Error("a sync that succeeded brought back what a failed one had lost")
	}
}

// A write that begins after a sync has begun is not covered by it.
func TestCrashSyncCoversEarlierWritesOnly(t *testing.T) {
	var l Log
	s := l.NewStore(make([]byte, SectorSize), storage.Info{})
	l.append(Event{Kind: EventSyncStart, Sync: 7})
	mustPass(t, s.WriteAt(sector('a'), 0, 0))
	l.append(Event{Kind: EventSyncEnd, Sync: 7})
	if got := outcomes(&l); !got[string(sector(0))] || !got[string(sector('a'))] {
		t.Error("the write must be free to be there or not")
	}
}

func TestRecorderFixedSize(t *testing.T) {
	var l Log
	s := l.NewStore(make([]byte, SectorSize), storage.Info{FixedSize: true})
	if err := s.WriteAt(sector('a'), SectorSize, 0); !storage.NoSpace(err) {
		t.Errorf("write past the end of a store of fixed size: %v", err)
	}
}

func mustPass(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func join2(a, b []byte) []byte { return append(a, b...) }
