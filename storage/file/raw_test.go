package file

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

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
