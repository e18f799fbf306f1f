package storagetest

import (
	"math/rand/v2"
	"slices"
)

// A Disk follows a Log event by event and tells what the stores would hold if
// the machine, or only the process, died there.
//
// The model of a power cut: what was written before the start of the last
// sync that succeeded is there. Every sector that was written since holds one
// of its versions, the durable one included, independently of all others; the
// size of the store is any that it had since, but includes what is there.
type Disk struct {
	stores []diskStore
	rand   *rand.Rand
}

type diskStore struct {
	durable []byte
	cache   []byte  // what a new process would find
	pending []Event // writes and truncations that no sync covers, in order
	marks   map[int]int
	dropped int // events taken off the front of pending, ever
}

// NewDisk returns the stores of l as they were when recording began.
func (l *Log) NewDisk(r *rand.Rand) *Disk {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := &Disk{rand: r}
	for _, s := range l.stores {
		d.stores = append(d.stores, diskStore{durable: slices.Clone(s.start), cache: slices.Clone(s.start), marks: map[int]int{}})
	}
	return d
}

// Fork returns an independent copy, as if recording had begun anew in l with
// what a new process finds: for a power cut while a successor recovers.
func (d *Disk) Fork() *Disk {
	f := &Disk{rand: d.rand}
	for _, s := range d.stores {
		f.stores = append(f.stores, diskStore{
			durable: slices.Clone(s.durable), cache: slices.Clone(s.cache),
			pending: slices.Clone(s.pending), marks: map[int]int{},
		})
	}
	return f
}

// Step takes the next event.
func (d *Disk) Step(e Event) {
	if e.Kind == EventNote {
		return
	}
	s := &d.stores[e.Store]
	switch e.Kind {
	case EventWrite:
		s.cache = apply(s.cache, e.Offset, e.Data)
		s.pending = append(s.pending, e)
	case EventTruncate:
		s.cache = resize(s.cache, e.Offset)
		s.pending = append(s.pending, e)
	case EventSyncStart:
		s.marks[e.Sync] = s.dropped + len(s.pending)
	case EventSyncEnd, EventSyncFail:
		n := max(s.marks[e.Sync]-s.dropped, 0)
		delete(s.marks, e.Sync)
		if e.Kind == EventSyncEnd {
			for _, w := range s.pending[:n] {
				if w.Kind == EventWrite {
					s.durable = apply(s.durable, w.Offset, w.Data)
				} else {
					s.durable = resize(s.durable, w.Offset)
				}
			}
		} else {
			// The host forgets that these pages are dirty: some are lost, and
			// no later sync brings them back.
			s.durable = crash(s.durable, s.pending[:n], d.rand)
		}
		s.pending = s.pending[n:]
		s.dropped += n
	}
}

// Cache returns what a new process finds in store i after this one was killed.
func (d *Disk) Cache(i int) []byte { return slices.Clone(d.stores[i].cache) }

// Crash returns what each store may hold after a power cut now: one sample.
func (d *Disk) Crash() [][]byte {
	var out [][]byte
	for i := range d.stores {
		out = append(out, crash(d.stores[i].durable, d.stores[i].pending, d.rand))
	}
	return out
}

// crash applies a part of the pending writes to a copy of durable. Which part
// is drawn by one of several rules, because orders that go wrong are rare
// among uniformly random ones.
func crash(durable []byte, pending []Event, r *rand.Rand) []byte {
	out := slices.Clone(durable)
	if len(pending) == 0 {
		return out
	}
	versions := map[int64]int{} // per sector, how many writes are pending
	small := map[int64]bool{}   // sectors last touched by a write of less than a page: mostly metadata
	sizes := []int64{int64(len(durable))}
	end := int64(len(durable))
	for _, w := range pending {
		if w.Kind == EventTruncate {
			end = w.Offset
		} else {
			end = max(end, w.Offset+int64(len(w.Data)))
			for sec := range sectors(w) {
				versions[sec]++
				small[sec] = len(w.Data) <= 4096
			}
		}
		sizes = append(sizes, end)
	}

	keep := map[int64]int{}
	one := pending[r.IntN(len(pending))]
	prefix := r.IntN(len(pending) + 1)
	mode := r.IntN(9)
	for i, w := range pending {
		if mode == 8 && i < prefix { // all writes up to one, in order
			for sec := range sectors(w) {
				keep[sec]++
			}
		}
	}
	for _, sec := range sortedKeys(versions) {
		n := versions[sec]
		switch mode {
		case 0: // nothing
		case 1: // everything
			keep[sec] = n
		case 2: // any version of each
			keep[sec] = r.IntN(n + 1)
		case 3:
			if small[sec] {
				keep[sec] = n
			}
		case 4:
			if !small[sec] {
				keep[sec] = n
			}
		case 5: // nearly all
			if r.IntN(8) > 0 {
				keep[sec] = n
			}
		case 6: // a few
			if r.IntN(8) == 0 {
				keep[sec] = n
			}
		case 7: // one write alone
		}
	}
	if mode == 7 {
		for sec := range sectors(one) {
			keep[sec] = versions[sec]
		}
	}

	size := sizes[r.IntN(len(sizes))]
	cut := size < int64(len(out))
	if cut {
		out = resize(out, size)
	}
	for _, w := range pending {
		if w.Kind == EventTruncate {
			continue
		}
		for sec, part := range sectors(w) {
			if keep[sec] > 0 {
				keep[sec]--
				out = apply(out, part.Offset, part.Data)
			}
		}
	}
	if size > int64(len(out)) {
		out = resize(out, size)
	}
	return out
}

// sectors yields the parts of a write by the number of the sector they lie in.
func sectors(w Event) func(func(int64, Event) bool) {
	return func(yield func(int64, Event) bool) {
		for o := int64(0); o < int64(len(w.Data)); {
			sec := (w.Offset + o) / SectorSize
			n := min((sec+1)*SectorSize-(w.Offset+o), int64(len(w.Data))-o)
			if !yield(sec, Event{Offset: w.Offset + o, Data: w.Data[o : o+n]}) {
				return
			}
			o += n
		}
	}
}

func sortedKeys(m map[int64]int) []int64 {
	keys := make([]int64, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
