package storage

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestGate(t *testing.T) {
	for range 200 {
		var (
			g      Gate
			closed atomic.Bool
			wg     sync.WaitGroup
		)
		for range 8 {
			wg.Go(func() {
				for g.Enter() {
					if closed.Load() {
						t.Error("Close returned with a call in progress")
					}
					runtime.Gosched()
					g.Leave()
				}
			})
		}
		runtime.Gosched()
		if !g.Close() {
			t.Error("the first Close returned false")
		}
		closed.Store(true)
		if g.Enter() {
			t.Error("entered a closed gate")
		}
		if g.Close() {
			t.Error("the second Close returned true")
		}
		wg.Wait()
	}
}

func BenchmarkGate(b *testing.B) {
	var g Gate
	for b.Loop() {
		g.Enter()
		g.Leave()
	}
}
