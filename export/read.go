package export

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A run is a part of a read that one chunk answers.
type run struct {
	off, n int64 // bytes of the export
	zero   bool
}

// minHole is the shortest run of zeros that is worth a chunk, in bytes.
const minHole = 4 << 10

// maxRuns bounds the chunks of one reply.
const maxRuns = 1024

// appendRuns divides [off, off+n) into data and zeros. Where the device does
// not answer there is data: reading it will tell what is wrong.
func (s *session) appendRuns(dst []run, scratch *[]image.Extent, off, n int64) []run {
	first, start, found := len(dst), time.Now(), false
	defer func() { s.asking.learn(time.Since(start), found) }()
	for n > 0 {
		var err error
		if len(dst)-first >= maxRuns {
			err = errors.New("too many runs")
		} else {
			*scratch, err = s.dev.AppendExtents((*scratch)[:0], s.export.Offset+off, n, image.WantZero)
		}
		if err != nil || len(*scratch) == 0 {
			*scratch = append((*scratch)[:0], image.Extent{Length: n})
		}
		for _, e := range *scratch {
			length := min(e.Length, n)
			zero := e.Zero && length >= minHole
			found = found || zero
			if last := len(dst) - 1; last >= first && dst[last].zero == zero {
				dst[last].n += length
			} else {
				dst = append(dst, run{off, length, zero})
			}
			off += length
			n -= length
		}
	}
	return dst
}

// sparse reports whether the reply to r tells holes from data.
func (s *session) sparse(r *request) bool {
	return s.structured && !r.has(nbd.CmdFlagDF) && r.length >= largeRead && s.asking.worthwhile()
}

// An asker limits what is spent on asking where holes are. It can be costly (a
// file on tmpfs looks at every page up to the next hole), and is worth it only
// where there are holes.
type asker struct {
	skip atomic.Int64 // questions not to ask
}

const (
	// askingFree is what a question may cost each time.
	askingFree = 5 * time.Microsecond
	// askingCost is what a dearer one may cost on the average of the requests
	// until the next, while it finds nothing.
	askingCost = time.Microsecond
)

func (a *asker) worthwhile() bool {
	return a.skip.Load() <= 0 || a.skip.Add(-1) < 0
}

// learn notes what a question has cost and whether it found a hole.
func (a *asker) learn(cost time.Duration, found bool) {
	if found || cost <= askingFree {
		a.skip.Store(0)
	} else {
		a.skip.Store(int64(cost / askingCost))
	}
}

// readHere answers a read on the line, or leaves it to a worker.
func (s *session) readHere(r *request) error {
	off, n := r.off(), r.n()
	sparse, byFile := s.sparse(r), n >= s.out.t.fileMin()
	if !sparse && !byFile {
		return s.readRuns(r, off, n, append(s.line.runs[:0], run{off, n, false}), false)
	}
	// Asking for extents may wait as reading may. If the first bytes can be
	// had, what it takes to find them is at hand.
	const enough = 512
	if err := s.room(enough); err != nil {
		return err
	}
	out := s.line.out
	probe := out[len(out):][:min(n, enough)]
	if s.dev.TryReadAt(probe, s.export.Offset+off) != nil {
		return s.leave(r, off, n, false)
	}
	runs := s.line.runs[:0]
	if sparse {
		runs = s.appendRuns(runs, &s.line.extents, off, n)
	} else {
		runs = append(runs, run{off, n, false})
	}
	return s.readRuns(r, off, n, runs, byFile)
}

// readRuns answers the read of [off, off+n), which runs are the parts of.
func (s *session) readRuns(r *request, off, n int64, runs []run, byFile bool) error {
	s.line.runs = runs
	for i, run := range runs {
		var flags uint16
		if i == len(runs)-1 {
			flags = nbd.ReplyFlagDone
		}
		if run.zero {
			if err := s.room(maxReplyHead + 12); err != nil {
				return err
			}
			s.line.out = s.appendHole(s.line.out, r, flags, run.off, int(run.n))
			continue
		}
		if byFile && run.n >= s.out.t.fileMin() {
			sent, ended, err := s.sendRun(r, run, flags)
			if err != nil || ended {
				return err
			}
			if sent {
				continue
			}
		}
		var err error
		if run.n >= s.out.t.forwardMin() {
			err = s.forwardRun(r, run, flags)
		} else {
			err = s.copyRun(r, run, flags)
		}
		switch {
		case err == nil:
		case errors.Is(err, image.ErrWouldBlock):
			if i > 0 {
				// The worker's last chunk must not overtake ours.
				if err := s.sendOut(); err != nil {
					return err
				}
			}
			rest := off + n - run.off
			if err == image.ErrUnderWay && rest == r.n() && rest == run.n && rest < largeRead && s.keep(r) {
				return s.batched()
			}
			return s.leave(r, run.off, rest, err == image.ErrUnderWay && rest == run.n)
		default:
			return err
		}
	}
	return s.batched()
}

// copyRun reads a run into the replies of the line. It returns ErrWouldBlock,
// having done nothing, if that would wait or take too much room.
func (s *session) copyRun(r *request, run run, flags uint16) error {
	l := &s.line
	head, n := s.dataHeadSize(), int(run.n)
	if head+n > cap(l.out) {
		return image.ErrWouldBlock
	}
	if err := s.room(head + n); err != nil {
		return err
	}
	at := len(l.out)
	p := l.out[at+head : at+head+n]
	err := s.dev.TryReadAt(p, s.export.Offset+run.off)
	if err == image.ErrUnderWay {
		return err
	}
	if err != nil {
		// An error is left to a worker too: trying is not the last word.
		return image.ErrWouldBlock
	}
	s.appendDataHead(l.out, r, flags, run.off, n)
	l.out = l.out[:at+head+n]
	return nil
}

// forwardRun reads a run into a buffer of its own and leaves the sending to a
// writer. It returns ErrWouldBlock, having read nothing, if reading would
// wait or take too much room.
func (s *session) forwardRun(r *request, run run, flags uint16) error {
	if run.n > lineBytes {
		return image.ErrWouldBlock
	}
	// Those before it in the reply come first; and while the client takes
	// nothing, nothing is read for it.
	if err := s.sendOut(); err != nil {
		return err
	}
	select {
	case s.line.ahead <- struct{}{}:
	default:
		s.stopFetching()
		s.line.ahead <- struct{}{}
	}
	n := int(run.n)
	t, err := s.newTask(r, n, 0)
	if err != nil {
		<-s.line.ahead
		if err == errScarce {
			err = image.ErrWouldBlock
		}
		return err
	}
	t.ahead = true
	if s.dev.TryReadAt(t.buf.data(n), s.export.Offset+run.off) != nil {
		s.endTask(t)
		return image.ErrWouldBlock
	}
	whole := t.buf.withHead(s.dataHeadSize(), n)
	s.appendDataHead(whole[:0], r, flags, run.off, n)
	t.parts = append(t.parts, whole)
	s.out.forward(t)
	return nil
}

// leave has a worker read [off, off+n), the rest of what r asks for, or does it
// itself if there is no memory to do so at once. With underWay all of it is on
// its way already.
func (s *session) leave(r *request, off, n int64, underWay bool) error {
	t, err := s.newTask(r, int(n), 0)
	if err == errScarce {
		_, err = s.streamRun(r, run{off: off, n: n}, nbd.ReplyFlagDone)
		return err
	}
	if err != nil {
		return err
	}
	t.off, t.n = off, n
	if underWay && n < largeRead {
		s.dev.under.add(t)
	} else {
		s.dev.submit(t)
	}
	return nil
}

// read is done by a worker: it makes the reply to what is left of a read.
func (s *session) read(t *task) {
	if s.ctx.Err() != nil {
		return // nobody waits for it
	}
	r := &t.req
	data := t.buf.data(int(t.n))
	runs := []run{{t.off, t.n, false}}
	if s.sparse(r) {
		var extents []image.Extent
		runs = s.appendRuns(runs[:0], &extents, t.off, t.n)
	}
	for i, run := range runs {
		var flags uint16
		if i == len(runs)-1 {
			flags = nbd.ReplyFlagDone
		}
		head := len(t.heads)
		if run.zero {
			t.heads = s.appendHole(t.heads, r, flags, run.off, int(run.n))
			t.parts = append(t.parts, t.heads[head:])
			continue
		}
		from := run.off - t.off
		p := data[from : from+run.n]
		if _, err := s.dev.ReadAt(p, s.export.Offset+run.off); err != nil {
			f := s.failed(r, err)
			if s.structured {
				t.heads = s.appendErrorAt(t.heads, r, f, run.off)
			} else {
				t.heads = s.appendError(t.heads, r, f)
			}
			t.parts = append(t.parts, t.heads[head:])
			return
		}
		if len(runs) == 1 {
			s.replyWhole(t)
			return
		}
		t.heads = s.appendDataHead(t.heads, r, flags, run.off, int(run.n))
		t.parts = append(t.parts, t.heads[head:], p)
	}
}

// tryRead is read, unless that would wait or fail.
func (s *session) tryRead(t *task) bool {
	if s.dev.TryReadAt(t.buf.data(int(t.n)), s.export.Offset+t.off) != nil {
		return false
	}
	s.replyWhole(t)
	return true
}

// replyWhole makes the reply of which the buffer of t has the data: header and
// data in one piece.
func (s *session) replyWhole(t *task) {
	n := int(t.n)
	whole := t.buf.withHead(s.dataHeadSize(), n)
	s.appendDataHead(whole[:0], &t.req, nbd.ReplyFlagDone, t.off, n)
	t.parts = append(t.parts, whole)
}

// sendRun answers a run from the file that holds it, without a copy, if there
// is one. It reports whether it did, and whether that was the end of the whole
// reply, since something went wrong half way.
func (s *session) sendRun(r *request, run run, flags uint16) (sent, ended bool, err error) {
	// A simple reply promises success before anything has been read. Only what
	// is in memory can be promised; a chunk may be followed by an error.
	file, at, length := s.locateNow(run.off, run.n)
	if file == nil || !resident(file, at, length, s.structured) || !s.structured && length < run.n {
		return false, false, nil
	}
	ended, err = s.streamRun(r, run, flags)
	return err == nil, ended, err
}

// streamRun answers a run piece by piece. It reports whether that was the end
// of the whole reply, since something went wrong half way.
func (s *session) streamRun(r *request, run run, flags uint16) (ended bool, err error) {
	l := &s.line
	if err := s.room(maxReplyHead); err != nil {
		return false, err
	}
	l.out = s.appendDataHead(l.out, r, 0, run.off, int(run.n))
	if err := s.out.acquire(); err != nil {
		return false, err
	}
	err = s.out.write(l.out)
	l.out = l.out[:0]
	var failure error
	if err == nil {
		failure, err = s.sendRange(run.off, run.n)
	}
	if err = s.out.release(err); err != nil {
		return false, err
	}
	switch {
	case failure != nil && !s.structured:
		s.complain(r, failure)
		return true, fmt.Errorf("read failed after its reply began: %w", failure)
	case failure != nil:
		f := s.failed(r, failure)
		l.out = s.appendErrorAt(l.out, r, f, run.off)
		return true, nil
	case s.structured && flags&nbd.ReplyFlagDone != 0:
		l.out = s.appendDone(l.out, r)
	}
	return false, nil
}

// locateNow finds where bytes lie at this moment.
func (s *session) locateNow(off, n int64) (*os.File, int64, int64) {
	pin := s.dev.Pin()
	defer pin.Release()
	return s.locate(off, n)
}

// locate returns the file that holds the first bytes of [off, off+n) as they
// are, where they lie in it and how many. The caller holds a Pin.
func (s *session) locate(off, n int64) (*os.File, int64, int64) {
	extents, err := s.dev.AppendExtents(s.line.extents[:0], s.export.Offset+off, n, image.WantLocation)
	s.line.extents = extents
	if err != nil || len(extents) == 0 {
		return nil, 0, 0
	}
	e := &extents[0]
	if e.Compressed || e.Zero || e.At.Store == nil {
		return nil, 0, 0
	}
	length := min(e.Length, n)
	for i := range extents[1:] { // what follows in the device may follow in the file
		next := &extents[1+i]
		if length >= n || next.Compressed || next.Zero || next.At.Store != e.At.Store || next.At.Offset != e.At.Offset+length {
			break
		}
		length = min(length+next.Length, n)
	}
	return e.At.Store.File(), e.At.Offset, length
}

// sendRange sends exactly n bytes, those at off; the transport is ours. Bytes
// that the file does not give are read from the device. If they cannot be had,
// zeros are sent in their place and failure is set.
func (s *session) sendRange(off, n int64) (failure, err error) {
	for n > 0 {
		sent, err := s.sendFrom(off, n)
		if err == errAgain {
			// The bytes may have moved when the client is ready for more.
			if err := s.out.t.writable(); err != nil {
				return failure, err
			}
			continue
		}
		if sent == 0 {
			p := s.line.out[:min(n, lineBatch)]
			if failure == nil {
				_, failure = s.dev.ReadAt(p, s.export.Offset+off)
			}
			if failure != nil {
				if !s.structured {
					return failure, nil
				}
				clear(p)
			}
			if err := s.out.write(p); err != nil {
				return failure, err
			}
			sent = len(p)
		}
		off += int64(sent)
		n -= int64(sent)
	}
	return failure, nil
}

// sendFrom sends some bytes by location. It returns 0 where there is none.
func (s *session) sendFrom(off, n int64) (sent int, err error) {
	s.loan.begin(s.dev)
	if file, at, length := s.locate(off, n); file != nil {
		sent, err = s.out.t.sendFile(file, at, int(length))
	}
	s.loan.end(sent > 0)
	return sent, err
}
