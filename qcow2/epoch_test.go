package qcow2

import (
	"errors"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/image"
)

func TestEpochsHoldBackWhatIsInUse(t *testing.T) {
	e := newEpochs()
	old, err := e.enter()
	if err != nil {
		t.Fatal(err)
	}
	freed := e.number()
	for range 5 {
		e.advance()
	}
	if e.number() >= freed+2 {
		t.Fatalf("epoch went from %d to %d over a request", freed, e.number())
	}
	// Those who come later do not hold it back.
	young, err := e.enter()
	if err != nil {
		t.Fatal(err)
	}
	old.leave()
	e.advance()
	young.leave()
	e.advance()
	if e.number() < freed+2 {
		t.Errorf("epoch is still %d, want %d", e.number(), freed+2)
	}
}

func TestEpochsFreeze(t *testing.T) {
	e := newEpochs()
	var inside atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				v, err := e.enter()
				if err != nil {
					t.Error(err)
					return
				}
				inside.Add(1)
				inside.Add(-1)
				v.leave()
			}
		})
	}
	for range 200 {
		if err := e.freeze(); err != nil {
			t.Fatal(err)
		}
		if n := inside.Load(); n != 0 {
			t.Fatalf("%d requests inside while frozen", n)
		}
		if _, err := e.tryEnter(); !errors.Is(err, image.ErrWouldBlock) {
			t.Fatalf("tryEnter while frozen: %v", err)
		}
		e.thaw()
		e.advance()
	}
	close(stop)
	wg.Wait()
}

func TestEpochsClose(t *testing.T) {
	e := newEpochs()
	v, err := e.enter()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- e.close() }()
	v.leave()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := e.enter(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("enter after close: %v", err)
	}
	if err := e.close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("close twice: %v", err)
	}
	if err := e.freeze(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("freeze after close: %v", err)
	}
}

func BenchmarkEpochs(b *testing.B) {
	e := newEpochs()
	for b.Loop() {
		v, _ := e.enter()
		v.leave()
	}
}
