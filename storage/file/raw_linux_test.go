package file

import (
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

// Whatever takes the lock of a file in memory for longer begins after the raw
// writes that are in progress, and lets none begin.
func TestRawWritesGoFirst(t *testing.T) {
	s := mustOpen(t, filepath.Join(memoryDir(t), "file"), storage.Options{Access: storage.WriteGrow, Create: true})
	pass(t, s.WriteAt(make([]byte, 4096), 0, 0))
	for name, call := range map[string]func() error{
		"a long write": func() error { return s.WriteAt(make([]byte, rawMost+1), 0, 0) },
		"zeroing":      func() error { return s.WriteZeroes(0, 4096, 0) },
		"a discard":    func() error { return s.Discard(0, 4096) },
		"truncation":   func() error { return s.Truncate(8192) },
		"extents": func() error {
			_, err := s.AppendExtents(nil, 0, 4096)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			if !s.writers.short() {
				t.Fatal("a raw write may not begin")
			}
			ended := make(chan error, 1)
			go func() { ended <- call() }()
			for s.writers.short() { // until it has begun
				s.writers.shortDone()
				select {
				case <-ended:
					s.writers.shortDone()
					t.Fatal("it went on beside a raw write")
				default:
					runtime.Gosched()
				}
			}
			s.writers.shortDone()
			pass(t, <-ended)
		})
	}
}

// No raw write is made while something else changes the file, and each goes on
// afterwards.
func TestWriters(t *testing.T) {
	var w writers
	var short, long atomic.Int32
	var done, raw atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for raw.Add(1) < 1000 || done.Load() < 1000 {
				if w.short() {
					short.Add(1)
					if long.Load() != 0 {
						t.Error("a raw write beside another")
					}
					short.Add(-1)
					w.shortDone()
				}
				runtime.Gosched()
			}
		})
		all.Go(func() {
			for done.Add(1) < 1000 {
				w.long()
				long.Add(1)
				if short.Load() != 0 {
					t.Error("another beside a raw write")
				}
				runtime.Gosched()
				long.Add(-1)
				w.longDone()
			}
		})
	}
	all.Wait()
	if !w.short() {
		t.Error("no raw write after all")
	}
}
