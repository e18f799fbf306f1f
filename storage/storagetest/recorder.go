package storagetest

import (
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// SectorSize is what a disk writes whole or not at all, in bytes.
const SectorSize = 512

// A Log holds, in one order, what happened to a set of stores and around
// them. A test records requests, answers and whatever else it has to compare
// with a crash by [Log.Note]. All methods may be called concurrently.
type Log struct {
	// Yield makes the stores give way to other goroutines at random, and
	// split large writes, so that few operations see many interleavings.
	Yield bool

	// Fail, if not nil, is asked before each write and at the end of each
	// sync; an error makes it fail. A failed write may have done a part of its
	// work. It is called one at a time.
	Fail func(Event) error

	mu     sync.Mutex
	events []Event
	stores []*Recorder
	syncs  int
}

// EventKind says what an Event is.
type EventKind uint8

const (
	EventWrite     EventKind = iota // Data was written at Offset
	EventTruncate                   // the store's size became Offset
	EventSyncStart                  // sync number Sync began
	EventSyncEnd                    // it succeeded: what was written before it began is durable
	EventSyncFail                   // it failed: what was written before it began may be lost for good
	EventNote                       // a note of the test
)

// An Event is one entry of a Log.
type Event struct {
	Kind   EventKind
	Store  int // index of the store within the Log
	Offset int64
	Data   []byte
	Sync   int
	Note   any
}

// Note appends a note and returns its position.
func (l *Log) Note(note any) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.append(Event{Kind: EventNote, Note: note})
}

// Len returns the number of events so far.
func (l *Log) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.events)
}

// Events returns the events so far. They are not to be changed.
func (l *Log) Events() []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[:len(l.events):len(l.events)]
}

func (l *Log) append(e Event) int {
	l.events = append(l.events, e)
	return len(l.events) - 1
}

func (l *Log) pause() {
	if l.Yield {
		for range rand.IntN(40) {
			runtime.Gosched()
		}
	}
}

// A Recorder is a Store in memory that enters everything in a Log.
type Recorder struct {
	log   *Log
	index int
	info  storage.Info
	start []byte // contents when recording began

	// guarded by log.mu
	data   []byte
	closed bool
}

// NewStore returns a store that holds a copy of data and records into l. info
// says what kind of store it is; with FixedSize it cannot grow.
func (l *Log) NewStore(data []byte, info storage.Info) *Recorder {
	info.Alignment = max(info.Alignment, 1)
	info.PreferredIO = max(info.PreferredIO, 4096)
	info.QueueDepth = max(info.QueueDepth, 1)
	r := &Recorder{log: l, info: info, start: slices.Clone(data), data: slices.Clone(data)}
	l.mu.Lock()
	defer l.mu.Unlock()
	r.index = len(l.stores)
	l.stores = append(l.stores, r)
	return r
}

// Bytes returns a copy of what the store holds now.
func (r *Recorder) Bytes() []byte {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	return slices.Clone(r.data)
}

func (r *Recorder) Info() storage.Info { return r.info }
func (r *Recorder) File() *os.File     { return nil }

func (r *Recorder) ReadAt(p []byte, off int64) (int, error) {
	if err := storage.CheckRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	r.log.pause()
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.closed {
		return 0, fs.ErrClosed
	}
	if off >= int64(len(r.data)) {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := copy(p, r.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *Recorder) TryReadAt(p []byte, off int64) error {
	_, err := r.ReadAt(p, off)
	return err
}

func (r *Recorder) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if err := storage.CheckRange(off, int64(len(p))); err != nil {
		return err
	}
	for rest, at := p, off; len(rest) > 0; {
		n := len(rest)
		if r.log.Yield && n > SectorSize {
			n = max(n/2&^(SectorSize-1), SectorSize)
		}
		if len(rest) == len(p) || n == len(rest) {
			r.log.pause()
		}
		if err := r.write(rest[:n], at); err != nil {
			return err
		}
		rest, at = rest[n:], at+int64(n)
	}
	if flags&storage.FUA != 0 {
		return r.Sync()
	}
	return nil
}

func (r *Recorder) write(p []byte, off int64) error {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.closed {
		return fs.ErrClosed
	}
	if r.info.FixedSize && off+int64(len(p)) > int64(len(r.data)) {
		return syscall.ENOSPC
	}
	e := Event{Kind: EventWrite, Store: r.index, Offset: off, Data: slices.Clone(p)}
	var err error
	if l.Fail != nil {
		if err = l.Fail(e); err != nil {
			// None of it, the first half or all may have been done.
			e.Data = e.Data[:[]int{0, len(p) / 2 &^ (SectorSize - 1), len(p)}[rand.IntN(3)]]
		}
	}
	if len(e.Data) > 0 {
		r.data = apply(r.data, off, e.Data)
		l.append(e)
	}
	return err
}

func (r *Recorder) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	if err := storage.CheckRange(off, n); err != nil {
		return err
	}
	if flags&storage.FastOnly != 0 && !r.info.FastZero {
		return errors.ErrUnsupported
	}
	return r.WriteAt(make([]byte, n), off, flags&storage.FUA)
}

// Discard makes what it can zero: after a crash old bytes may be back.
func (r *Recorder) Discard(off, n int64) error {
	if err := storage.CheckRange(off, n); err != nil {
		return err
	}
	size, err := r.Size()
	if err != nil || !r.info.Discard || off >= size {
		return err
	}
	return r.WriteAt(make([]byte, min(n, size-off)), off, 0)
}

func (r *Recorder) Sync() error {
	l := r.log
	l.mu.Lock()
	if r.closed {
		l.mu.Unlock()
		return fs.ErrClosed
	}
	e := Event{Kind: EventSyncStart, Store: r.index, Sync: l.syncs}
	l.syncs++
	l.append(e)
	l.mu.Unlock()

	l.pause()
	l.pause()

	l.mu.Lock()
	defer l.mu.Unlock()
	e.Kind = EventSyncEnd
	var err error
	if l.Fail != nil {
		if err = l.Fail(e); err != nil {
			e.Kind = EventSyncFail
		}
	}
	l.append(e)
	return err
}

func (r *Recorder) Size() (int64, error) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.closed {
		return 0, fs.ErrClosed
	}
	return int64(len(r.data)), nil
}

func (r *Recorder) Truncate(size int64) error {
	if err := storage.CheckRange(size, 0); err != nil {
		return err
	}
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.closed {
		return fs.ErrClosed
	}
	if r.info.FixedSize && size != int64(len(r.data)) {
		return errors.ErrUnsupported
	}
	r.data = resize(r.data, size)
	r.log.append(Event{Kind: EventTruncate, Store: r.index, Offset: size})
	return nil
}

func (r *Recorder) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	if err := storage.CheckRange(off, n); err != nil {
		return dst, err
	}
	size, err := r.Size()
	if err == nil && off < size {
		dst = append(dst, storage.Extent{Offset: off, Length: min(n, size-off)})
	}
	return dst, err
}

func (r *Recorder) Close() error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.closed {
		return fs.ErrClosed
	}
	r.closed = true
	return nil
}

func apply(data []byte, off int64, p []byte) []byte {
	if end := off + int64(len(p)); end > int64(len(data)) {
		data = resize(data, end)
	}
	copy(data[off:], p)
	return data
}

func resize(data []byte, size int64) []byte {
	if size <= int64(len(data)) {
		return data[:size]
	}
	n := len(data)
	data = slices.Grow(data, int(size)-n)[:size]
	clear(data[n:])
	return data
}
