package export

import (
	"errors"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// Transmission. The goroutine of the session is the line: it takes what has
// arrived, serves every request in it that needs no waiting, and sends the
// replies together. What would wait becomes a task for the workers of the
// device, and the line goes on.

const (
	lineInput   = 256 << 10         // bytes taken at once
	lineBatch   = 128 << 10         // bytes of replies that are sent at once
	lineBytes   = 1<<20 + lineInput // each way; pages cost nothing until used
	lineShare   = 8                 // requests that are answered before more are served, see share
	largeRead   = 64 << 10          // reads from here on are looked at by extent
	largeWrite  = 64 << 10          // payloads beyond go to a buffer of their own
	lineAhead   = 4                 // large replies that were read and not sent
	expectLimit = lineBytes - 4<<10 // payloads up to so many bytes are expected

	// A write that took longer sends those after it to the workers for a
	// while: the medium or the page cache has had enough.
	slowWrite        = time.Millisecond
	slowWritePerByte = time.Nanosecond
	slowWritePause   = 100 * time.Millisecond
)

// A line is the state of the goroutine that reads the connection.
type line struct {
	memory lineMemory // of in and out
	in     []byte     // in[r:w] has arrived and was not served
	r, w   int
	served int    // requests since more input was waited for
	unsent int    // requests served since replies were sent
	shares bool   // the client may have a processor of its own
	early  []byte // had arrived before this session began
	out    []byte // replies that were not sent
	expect int    // the payload of the last large write, in bytes; another may follow

	slowUntil time.Time // writes go to workers
	patience  restraint // of waiting for the medium
	fetch     fetcher

	ahead chan struct{} // one for each reply that was read and not sent

	extents []image.Extent
	runs    []run
}

// errLeft is the orderly end of a connection.
var errLeft = errors.New("client left")

// transmit serves requests until the client leaves or something breaks, and
// returns when all of them have been answered. It is on the stack of a connection
// that waits, as prepare and conclude are not.
func (s *session) transmit(t transport) error {
	if err := s.prepare(t); err != nil {
		return err
	}
	s.srv.transmitting.Add(1)
	err := s.conclude(s.serveRequests())
	s.srv.transmitting.Add(-1)
	m := &s.line.memory
	unmapMemory(m.mem)
	m.mem = nil
	m.mu.Unlock()
	return err
}

// prepare makes what the line and the way out need.
func (s *session) prepare(t transport) error {
	mem, err := mapMemory(2 * lineBytes)
	if err != nil {
		return err
	}
	l := &s.line
	l.memory.mu.Lock()
	l.memory.mem, l.memory.later = mem, s.srv.trimLater
	l.in, l.out = mem[:lineBytes:lineBytes], mem[lineBytes:][:0]
	if t, ok := t.(*socket); ok {
		t.memory = &l.memory
	}
	l.w = copy(l.in, l.early)
	l.shares = runtime.GOMAXPROCS(0) > 1
	l.ahead = make(chan struct{}, lineAhead)
	s.out.init(t, func(error) { s.cut() }, s.endTask)
	s.loan.init(t, s.partFrom)
	return nil
}

// conclude ends what serveRequests has begun, which has returned err, and returns
// why the connection ends; nil if that is in good order.
func (s *session) conclude(err error) error {
	s.stopFetching()
	sendErr := s.sendOut()
	if waitErr := s.out.wait(); sendErr == nil {
		sendErr = waitErr
	}
	s.loan.close(s.ctx)
	if (s.stopping.Load() || errors.Is(err, errHanded)) && s.dev.dirty.Load() > 0 {
		if flushErr := s.dev.sync(); flushErr != nil {
			s.srv.flushFailed(flushErr)
			return flushErr
		}
	}
	if errors.Is(err, errHanded) {
		if sendErr != nil {
			return sendErr
		}
		return s.leaveOpen()
	}
	if errors.Is(err, errLeft) || errors.Is(err, io.EOF) {
		err = nil
	}
	if err == nil || errors.Is(err, errEnded) {
		err = sendErr
	}
	return err
}

// partFrom ends the connection to a client that does harm by taking nothing.
func (s *session) partFrom(why error) {
	s.srv.Log.Warn("connection cut", "client", s.client.Addr, "export", s.name, "why", why)
	s.cut()
}

func (s *session) serveRequests() error {
	for {
		if err := s.serveInput(); err != nil {
			return err
		}
		if err := s.sendOut(); err != nil {
			return err
		}
		err := s.boundary()
		if err == nil && s.line.fetch.kept > 0 {
			err = s.fetch()
		} else if err == nil {
			err = s.fill()
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && s.mayHandOver() {
			err = errHanded
		}
		if err != nil {
			return err
		}
	}
}

// sendOut sends the replies that the line has made.
func (s *session) sendOut() error {
	l := &s.line
	l.unsent = 0
	if len(l.out) == 0 {
		return nil
	}
	err := s.out.send(l.out)
	l.out = l.out[:0]
	return err
}

// fill waits for more input.
func (s *session) fill() error {
	l := &s.line
	single := l.served == 1
	switch {
	case l.served > lineShare || l.fetch.kept > lineShare/2:
		s.out.t.hurry(true)
	case l.served < lineShare: // else that is all there is, or one share of more
		s.out.t.hurry(false)
	}
	l.served = 0
	switch {
	case l.r < l.w:
		l.w = copy(l.in, l.in[l.r:l.w])
		l.r = 0
	case l.expect > 0:
		l.r, l.w = 0, 0
		return s.fillExpecting()
	default:
		l.r, l.w = 0, 0
		if single {
			s.linger(false)
		}
	}
	n, err := s.out.t.read(l.in[l.w:lineInput], nil)
	l.w += n
	return err
}

// linger is that of the transport, if no other connection transmits: it would
// want the processor.
func (s *session) linger(midst bool) {
	if s.srv.transmitting.Load() == 1 {
		s.out.t.linger(midst)
	}
}

// fillExpecting is fill after a large write: if another of that length comes,
// its payload arrives where it is written from.
func (s *session) fillExpecting() error {
	l := &s.line
	n := l.expect
	l.expect = 0
	// Wait first, so that an idle connection holds no buffer.
	if ok, err := s.out.t.ready(); !ok {
		if err != nil {
			return err
		}
		return s.fill()
	}
	t, err := s.newTask(&request{}, n, 0)
	if err == errScarce {
		return s.fill()
	}
	if err != nil {
		return err
	}
	head := s.requestSize()
	got, err := s.out.t.read(l.in[:head], t.buf.data(n))
	if err != nil {
		s.endTask(t)
		return err
	}
	if got >= head {
		r, err := s.decode(l.in)
		if err == nil && r.cmd == nbd.CmdWrite && r.n() == int64(n) && s.validate(&r) == nil {
			t.req, t.off, t.n = r, r.off(), r.n()
			return s.finishWrite(t, got-head)
		}
		copy(l.in[head:], t.buf.data(got-head))
	}
	l.w = got
	s.endTask(t)
	return nil
}

// serveInput serves the requests that have arrived as a whole.
func (s *session) serveInput() error {
	l := &s.line
	head := s.requestSize()
	for l.w-l.r >= head {
		r, err := s.decode(l.in[l.r:])
		if err != nil {
			return err
		}
		if r.cmd == nbd.CmdDisc {
			return errLeft
		}
		if err := s.share(); err != nil {
			return err
		}
		l.served++
		l.unsent++
		size := s.payload(&r)
		refused := s.validate(&r)
		if refused == nil && r.cmd == nbd.CmdBlockStatus && size > maxStatusQuery {
			refused = refuse(nbd.EINVAL, "CMD_BLOCK_STATUS payload not valid")
		}
		if refused != nil {
			l.r += head
			if err := s.refuse(&r, refused, size); err != nil {
				return err
			}
			continue
		}
		n := int(size)
		if l.w-l.r-head < n {
			if n <= largeWrite {
				return nil
			}
			l.r += head
			if err := s.takeWrite(&r); err != nil {
				return err
			}
			continue
		}
		payload := l.in[l.r+head : l.r+head+n]
		l.r += head + n
		if err := s.do(&r, payload); err != nil {
			return err
		}
	}
	return nil
}

// share sends some replies before the rest of what has arrived is served. A client
// that has a processor of its own takes them meanwhile, and sends again before
// this side would have to wait for it: neither has to be woken.
func (s *session) share() error {
	l := &s.line
	if l.unsent < lineShare || l.w-l.r < lineShare/2*s.requestSize() || !l.shares || s.srv.transmitting.Load() > 1 {
		return nil
	}
	return s.sendOut()
}

// room makes room for n bytes in the replies of the line.
func (s *session) room(n int) error {
	if l := &s.line; len(l.out)+n > cap(l.out) {
		return s.sendOut()
	}
	return nil
}

// batched sends the replies of the line if they are enough.
func (s *session) batched() error {
	if len(s.line.out) >= lineBatch {
		return s.sendOut()
	}
	return nil
}

func (s *session) done(r *request) error {
	if err := s.room(maxReplyHead); err != nil {
		return err
	}
	s.line.out = s.appendDone(s.line.out, r)
	return s.batched()
}

func (s *session) reject(r *request, f *refusal) error {
	if err := s.room(maxReplyHead + 6 + len(f.text)); err != nil {
		return err
	}
	s.line.out = s.appendError(s.line.out, r, f)
	return s.batched()
}

// refuse answers a request that is not done and skips its payload.
func (s *session) refuse(r *request, f *refusal, payload uint64) error {
	s.srv.Log.Debug("request refused", "client", s.client.Addr, "request", r.cmd, "why", f.text)
	if err := s.reject(r, f); err != nil {
		return err
	}
	if payload > maxSkip {
		s.srv.reached(limitPayload, "client", s.client.Addr, "bytes", payload)
		return errors.New("payload is too long to be skipped")
	}
	l := &s.line
	for {
		skip := min(uint64(l.w-l.r), payload)
		l.r += int(skip)
		if payload -= skip; payload == 0 {
			return nil
		}
		if err := s.sendOut(); err != nil {
			return err
		}
		n, err := s.receive(l.in[:lineInput], nil)
		if err != nil {
			return err
		}
		l.r, l.w = 0, n
	}
}

// do begins a request that is valid and has arrived as a whole.
func (s *session) do(r *request, payload []byte) error {
	if r.length == 0 && r.cmd != nbd.CmdFlush && r.cmd != nbd.CmdBlockStatus {
		return s.done(r)
	}
	switch r.cmd {
	case nbd.CmdRead:
		return s.readHere(r)
	case nbd.CmdWrite:
		if r.has(nbd.CmdFlagFUA) {
			if s.mayWait() && s.dev.claim() {
				return s.writeThrough(r, payload)
			}
		} else if s.mayWriteHere() {
			return s.writeHere(r, payload)
		}
		t, err := s.newTask(r, len(payload), 0)
		if err == errScarce {
			s.line.r -= len(payload) // it is there still
			return s.streamWrite(r)
		}
		if err != nil {
			return err
		}
		copy(t.buf.data(len(payload)), payload)
		s.dev.submit(t)
		return nil
	case nbd.CmdFlush:
		if s.mayWait() && s.dev.claim() {
			err := s.dev.sync()
			s.dev.unclaim()
			return s.waited(r, err)
		}
		t, err := s.newTask(r, 0, 0)
		if err != nil {
			return err
		}
		s.dev.flush(t)
		return nil
	case nbd.CmdBlockStatus:
		return s.askStatus(r, payload)
	}
	n := 0
	if r.cmd == nbd.CmdCache {
		n = int(min(r.n(), cachePiece))
	}
	t, err := s.newTask(r, n, 0)
	if err == errScarce && r.cmd == nbd.CmdCache {
		return s.done(r) // it is advice
	}
	if err != nil {
		return err
	}
	s.dev.submit(t)
	return nil
}

func (s *session) askStatus(r *request, payload []byte) error {
	length, want := r.length, s.contexts
	if r.has(nbd.CmdFlagPayloadLen) {
		var refused *refusal
		if length, want, refused = s.statusQuery(r, payload); refused != nil {
			return s.reject(r, refused)
		}
	}
	runs := maxStatus
	if r.has(nbd.CmdFlagReqOne) {
		runs = 1
	}
	hold := func() int64 { return int64(len(want)) * int64(runs) * 16 }
	t, err := s.newTask(r, 0, hold())
	if err == errScarce {
		runs = min(runs, scarceStatus)
		t, err = s.newTask(r, 0, hold())
	}
	if err == errScarce {
		return s.reject(r, refuse(nbd.ENOMEM, "%v needs too much memory", r.cmd))
	}
	if err != nil {
		return err
	}
	t.n, t.want, t.runs = int64(length), want, runs
	s.dev.submit(t)
	return nil
}

// mayWait reports whether the line may wait for the medium: not for long, and its client
// waits for the same, since it has sent nothing else.
func (s *session) mayWait() bool {
	l := &s.line
	idle := l.r == l.w && len(l.out) == 0 && s.out.inProgress.Load() == 0
	return idle && s.dev.isBrief() && !l.patience.holds()
}

// waited answers a request for which the line has waited.
func (s *session) waited(r *request, err error) error {
	if arrived, known := s.out.t.arrived(); known && !arrived {
		s.line.patience.ease()
	} else {
		s.line.patience.inVain()
	}
	if err != nil {
		return s.reject(r, s.failed(r, err))
	}
	return s.done(r)
}

// writeThrough writes on the line with FUA, as the one who flushes.
func (s *session) writeThrough(r *request, p []byte) error {
	start := time.Now()
	err := s.dev.WriteAt(p, s.export.Offset+r.off(), image.FUA)
	s.dev.wroteThrough(time.Since(start))
	s.dev.unclaim()
	return s.waited(r, err)
}

// mayWriteHere reports whether a write is likely to be short.
func (s *session) mayWriteHere() bool {
	l := &s.line
	return l.slowUntil.IsZero() || time.Now().After(l.slowUntil)
}

// writeHere writes on the line.
func (s *session) writeHere(r *request, p []byte) error {
	start := time.Now()
	err := s.dev.WriteAt(p, s.export.Offset+r.off(), 0)
	took := time.Since(start)
	s.dev.touched(r.n())
	s.line.slowUntil = time.Time{}
	if took > slowWrite+time.Duration(len(p))*slowWritePerByte {
		s.line.slowUntil = start.Add(took + slowWritePause)
	}
	if err != nil {
		return s.reject(r, s.failed(r, err))
	}
	return s.done(r)
}

// takeWrite begins a write whose payload is large and has arrived in part.
func (s *session) takeWrite(r *request) error {
	t, err := s.newTask(r, int(r.length), 0)
	if err == errScarce {
		return s.streamWrite(r)
	}
	if err != nil {
		return err
	}
	l := &s.line
	have := copy(t.buf.data(int(t.n)), l.in[l.r:l.w])
	l.r, l.w = 0, 0
	return s.finishWrite(t, have)
}

// streamWrite writes a payload, of which some may be there, piece by piece, as it
// arrives.
func (s *session) streamWrite(r *request) error {
	l := &s.line
	var flags image.WriteFlags
	if r.has(nbd.CmdFlagFUA) {
		flags = image.FUA
	}
	var failure error
	for off, left := r.off(), r.n(); left > 0; {
		if l.r == l.w {
			if err := s.sendOut(); err != nil {
				return err
			}
			n, err := s.receive(l.in[:lineInput], nil)
			if err != nil {
				return err
			}
			l.r, l.w = 0, n
		}
		p := l.in[l.r:min(int64(l.w), int64(l.r)+left)]
		if failure == nil {
			failure = s.dev.WriteAt(p, s.export.Offset+off, flags)
			s.dev.touched(int64(len(p)))
		}
		l.r += len(p)
		off += int64(len(p))
		left -= int64(len(p))
	}
	if failure != nil {
		return s.reject(r, s.failed(r, failure))
	}
	return s.done(r)
}

// receivePayload receives the rest of a payload, and perhaps what comes after it.
func (s *session) receivePayload(p []byte, have int) error {
	for l := &s.line; have < len(p); {
		if err := s.sendOut(); err != nil {
			return err
		}
		s.linger(true)
		n, err := s.receive(p[have:], l.in[:lineInput])
		if err != nil {
			return err
		}
		if have += n; have > len(p) {
			l.w = have - len(p)
		}
	}
	return nil
}

// finishWrite receives the rest of a payload, of which have bytes are there,
// and writes it. The input is empty.
func (s *session) finishWrite(t *task, have int) error {
	l := &s.line
	p := t.buf.data(int(t.n))
	if err := s.receivePayload(p, have); err != nil {
		s.endTask(t)
		return err
	}
	if len(p) <= expectLimit {
		l.expect = len(p)
	}
	if t.req.has(nbd.CmdFlagFUA) || !s.mayWriteHere() {
		s.dev.submit(t)
		return nil
	}
	err := s.writeHere(&t.req, p)
	s.endTask(t)
	return err
}
