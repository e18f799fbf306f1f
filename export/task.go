package export

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A task is a request that left the line, with all that it holds, until its
// reply has been sent.
type task struct {
	session *session
	next    *task // in a taskList
	req     request
	off, n  int64         // what is left to do, in bytes of the export
	buf     *buffer       // of a write's payload or a read's data; may be nil
	want    []metaContext // of a BLOCK_STATUS
	runs    int           // of each of them at most
	charge  int64         // bytes that its budgets count
	ahead   bool          // has a place in line.ahead

	parts [][]byte // the reply
	heads []byte   // storage of parts that are not in buf
}

var tasks = sync.Pool{New: func() any { return &task{heads: make([]byte, 0, 256)} }}

// taskOverhead is what a task is taken to hold besides its buffer, in bytes.
const taskOverhead = 1 << 10

func (t *task) smallSize() int {
	n := 0
	for _, p := range t.parts {
		if len(p) <= packSmall {
			n += len(p)
		}
	}
	return n
}

// newTask counts a request that needs a buffer of n bytes, none if n is 0, and
// may hold so many bytes besides. It waits as long as the limits say so, and
// fails when the connection ends. With errScarce there is no memory, and nothing
// of the connection's to wait for: the request has to be served without.
func (s *session) newTask(r *request, n int, hold int64) (*task, error) {
	charge := chargeOf(n, hold)
	if !s.out.tryBegin(charge, &s.srv.Limits) {
		s.stopFetching()
		if err := s.sendOut(); err != nil { // before waiting
			return nil, err
		}
		if !s.out.begin(charge, &s.srv.Limits) {
			return nil, errEnded
		}
	}
	if !s.srv.memory.tryTake(charge, &s.out.inProgress) {
		s.stopFetching()
		if err := s.sendOut(); err != nil {
			s.out.end(charge, nil)
			return nil, err
		}
		if !s.srv.memory.take(charge, &s.out.inProgress) {
			s.out.end(charge, nil)
			s.srv.reached(limitMemory, "client", s.client.Addr)
			return nil, errScarce
		}
	}
	t, err := s.makeTask(r, n, charge)
	if err != nil {
		s.srv.reached(limitMemory, "client", s.client.Addr, "err", err)
		return nil, errScarce
	}
	return t, nil
}

// tryTask is newTask, but returns nil where that would wait or fail.
func (s *session) tryTask(r *request, n int) *task {
	charge := chargeOf(n, 0)
	if !s.out.tryBegin(charge, &s.srv.Limits) {
		return nil
	}
	if !s.srv.memory.tryTake(charge, &s.out.inProgress) {
		s.out.end(charge, nil)
		return nil
	}
	t, err := s.makeTask(r, n, charge)
	if err != nil {
		return nil
	}
	return t
}

// chargeOf is what a task is taken to hold, in bytes.
func chargeOf(n int, hold int64) int64 {
	charge := taskOverhead + hold
	if n > 0 {
		charge += bufferSize(n)
	}
	return charge
}

// makeTask makes a task that has been counted.
func (s *session) makeTask(r *request, n int, charge int64) (*task, error) {
	t := tasks.Get().(*task)
	t.session, t.req, t.off, t.n, t.charge = s, *r, r.off(), r.n(), charge
	if n > 0 {
		var err error
		if t.buf, err = s.srv.bufs.get(n); err != nil {
			s.endTask(t)
			return nil, err
		}
	}
	return t, nil
}

var (
	errEnded  = errors.New("connection ended")
	errScarce = errors.New("no memory for the request")
)

// endTask gives back what t holds.
func (s *session) endTask(t *task) {
	if t.buf != nil {
		s.srv.bufs.put(t.buf)
	}
	charge := t.charge
	if t.ahead {
		<-s.line.ahead
	}
	clear(t.parts)
	*t = task{parts: t.parts[:0], heads: t.heads[:0]}
	if cap(t.heads) <= 4<<10 {
		tasks.Put(t)
	}
	s.out.end(charge, &s.srv.memory)
}

// perform does t. A worker calls it.
func (s *session) perform(t *task) {
	var err error
	switch r := &t.req; r.cmd {
	case nbd.CmdRead:
		s.read(t)
		s.out.post(t)
		return
	case nbd.CmdWrite:
		var flags image.WriteFlags
		if r.has(nbd.CmdFlagFUA) {
			flags = image.FUA
		}
		start := time.Now()
		err = s.dev.WriteAt(t.buf.data(int(t.n)), s.export.Offset+t.off, flags)
		if flags != 0 {
			s.dev.wroteThrough(time.Since(start))
		} else {
			s.dev.touched(r.n())
		}
	case nbd.CmdTrim:
		err = s.inSteps(t, s.dev.Discard)
		s.dev.touched(r.n())
	case nbd.CmdWriteZeroes:
		err = s.writeZeroes(t)
		s.dev.touched(r.n())
	case nbd.CmdCache:
		err = s.cache(t)
	case nbd.CmdBlockStatus:
		err = s.blockStatus(t)
	}
	if err == nil && t.req.has(nbd.CmdFlagFUA) && (t.req.cmd == nbd.CmdTrim || t.req.cmd == nbd.CmdWriteZeroes) {
		s.dev.flush(t) // which answers it
		return
	}
	s.finish(t, err)
}

// flushed ends a request that waited for a flush.
func (s *session) flushed(t *task, err error) { s.finish(t, err) }

// finish answers t, unless it has been answered, by success or err.
func (s *session) finish(t *task, err error) {
	switch {
	case err != nil:
		t.heads = s.appendError(t.heads[:0], &t.req, s.failed(&t.req, err))
		t.parts = append(t.parts[:0], t.heads)
	case len(t.parts) == 0:
		t.heads = s.appendDone(t.heads[:0], &t.req)
		t.parts = append(t.parts, t.heads)
	}
	s.out.post(t)
}

// failed notes that the device did not do what it was asked for, and returns
// what the client is told: nothing that names our files.
func (s *session) failed(r *request, err error) *refusal {
	errno := errnoOf(err, r.has(nbd.CmdFlagFastZero))
	if errno != nbd.ENOTSUP && !errors.Is(err, context.Canceled) {
		s.complain(r, err)
	}
	return refuse(errno, "%v failed", r.cmd)
}

// complain logs that the device has failed.
func (s *session) complain(r *request, err error) {
	level := slog.LevelWarn
	ok, kept := s.dev.complaints.next(time.Now())
	if !ok {
		level = slog.LevelDebug
	}
	args := []any{"client", s.client.Addr, "export", s.name, "request", r.cmd, "offset", r.offset, "length", r.length, "err", err}
	if kept > 0 {
		args = append(args, "failures not told", kept)
	}
	s.srv.Log.Log(s.ctx, level, "request failed", args...)
}

// maxStep bounds what one call of a Device is asked to discard or zero, in
// bytes, so that a request for everything can be given up half way.
const maxStep = 1 << 30

// inSteps calls do for the range of t, piece by piece.
func (s *session) inSteps(t *task, do func(off, n int64) error) error {
	for t.n > 0 {
		n := min(t.n, maxStep)
		if err := do(s.export.Offset+t.off, n); err != nil {
			return err
		}
		t.off += n
		t.n -= n
		if err := s.ctx.Err(); err != nil && t.n > 0 {
			return err
		}
	}
	return nil
}

func (s *session) writeZeroes(t *task) error {
	var flags image.WriteFlags
	if !t.req.has(nbd.CmdFlagNoHole) {
		flags |= image.MayUnmap
	}
	if t.req.has(nbd.CmdFlagFastZero) {
		// In one call: it promises to change nothing if it is not fast.
		return s.dev.WriteZeroes(s.export.Offset+t.off, t.n, flags|image.FastOnly)
	}
	return s.inSteps(t, func(off, n int64) error { return s.dev.WriteZeroes(off, n, flags) })
}

// maxCache bounds what one request may bring into the cache, in bytes. The
// request is advice, of which the rest is not taken.
const maxCache = nbd.MaxPayload

// cache reads and forgets, so that whatever cache lies below holds the range.
func (s *session) cache(t *task) error {
	buf := t.buf.data(int(min(t.n, cachePiece)))
	for left := min(t.n, maxCache); left > 0; {
		p := buf[:min(left, int64(len(buf)))]
		if _, err := s.dev.ReadAt(p, s.export.Offset+t.off); err != nil {
			return err
		}
		t.off += int64(len(p))
		left -= int64(len(p))
	}
	return nil
}

// cachePiece is how much is read at once to fill a cache.
const cachePiece = 1 << 20

// blockStatus describes the range in each context, one chunk each.
func (s *session) blockStatus(t *task) error {
	var runs []Status
	out := t.heads[:0]
	for i, c := range t.want {
		var err error
		runs, err = c.appendRuns(runs[:0], s.export.Offset+t.off, t.n, t.runs)
		if err != nil {
			return err
		}
		typ, size := uint16(nbd.ReplyBlockStatus), 4+8*len(runs)
		if s.extended {
			typ, size = nbd.ReplyBlockStatusExt, 8+16*len(runs)
		}
		var flags uint16
		if i == len(t.want)-1 {
			flags = nbd.ReplyFlagDone
		}
		out = s.appendChunk(out, &t.req, flags, typ, size)
		out = appendStatusPayload(out, c.id, runs, s.extended)
	}
	if len(t.want) == 0 {
		return nil // a filter that names nothing
	}
	t.heads = out
	t.parts = append(t.parts, out)
	return nil
}
