// Package history decides whether what the clients of one disk were told fits
// together: for each byte alone, there has to be an order of all writes and
// reads that is the order of time where they do not overlap, and in which each
// read finds what was written last.
//
// Each write of a byte has a value that no other write of that byte has, so the
// orders need not be searched: a value and those who read it are one zone of
// time, and zones must not get in each other's way (Gibbons and Korach, 1997).
// Zeros are written by many, so of a read of zeros only that is asked that some
// zeroing can be what it found.
package history

import (
	"fmt"
	"slices"
	"sync"
)

// Initial is what each byte is in the beginning, unless that is 0.
const Initial = 0xff

const never = 1 << 30

// A History is what happened to a disk. It may be used concurrently.
type History struct {
	tick  func() int // returns the time, later ones greater
	first byte

	mu      sync.Mutex
	bytes   []history
	ops     []op
	flushes []op
}

// An op changed something, or may have.
type op struct {
	off, n     int64
	start, end int
	zero       bool
	maybe      bool // it need not have happened, or not everywhere
	fua        bool
}

// A history is that of one byte.
type history struct {
	last   byte
	writes []write
	reads  []read
}

type write struct {
	op    int32
	value byte
}

type read struct {
	start, end int32
	value      byte
}

// New returns the history of a disk all of whose bytes are first, 0 or Initial.
// tick tells the time.
func New(size int64, first byte, tick func() int) *History {
	return &History{tick: tick, first: first, bytes: make([]history, size)}
}

// Size returns that of the disk in bytes.
func (h *History) Size() int64 { return int64(len(h.bytes)) }

// Write begins a write, and returns its number and what is to be written;
// nothing if a byte has been written too often for another value.
func (h *History) Write(off, n int64, fua bool) (id int, data []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	part := h.bytes[off : off+n]
	for i := range part {
		if part[i].last == Initial-1 {
			return 0, nil
		}
	}
	data = make([]byte, n)
	id = h.begin(op{off: off, n: n, fua: fua})
	for i := range part {
		part[i].last++
		data[i] = part[i].last
		part[i].writes = append(part[i].writes, write{int32(id), data[i]})
	}
	return id, data
}

// Zero begins to zero a range; a trim zeroes it or leaves it as it is.
func (h *History) Zero(off, n int64, trim, fua bool) (id int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	id = h.begin(op{off: off, n: n, zero: true, maybe: trim, fua: fua})
	for i := off; i < off+n; i++ {
		h.bytes[i].writes = append(h.bytes[i].writes, write{int32(id), 0})
	}
	return id
}

func (h *History) begin(o op) int {
	o.start, o.end = h.tick(), never
	h.ops = append(h.ops, o)
	return len(h.ops) - 1
}

// End ends a write or zeroing. One that failed may have happened.
func (h *History) End(id int, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops[id].end = h.tick()
	h.ops[id].maybe = h.ops[id].maybe || !ok
}

// Flush carries out a flush.
func (h *History) Flush(do func() error) error {
	start := h.now()
	err := do()
	if err == nil {
		end := h.now()
		h.mu.Lock()
		defer h.mu.Unlock()
		h.flushes = append(h.flushes, op{start: start, end: end})
	}
	return err
}

// Read carries out a read of p at off.
func (h *History) Read(p []byte, off int64, do func() error) error {
	start := h.now()
	err := do()
	if err == nil {
		end := h.now()
		h.mu.Lock()
		defer h.mu.Unlock()
		for i, v := range p {
			b := &h.bytes[off+int64(i)]
			b.reads = append(b.reads, read{int32(start), int32(end), v})
		}
	}
	return err
}

func (h *History) now() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tick()
}

// Check returns an error that names a byte whose history cannot be. All
// operations are over.
func (h *History) Check() error {
	for i := range h.bytes {
		if err := h.check(&h.bytes[i]); err != nil {
			return fmt.Errorf("byte %d: %w", i, err)
		}
	}
	return nil
}

func (h *History) check(b *history) error {
	for _, r := range b.reads {
		// All that ended before this write began had been replaced when the read began.
		last := -1
		for _, w := range b.writes {
			if o := &h.ops[w.op]; !o.maybe && o.end < int(r.start) {
				last = max(last, o.start)
			}
		}
		if !h.possible(b, r.value, last, int(r.end)) {
			return fmt.Errorf("a read from %d to %d found %d: %s", r.start, r.end, r.value, h.story(b))
		}
	}
	return h.zones(b)
}

// possible reports whether a byte can be a value before a time, when what
// ended before last has been replaced.
func (h *History) possible(b *history, value byte, last, before int) bool {
	if value == h.first && last < 0 {
		return true
	}
	return slices.ContainsFunc(b.writes, func(w write) bool {
		o := &h.ops[w.op]
		return w.value == value && o.start < before && o.end >= last
	})
}

// A zone is the time from the first end to the last start of a write and its
// reads. If that is forward, the byte had the value all the time; if not, it
// had it once between the two.
type zone struct{ end, start int }

func (h *History) zones(b *history) error {
	var forward, backward []zone
	add := func(z zone) {
		if z.end < z.start {
			forward = append(forward, z)
		} else {
			backward = append(backward, zone{z.start, z.end})
		}
	}
	read := func(z *zone, value byte) (found bool) {
		for _, r := range b.reads {
			if r.value == value {
				z.end, z.start, found = min(z.end, int(r.end)), max(z.start, int(r.start)), true
			}
		}
		return found
	}
	for _, w := range b.writes {
		o := &h.ops[w.op]
		z := zone{o.end, o.start}
		if w.value == 0 && o.maybe {
			continue
		}
		if w.value != 0 && !read(&z, w.value) && o.maybe {
			continue
		}
		add(z)
	}
	if h.first != 0 {
		z := zone{-1, -1}
		read(&z, h.first)
		add(z)
	}
	slices.SortFunc(forward, func(x, y zone) int { return x.end - y.end })
	for i, z := range forward {
		if i > 0 && forward[i-1].start > z.end {
			return fmt.Errorf("a value was there, then another, then the first again: %s", h.story(b))
		}
		for _, w := range backward {
			if z.end < w.end && w.start < z.start {
				return fmt.Errorf("a write had no time to be there: %s", h.story(b))
			}
		}
	}
	return nil
}

// CheckCrash returns an error unless the disk may be what is left after a power
// cut at a time: what was flushed before, and of everything else any part.
func (h *History) CheckCrash(disk []byte, at int) error {
	flushed := -1
	for _, f := range h.flushes {
		if f.end < at {
			flushed = max(flushed, f.start)
		}
	}
	for i := range h.bytes {
		b, last := &h.bytes[i], -1
		for _, w := range b.writes {
			if o := &h.ops[w.op]; !o.maybe && (o.end < flushed || o.fua && o.end < at) {
				last = max(last, o.start)
			}
		}
		if !h.possible(b, disk[i], last, at) {
			return fmt.Errorf("byte %d is %d after a power cut at %d, flushed at %d: %s", i, disk[i], at, flushed, h.story(b))
		}
	}
	return nil
}

// story tells the history of a byte.
func (h *History) story(b *history) string {
	var s string
	for _, w := range b.writes {
		o := &h.ops[w.op]
		verb := "wrote"
		if o.maybe {
			verb = "may have written"
		}
		s += fmt.Sprintf("\n%d to %d: %s %d", o.start, o.end, verb, w.value)
	}
	for _, r := range b.reads {
		s += fmt.Sprintf("\n%d to %d: read %d", r.start, r.end, r.value)
	}
	return s
}
