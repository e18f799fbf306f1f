package export

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// A device is a Device with what its connections share: workers, so that a
// device that stalls holds up no other, and flushes.
type device struct {
	image.Device
	users int // sessions; guarded by Server.mu

	mu      sync.Mutex // guards the fields below
	queue   taskList   // waiting for a worker
	workers int
	limit   int
	run     func() // work, made once: a go statement with an argument is garbage

	under underWay // reads

	// A flush covers every write that has been answered, on any connection.
	// So one Device.Flush serves all flushes that were asked for before it
	// began; those that come while it runs wait for the next.
	flushMu  sync.Mutex // guards the fields below
	flushes  taskList
	flushing bool

	dirty atomic.Int64 // bytes written, by what returned since the last flush began
	brief atomic.Bool  // the medium took no longer than briefWait to make something durable

	complaints complaints
}

func newDevice(d image.Device) *device {
	limit := min(max(4*runtime.GOMAXPROCS(0), d.Info().QueueDepth, 16), 64)
	sh := &device{Device: d, limit: limit}
	sh.run = sh.work
	sh.under.init(limit)
	return sh
}

// submit has t done by a worker. It never waits: the budgets of connections
// bound what can be queued.
func (d *device) submit(t *task) {
	d.mu.Lock()
	d.queue.push(t)
	start := d.workers < d.limit
	if start {
		d.workers++
	}
	d.mu.Unlock()
	if start {
		go d.run()
	}
}

// work does what is queued and ends.
func (d *device) work() {
	for {
		d.mu.Lock()
		t := d.queue.pop()
		if t == nil {
			d.workers--
			d.mu.Unlock()
			return
		}
		d.mu.Unlock()
		t.session.perform(t)
	}
}

// flush has t answered after a flush that begins after this call.
func (d *device) flush(t *task) {
	d.flushMu.Lock()
	d.flushes.push(t)
	start := !d.flushing
	d.flushing = true
	d.flushMu.Unlock()
	if start {
		go d.commit()
	}
}

// claim makes the caller the one who flushes, until unclaim, unless somebody else is.
func (d *device) claim() bool {
	d.flushMu.Lock()
	defer d.flushMu.Unlock()
	if d.flushing {
		return false
	}
	d.flushing = true
	return true
}

// unclaim leaves to others what was asked for meanwhile.
func (d *device) unclaim() {
	d.flushMu.Lock()
	defer d.flushMu.Unlock()
	if d.flushes.head != nil {
		go d.commit()
	} else {
		d.flushing = false
	}
}

// commit flushes until nobody waits for it.
func (d *device) commit() {
	for {
		d.flushMu.Lock()
		group := d.flushes
		d.flushes = taskList{}
		if group.head == nil {
			d.flushing = false
			d.flushMu.Unlock()
			return
		}
		d.flushMu.Unlock()

		err := d.sync()
		for t := group.pop(); t != nil; t = group.pop() {
			t.session.flushed(t, err)
		}
	}
}

// sync flushes the device.
func (d *device) sync() error {
	dirty := d.dirty.Swap(0)
	start := time.Now()
	err := d.Flush()
	d.waited(time.Since(start))
	if err != nil {
		d.dirty.Add(max(dirty, 1))
	}
	return err
}

// A line waits for the medium itself where the last time took no longer than
// briefWait, and no more than briefBytes were written since.
const (
	briefWait  = time.Millisecond
	briefBytes = 1 << 20
)

// isBrief reports whether making durable what was written is likely to be brief.
func (d *device) isBrief() bool { return d.brief.Load() && d.dirty.Load() <= briefBytes }

// waited notes how long the medium took to make something durable.
func (d *device) waited(took time.Duration) {
	if brief := took <= briefWait; d.brief.Load() != brief {
		d.brief.Store(brief)
	}
}

// wroteThrough notes a write with FUA that has returned, and how long it took.
func (d *device) wroteThrough(took time.Duration) {
	d.waited(took)
	if d.dirty.Load() == 0 {
		d.dirty.Add(1) // one that failed may have written some
	}
}

// touched notes a write of n bytes that has returned. One that is noted before it is
// made may be forgotten by a flush that does not cover it. Beyond briefBytes it does not
// matter how many there are.
func (d *device) touched(n int64) {
	if d.dirty.Load() <= briefBytes {
		d.dirty.Add(max(min(n, briefBytes+1), 1))
	}
}

// A device that is broken fails every request, which may be many. So many
// failures are told in a window; the first of the next says how many were not.
const (
	maxComplaints    = 10
	complaintsWindow = time.Minute
)

// complaints counts what was told of the failures of a device.
type complaints struct {
	mu         sync.Mutex // guards the fields below
	since      time.Time  // when the window began
	told, kept int
}

// next reports whether a failure is to be told, and if so how many before it
// were not.
func (c *complaints) next(now time.Time) (ok bool, kept int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.since) >= complaintsWindow {
		kept = c.kept
		c.since, c.told, c.kept = now, 0, 0
	}
	if c.told == maxComplaints {
		c.kept++
		return false, 0
	}
	c.told++
	return true, kept
}

// A taskList is a queue of tasks, linked through them.
type taskList struct{ head, tail *task }

func (l *taskList) push(t *task) {
	t.next = nil
	if l.tail == nil {
		l.head = t
	} else {
		l.tail.next = t
	}
	l.tail = t
}

func (l *taskList) pop() *task {
	t := l.head
	if t == nil {
		return nil
	}
	if l.head = t.next; l.head == nil {
		l.tail = nil
	}
	t.next = nil
	return t
}
