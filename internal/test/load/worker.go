//go:build linux

package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"golang.org/x/sys/unix"
)

const (
	maxDepth   = 1024
	bufferSize = 1 << 20
)

// A worker is one connection and the thread that serves it.
type worker struct {
	fd         int
	structured bool
	config     Config
	rng        *rand.PCG

	blocks   uint64 // of the export
	first, n uint64 // the part that this connection goes through in order
	next     uint64
	slots    []slot
	headers  []byte          // RequestSize for each slot
	payload  []byte          // of every write
	out      []syscall.Iovec // what is still to be sent
	outBuf   []syscall.Iovec
	in       []byte // received and not yet parsed
	buffer   []byte
	skip     int64 // bytes of data that are to come before the next header
	ends     int   // the slot whose reply is complete when they have come, or -1
	inFlight int
	fresh    []int // slots in out whose time of sending is not yet known

	ops     [4]int64 // by command
	bytes   int64
	latency histogram
	cpu     time.Duration
	err     error
}

type slot struct {
	command nbd.Command
	busy    bool
	got     int64 // bytes of a structured read that came
	sent    time.Duration
}

func newWorker(fd int, s *nbd.Session, c Config, i int) (*worker, error) {
	blocks := uint64(s.Size) / uint64(c.Block)
	if blocks < uint64(c.Conns) {
		return nil, fmt.Errorf("export of %d bytes is smaller than %d blocks of %d", s.Size, c.Conns, c.Block)
	}
	if c.Writes > 0 && s.Flags&nbd.FlagReadOnly != 0 {
		return nil, errors.New("writes to a read-only export")
	}
	if c.Flushes > 0 && s.Flags&nbd.FlagSendFlush == 0 {
		return nil, errors.New("flushes of an export that has none")
	}
	w := &worker{
		fd: fd, structured: s.Protocol == nbd.Structured, config: c, ends: -1,
		rng:    rand.NewPCG(c.Seed, uint64(i)),
		blocks: blocks, n: blocks / uint64(c.Conns),
		slots: make([]slot, c.Depth), fresh: make([]int, 0, c.Depth),
		headers: make([]byte, c.Depth*nbd.RequestSize),
		outBuf:  make([]syscall.Iovec, 0, 2*c.Depth),
		buffer:  make([]byte, bufferSize),
	}
	w.first = uint64(i) * w.n
	if c.Writes > 0 {
		w.payload = make([]byte, c.Block)
		for j := range w.payload {
			w.payload[j] = byte(w.rng.Uint64())
		}
	}
	return w, nil
}

// run sends and receives until the time is over and the last reply is there.
func (w *worker) run(start time.Time, duration time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadTime()
	for i := range w.slots {
		w.prepare(i)
	}
	for w.inFlight > 0 {
		blocked, err := w.send(start)
		if err != nil {
			return err
		}
		if err := w.receive(blocked); err != nil {
			return err
		}
		now := time.Since(start)
		if err := w.parse(now, now < duration); err != nil {
			return err
		}
	}
	w.cpu = threadTime() - before
	w.disconnect()
	return nil
}

func threadTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_THREAD, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// prepare queues the next request in a slot that is free.
func (w *worker) prepare(i int) {
	c, s := &w.config, &w.slots[i]
	s.command = w.choose()
	s.busy, s.got = true, 0
	var offset uint64
	var length int
	if s.command != nbd.CmdFlush {
		length = c.Block
		if c.Random {
			offset = w.rng.Uint64() % w.blocks
		} else {
			offset = w.first + w.next
			if w.next++; w.next == w.n {
				w.next = 0
			}
		}
		offset *= uint64(c.Block)
	}
	h := w.headers[i*nbd.RequestSize:][:nbd.RequestSize]
	binary.BigEndian.PutUint32(h, nbd.MagicRequest)
	binary.BigEndian.PutUint16(h[6:], uint16(s.command))
	binary.BigEndian.PutUint64(h[8:], uint64(i))
	binary.BigEndian.PutUint64(h[16:], offset)
	binary.BigEndian.PutUint32(h[24:], uint32(length))
	if len(w.out) == 0 {
		w.out = w.outBuf[:0]
	}
	w.queue(h)
	if s.command == nbd.CmdWrite {
		w.queue(w.payload)
	}
	w.fresh = append(w.fresh, i)
	w.inFlight++
}

func (w *worker) queue(b []byte) {
	v := syscall.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	w.out = append(w.out, v)
}

func (w *worker) choose() nbd.Command {
	c := &w.config
	if c.Writes == 0 && c.Flushes == 0 {
		return nbd.CmdRead
	}
	n := int(w.rng.Uint64() % uint64(c.Reads+c.Writes+c.Flushes))
	switch {
	case n < c.Reads:
		return nbd.CmdRead
	case n < c.Reads+c.Writes:
		return nbd.CmdWrite
	}
	return nbd.CmdFlush
}

// send sends what is queued, and reports whether some of it has to wait.
//
// The calls are raw: they tell Go's scheduler nothing, which costs nothing, and
// Run has given the thread a P of its own.
func (w *worker) send(start time.Time) (blocked bool, err error) {
	if len(w.fresh) > 0 {
		now := time.Since(start)
		for _, i := range w.fresh {
			w.slots[i].sent = now
		}
		w.fresh = w.fresh[:0]
	}
	for len(w.out) > 0 {
		m := syscall.Msghdr{Iov: &w.out[0]}
		m.Iovlen = uint64(min(len(w.out), 1024))
		n, _, e := syscall.RawSyscall(syscall.SYS_SENDMSG, uintptr(w.fd), uintptr(unsafe.Pointer(&m)), syscall.MSG_NOSIGNAL|syscall.MSG_DONTWAIT)
		switch e {
		case 0:
			w.advance(n)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return true, nil
		default:
			return false, fmt.Errorf("send: %w", e)
		}
	}
	return false, nil
}

// advance drops n bytes that were sent.
func (w *worker) advance(n uintptr) {
	for len(w.out) > 0 && n >= uintptr(w.out[0].Len) {
		n -= uintptr(w.out[0].Len)
		w.out = w.out[1:]
	}
	if n > 0 {
		w.out[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(w.out[0].Base), n))
		w.out[0].Len -= uint64(n)
	}
}

// receive waits for more to parse, or, if sending is blocked, for the one or
// the other.
func (w *worker) receive(blocked bool) error {
	rest := copy(w.buffer, w.in) // less than a header
	flags := 0
	if blocked {
		flags = syscall.MSG_DONTWAIT
	}
	for {
		p := w.buffer[rest:]
		n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(w.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(flags), 0, 0)
		switch {
		case e == syscall.EINTR:
		case e == syscall.EAGAIN && blocked:
			poll := [1]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN | unix.POLLOUT}}
			if _, err := unix.Poll(poll[:], -1); err != nil && err != syscall.EINTR {
				return fmt.Errorf("poll: %w", err)
			}
			if poll[0].Revents&unix.POLLOUT != 0 {
				w.in = w.buffer[:rest]
				return nil
			}
		case e != 0:
			return fmt.Errorf("receive: %w", e)
		case n == 0:
			return errors.New("the server closed the connection")
		default:
			w.in = w.buffer[:rest+int(n)]
			return nil
		}
	}
}

// parse takes in what was received; where more is wanted a new request takes
// the place of each that is complete.
func (w *worker) parse(now time.Duration, more bool) error {
	for {
		n := min(w.skip, int64(len(w.in)))
		w.in, w.skip = w.in[n:], w.skip-n
		if w.skip > 0 {
			return nil
		}
		if w.ends >= 0 {
			if err := w.complete(w.ends, now); err != nil {
				return err
			}
			if more {
				w.prepare(w.ends)
			}
			w.ends = -1
		}
		used, err := w.header()
		if err != nil || used == 0 {
			return err
		}
		w.in = w.in[used:]
	}
}

// header parses the header that w.in begins with and returns its length, or 0
// if more of it is to come. What is to be skipped after it is left in w.skip,
// and in w.ends the slot whose reply ends with that.
func (w *worker) header() (int, error) {
	if len(w.in) < nbd.SimpleReplySize {
		return 0, nil
	}
	be := binary.BigEndian
	magic, cookie := be.Uint32(w.in), be.Uint64(w.in[8:])
	if cookie >= uint64(len(w.slots)) || !w.slots[cookie].busy {
		return 0, fmt.Errorf("reply to request %d, which awaits none", cookie)
	}
	i := int(cookie)
	s := &w.slots[i]
	switch {
	case magic == nbd.MagicSimpleReply:
		if e := be.Uint32(w.in[4:]); e != 0 {
			return 0, fmt.Errorf("%s: %w", s.command, nbd.Errno(e))
		}
		if s.command == nbd.CmdRead {
			w.skip = int64(w.config.Block)
			s.got = w.skip
		}
		w.ends = i
		return nbd.SimpleReplySize, nil
	case magic == nbd.MagicStructuredReply && w.structured:
		return w.chunk(i)
	}
	return 0, fmt.Errorf("reply magic %#x", magic)
}

func (w *worker) chunk(i int) (int, error) {
	const holeSize = nbd.StructuredReplySize + 12
	be, s := binary.BigEndian, &w.slots[i]
	if len(w.in) < nbd.StructuredReplySize {
		return 0, nil
	}
	flags, kind, n := be.Uint16(w.in[4:]), be.Uint16(w.in[6:]), be.Uint32(w.in[16:])
	used := nbd.StructuredReplySize
	switch {
	case kind == nbd.ReplyNone && n == 0:
	case kind == nbd.ReplyOffsetData && n > 8:
		w.skip = int64(n)
		s.got += int64(n) - 8
	case kind == nbd.ReplyOffsetHole && n == 12:
		if len(w.in) < holeSize {
			return 0, nil
		}
		s.got += int64(be.Uint32(w.in[holeSize-4:]))
		used = holeSize
	default:
		return 0, fmt.Errorf("%s: chunk of type %d and %d bytes", s.command, kind, n)
	}
	if flags&nbd.ReplyFlagDone != 0 {
		w.ends = i
	}
	return used, nil
}

// complete counts the request in slot i, whose reply has come.
func (w *worker) complete(i int, now time.Duration) error {
	s := &w.slots[i]
	if s.command == nbd.CmdRead && s.got != int64(w.config.Block) {
		return fmt.Errorf("%d bytes in the reply to a read of %d", s.got, w.config.Block)
	}
	if s.command != nbd.CmdFlush {
		w.bytes += int64(w.config.Block)
	}
	s.busy = false
	w.inFlight--
	w.ops[s.command]++
	w.latency.add(now - s.sent)
	return nil
}

// disconnect says goodbye. The server may be gone already, which is no matter.
func (w *worker) disconnect() {
	var h [nbd.RequestSize]byte
	binary.BigEndian.PutUint32(h[:], nbd.MagicRequest)
	binary.BigEndian.PutUint16(h[6:], uint16(nbd.CmdDisc))
	unix.Sendto(w.fd, h[:], unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
}
