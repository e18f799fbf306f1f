package file

import (
	"runtime"
	"sync/atomic"
)

// rawMost is up to how many bytes of a file in memory are copied by a raw call, of
// which Go's scheduler is not told: to tell costs more than the copy of a few
// KiB, and for some 20 µs nobody misses the thread. What may take longer must be
// told, or it holds up all of the program.
const rawMost = 128 << 10

// writers keep raw writes from waiting for the kernel's lock of the file: they are
// made only while nothing else of their store that takes it is in progress. Another
// store of the same file is like another process: its calls hold up a raw write, and
// with that the program, for as long as they take.
type writers struct{ shorts, longs atomic.Int32 }

// short begins a raw write, if it may be made now.
func (w *writers) short() bool {
	w.shorts.Add(1)
	if w.longs.Load() == 0 {
		return true
	}
	w.shorts.Add(-1)
	return false
}

func (w *writers) shortDone() { w.shorts.Add(-1) }

// long begins what may have the lock for longer, after the raw writes.
func (w *writers) long() {
	w.longs.Add(1)
	for w.shorts.Load() != 0 {
		runtime.Gosched()
	}
}

func (w *writers) longDone() { w.longs.Add(-1) }
