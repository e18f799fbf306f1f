package file

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// rawMost is up to how many bytes of a file in memory are copied by a raw call, of
// which Go's scheduler is not told: to tell costs more than the copy of a few
// KiB, and for some 20 µs nobody misses the thread. What may take longer must be
// told, or it holds up all of the program.
const rawMost = 128 << 10

// writers keep raw writes from waiting for the kernel's lock of the file: they are
// made only while nothing else that takes it is in progress here.
type writers struct {
	shorts, longs atomic.Int32
	stores        int // of the file; guarded by files.mu
}

// files has the writers of each file that is open, since the lock is of the file and
// not of a store.
var files struct {
	mu      sync.Mutex
	writers map[string]*writers // by storage.Info.ID
}

// join returns the writers of a file, for one store more.
func join(id string) *writers {
	files.mu.Lock()
	defer files.mu.Unlock()
	w := files.writers[id]
	if w == nil {
		w = &writers{}
		if files.writers == nil {
			files.writers = map[string]*writers{}
		}
		files.writers[id] = w
	}
	w.stores++
	return w
}

// part ends what join began.
func (w *writers) part(id string) {
	files.mu.Lock()
	defer files.mu.Unlock()
	if w.stores--; w.stores == 0 {
		delete(files.writers, id)
	}
}

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
