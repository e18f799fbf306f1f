package export

import (
	"testing"
	"testing/synctest"
	"time"
)

// What a burst of requests needed is given back when nobody has needed it for a
// while, and what is needed again and again is kept.
func TestPoolTrim(t *testing.T) { synctest.Test(t, testPoolTrim) }

func testPoolTrim(t *testing.T) {
	p := &bufferPool{keep: keepFree}
	defer p.drain()
	take := func(n, size int) {
		t.Helper()
		var taken []*buffer
		for range n {
			b, err := p.get(size)
			if err != nil {
				t.Fatal(err)
			}
			b.data(size)[size-1] = 1
			taken = append(taken, b)
		}
		for _, b := range taken {
			p.put(b)
		}
	}
	later := func(want, size int) {
		t.Helper()
		time.Sleep(keepTime)
		synctest.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.kept != int64(want)*bufferSize(size) || len(p.free[classOf(size)]) != want {
			t.Errorf("%d bytes in %d buffers are kept, not those of %d", p.kept, len(p.free[classOf(size)]), want)
		}
	}
	const size = 1 << 20
	take(10, size)
	later(10, size) // they were in use a moment ago
	take(3, size)
	later(3, size)
	take(3, size)
	later(3, size)
	later(0, size)
	take(1, 4096)
	later(1, 4096)
	take(1, 4096)
	later(1, 4096)
	later(0, 4096)
	p.mu.Lock()
	if p.due {
		t.Error("an empty pool is to be trimmed")
	}
	p.mu.Unlock()
}
