package export

import (
	"io"
	"math"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// A socket is a transport over a descriptor, without the copies, locks and
// allocations of net.Conn. It waits in the runtime's poller; the deadlines of
// the net.Conn hold.
type socket struct {
	rc         syscall.RawConn
	minFile    int64 // what fileMin returns
	minForward int64 // what forwardMin returns

	hurries atomic.Bool // small calls are raw

	memory *lineMemory // that the reader lets go of while it waits; may be nil
	waits  bool        // it has

	lingersAfter bool // a single request
	lingersMidst bool // in a large write
	restraint    restraint

	// The functions that the poller calls are made once, and talk through
	// these fields: a closure for each call would be garbage for each call.
	rd struct {
		fn, peek func(fd uintptr) bool
		ask      func(fd uintptr)
		arrived  bool
		iov      [][]byte
		arr      [2][]byte
		n        int
		err      error
	}
	wr struct {
		fn, poll func(fd uintptr) bool
		iov      [][]byte
		wait     bool
		err      error
	}
	sf struct {
		fn   func(fd uintptr) bool
		use  func(src uintptr)
		file *os.File
		rc   syscall.RawConn // of file
		src  int
		off  int64
		n    int
		err  error
	}
	uq struct {
		fn func(fd uintptr)
		n  int
	}
	total atomic.Int64 // bytes that were sent
}

// Send buffers in bytes, of which the kernel takes twice as much.
const (
	// sendBuffer is asked for on Unix sockets, so that a large reply leaves in
	// one call.
	sendBuffer = 2 << 20

	// sendBufferTCP is asked for where this process may have more than others:
	// what an ordinary process is refused would be less than the kernel's own
	// choice, 4 MiB at most. Large replies over TCP are a tenth faster.
	sendBufferTCP = 8 << 20
)

// sendBufferClients is for how many clients the kernel may hold so much: one that
// takes nothing pins it.
const sendBufferClients = 16

// PrepareListener gives the connections that will be accepted larger send
// buffers, if they are TCP's, not too many (maxClients, 0: no limit) and this process
// may (CAP_NET_ADMIN): to be called before it gives up what it may.
func PrepareListener(l net.Listener, maxClients int) {
	t, ok := l.(*net.TCPListener)
	if !ok || maxClients == 0 || maxClients > sendBufferClients {
		return
	}
	if rc, err := t.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { // only speed depends on it
			_ = forceSendBuffer(int(fd), sendBufferTCP)
		})
	}
}

// newTransport returns the best transport for conn.
func newTransport(conn net.Conn) transport {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return stream{conn}
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return stream{conn}
	}
	s := &socket{rc: rc, minFile: math.MaxInt64, minForward: forwardMin}
	switch conn.(type) {
	case *net.TCPConn:
		s.lingersAfter = true
	case *net.UnixConn:
		if canSendFile {
			s.minFile = sendFileMin
		}
		s.minForward = math.MaxInt64
		s.lingersMidst = true
		setSendBuffer(rc, sendBuffer)
	}
	s.rd.fn, s.rd.peek, s.rd.ask = s.readNow, s.peekNow, s.askNow
	s.wr.fn, s.wr.poll = s.writeNow, s.roomNow
	s.sf.fn, s.sf.use = s.sendFileNow, s.useFile
	s.uq.fn = s.unreadNow
	return s
}

func (s *socket) read(a, b []byte) (int, error) {
	s.rd.arr = [2][]byte{a, b}
	s.rd.iov = s.rd.arr[:1]
	if len(b) > 0 {
		s.rd.iov = s.rd.arr[:]
	}
	err := s.rc.Read(s.rd.fn)
	s.goOn()
	if err != nil {
		return 0, err
	}
	if s.rd.err == nil && s.rd.n == 0 {
		return 0, io.EOF
	}
	return s.rd.n, s.rd.err
}

// wait is called before the poller waits for input, and goOn after.
func (s *socket) wait() {
	if s.memory != nil && !s.waits {
		s.waits = true
		s.memory.wait()
	}
}

func (s *socket) goOn() {
	if s.waits {
		s.waits = false
		s.memory.goOn()
	}
}

func (s *socket) readNow(fd uintptr) bool {
	s.goOn()
	for {
		if len(s.rd.iov) == 1 {
			s.rd.n, s.rd.err = s.readOne(int(fd), s.rd.iov[0])
		} else {
			s.rd.n, s.rd.err = unix.Readv(int(fd), s.rd.iov)
		}
		switch s.rd.err {
		case unix.EINTR:
		case unix.EAGAIN:
			s.wait()
			return false
		default:
			return true
		}
	}
}

// rawMost is up to how many bytes a call is raw in a hurry: to copy them takes some
// 50 µs, during which Go's scheduler can stop nothing here.
const rawMost = 256 << 10

// hurry makes small calls raw, which Go's scheduler is not told of. Told of a call
// after all was idle it wakes its monitor, and that costs up to a sixth of the
// processor time. With few requests at a time the line is faster for it: the
// monitor keeps a processor from sleeping deeply.
func (s *socket) hurry(many bool) {
	if s.hurries.Load() != many {
		s.hurries.Store(many)
	}
}

func (s *socket) readOne(fd int, p []byte) (int, error) {
	if s.hurries.Load() && len(p) <= rawMost {
		return rawRead(fd, p)
	}
	return unix.Read(fd, p)
}

func (s *socket) writeOne(fd int, p []byte) (int, error) {
	if s.hurries.Load() && len(p) <= rawMost {
		return rawWrite(fd, p)
	}
	return unix.Write(fd, p)
}

func (s *socket) ready() (bool, error) {
	err := s.rc.Read(s.rd.peek)
	s.goOn()
	if err != nil {
		return false, err
	}
	return true, nil // an error of the socket is for read to find
}

func (s *socket) peekNow(fd uintptr) bool {
	arrived := pollNow(fd, unix.POLLIN)
	if !arrived {
		s.wait()
	}
	return arrived
}

func (s *socket) write(iov [][]byte, wait bool) ([][]byte, error) {
	s.wr.iov, s.wr.wait, s.wr.err = iov, wait, nil
	err := s.rc.Write(s.wr.fn)
	if err == nil {
		err = s.wr.err
	}
	left := s.wr.iov
	s.wr.iov = nil // it would keep what was sent from the collector
	return left, err
}

// maxIOV is how many pieces one call takes. Up to so many unix.Writev needs no
// memory.
const maxIOV = 8

func (s *socket) writeNow(fd uintptr) bool {
	for len(s.wr.iov) > 0 {
		n, err := 0, error(nil)
		if len(s.wr.iov) == 1 {
			n, err = s.writeOne(int(fd), s.wr.iov[0])
		} else {
			n, err = unix.Writev(int(fd), s.wr.iov[:min(len(s.wr.iov), maxIOV)])
		}
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return !s.wr.wait
		case err != nil:
			s.wr.err = err
			return true
		default:
			s.total.Add(int64(n))
			s.wr.iov = advance(s.wr.iov, n)
		}
	}
	return true
}

// advance removes the first n bytes of iov.
func advance(iov [][]byte, n int) [][]byte {
	for len(iov) > 0 && n >= len(iov[0]) {
		n -= len(iov[0])
		iov = iov[1:]
	}
	if n > 0 {
		iov[0] = iov[0][n:]
	}
	return iov
}

func (s *socket) writable() error {
	return s.rc.Write(s.wr.poll)
}

func (s *socket) roomNow(fd uintptr) bool { return pollNow(fd, unix.POLLOUT) }

// pollNow asks the kernel, since the runtime's poller reports only changes,
// and forgets one that came before it began to wait.
func pollNow(fd uintptr, events int16) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	n, err := unix.Poll(p[:], 0)
	return n > 0 || err != nil && err != unix.EINTR
}

func (s *socket) sent() int64 { return s.total.Load() }

// unread asks how much memory of the queue belongs to replies, which is never
// less than what they are long. One call at a time.
func (s *socket) unread() int64 {
	if s.rc.Control(s.uq.fn) != nil {
		return 0 // closed
	}
	return int64(s.uq.n)
}

func (s *socket) unreadNow(fd uintptr) { s.uq.n = queued(int(fd)) }

// Measured, in bytes.
const (
	// sendFileMin: on a Unix socket, where sendfile moves pages. Below, a copy
	// is as fast; over TCP on one host it always is.
	sendFileMin = 64 << 10
	// forwardMin: over TCP, where sending takes three times as long as reading
	// from the page cache. A Unix socket gains nothing, and pays with CPU time.
	forwardMin = 256 << 10
)

func (s *socket) fileMin() int64 { return s.minFile }

func (s *socket) forwardMin() int64 { return s.minForward }

func (s *socket) sendFile(f *os.File, off int64, n int) (int, error) {
	if s.sf.file != f {
		rc, err := f.SyscallConn()
		if err != nil {
			return 0, err
		}
		s.sf.file, s.sf.rc = f, rc
	}
	s.sf.off, s.sf.n, s.sf.err = off, n, nil
	if err := s.sf.rc.Control(s.sf.use); err != nil { // it keeps f open meanwhile
		return 0, err
	}
	return s.sf.n, s.sf.err
}

func (s *socket) useFile(src uintptr) {
	s.sf.src = int(src)
	if err := s.rc.Write(s.sf.fn); err != nil {
		s.sf.n, s.sf.err = 0, err
	}
}

func (s *socket) sendFileNow(fd uintptr) bool {
	for {
		n, err := sendFile(int(fd), s.sf.src, s.sf.off, s.sf.n)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			err = errAgain
		}
		s.sf.n, s.sf.err = max(n, 0), err
		s.total.Add(int64(s.sf.n))
		return true
	}
}

// setSendBuffer asks for a send buffer, beyond what an ordinary process may
// have if this one may.
func setSendBuffer(rc syscall.RawConn, size int) {
	_ = rc.Control(func(fd uintptr) { // only speed depends on it
		if forceSendBuffer(int(fd), size) != nil {
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, size)
		}
	})
}
