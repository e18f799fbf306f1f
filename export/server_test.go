package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestFailures: an error of the device reaches the client that asked, as what
// it is, and does no harm to the connection.
func TestFailures(t *testing.T) {
	broken := errors.New("medium is broken")
	const bad = 256 << 10
	for _, waits := range []bool{false, true} {
		dev := &hooked{Device: memDisk(t, 1<<20)}
		fails := func(p []byte, off int64) bool { return off < bad+512 && off+int64(len(p)) > bad }
		dev.readAt = func(p []byte, off int64) (int, error) {
			if fails(p, off) {
				return 0, broken
			}
			return dev.Device.ReadAt(p, off)
		}
		dev.tryReadAt = func(p []byte, off int64) error {
			if waits {
				return image.ErrWouldBlock
			}
			if fails(p, off) {
				return broken
			}
			return dev.Device.TryReadAt(p, off)
		}
		dev.writeAt = func([]byte, int64, image.WriteFlags) error { return syscall.EDQUOT }
		dev.writeZeroes = func(int64, int64, image.WriteFlags) error { return image.ErrReadOnly }
		var mended atomic.Bool
		dev.flush = func() error {
			if mended.Load() {
				return nil
			}
			return broken
		}
		// Zeros, data and zeros, so that the failure comes in a later chunk.
		dev.appendExtents = func(dst []image.Extent, off, n int64, _ image.Want) ([]image.Extent, error) {
			if off < 64<<10 {
				return append(dst, image.Extent{Offset: off, Length: min(n, 64<<10-off), Zero: true}), nil
			}
			return append(dst, image.Extent{Offset: off, Length: n, Data: true}), nil
		}
		s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
		for _, style := range []style{simple, structured, extended} {
			late := "hole 0+65536, error 5 at 65536"
			at := fmt.Sprintf("error 5 at %d", bad)
			if style == simple {
				late, at = "error 5", "error 5"
			}
			p := s.connect("unix", "", style)
			for _, test := range []struct {
				cmd    nbd.Command
				flags  nbd.CommandFlags
				off, n uint64
				want   string
			}{
				{nbd.CmdRead, 0, bad, 4096, at},
				{nbd.CmdRead, 0, 0, 1 << 20, late},
				{nbd.CmdWrite, 0, 0, 512, "error 28"},
				{nbd.CmdWrite, nbd.CmdFlagFUA, 0, 512, "error 28"},
				{nbd.CmdWrite, 0, 0, 300000, "error 28"},
				{nbd.CmdWriteZeroes, 0, 0, 512, "error 1"},
				{nbd.CmdFlush, 0, 0, 0, "error 5"},
				{nbd.CmdTrim, nbd.CmdFlagFUA, 0, 512, "error 5"}, // the flush in it
				{nbd.CmdCache, 0, bad, 4096, "error 5"},
			} {
				var payload []byte
				if test.cmd == nbd.CmdWrite {
					payload = make([]byte, test.n)
				}
				if got := p.call(test.cmd, test.flags, test.off, test.n, payload).String(); got != test.want {
					t.Errorf("%v %v %d+%d waits %v: %s, want %s", style, test.cmd, test.off, test.n, waits, got, test.want)
				}
			}
			p.ok(nbd.CmdRead, 0, 0, 512, nil)
		}
		mended.Store(true) // for the end
	}
}

// TestStalledDevice: a device that does not answer holds up neither clients of
// others nor the rest of its own.
func TestStalledDevice(t *testing.T) {
	for name, try := range map[string]func([]byte, int64) error{"would wait": never, "under way": underWayAlways} {
		t.Run(name, func(t *testing.T) { stallDevice(t, try) })
	}
}

func stallDevice(t *testing.T, try func([]byte, int64) error) {
	stalled := &hooked{Device: memDisk(t, 1<<20), tryReadAt: try}
	goOn := make(chan struct{})
	stalled.readAt = func(p []byte, off int64) (int, error) {
		if off < 4096 {
			<-goOn
		}
		return stalled.Device.ReadAt(p, off)
	}
	s := serve(t, map[string]*Export{"stalled": {Device: stalled}, "": {Device: memDisk(t, 1<<20)}}, nil)
	p := s.connect("unix", "stalled", simple)
	for cookie := range uint64(8) {
		p.write(p.header(nbd.CmdRead, 0, cookie, 512*cookie, 512))
	}
	p.write(p.header(nbd.CmdRead, 0, 8, 4096, 512))
	if c := p.chunk(512); c.cookie != 8 {
		t.Errorf("the reply to %d came", c.cookie)
	}
	other := s.connect("unix", "", simple)
	other.ok(nbd.CmdRead, 0, 0, 512, nil)
	close(goOn)
	for range 8 {
		if c := p.chunk(512); c.cookie >= 8 {
			t.Errorf("the reply to %d came", c.cookie)
		}
	}
}

// TestSlowReader: a client that sends requests and reads no replies makes the
// server hold no more than its limits, and hurts nobody.
func TestSlowReader(t *testing.T) {
	for _, network := range []string{"unix", "tcp", "pipe"} {
		dev := &hooked{Device: memDisk(t, 8<<20), tryReadAt: never}
		var most atomic.Int64
		var s *server
		dev.readAt = func(p []byte, off int64) (int, error) {
			s.memory.mu.Lock()
			most.Store(max(most.Load(), s.memory.used))
			s.memory.mu.Unlock()
			return dev.Device.ReadAt(p, off)
		}
		const connBytes, memory = 8 << 20, 12 << 20
		s = serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) {
			s.Limits = Limits{ConnBytes: connBytes, Memory: memory}
		})
		const clients = 3
		for range clients {
			p := s.connect(network, "", simple)
			p.conn.SetDeadline(time.Time{})
			go func() {
				for range 1000 {
					if _, err := p.conn.Write(p.header(nbd.CmdRead, 0, 1, 0, 2<<20)); err != nil {
						return
					}
				}
			}()
			defer p.conn.Close()
		}
		// They are stuck once what they hold leaves no room for a further
		// request. Another client is served nevertheless.
		held := func() int64 {
			s.memory.mu.Lock()
			defer s.memory.mu.Unlock()
			return s.memory.used
		}
		for deadline := time.Now().Add(patience); held() <= memory-2<<20; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d bytes are held, fewer than clients asked for", network, held())
			}
		}
		p := s.connect(network, "", simple)
		for range 20 {
			p.ok(nbd.CmdRead, 0, 0, 2<<20, nil)
		}
		if limit := int64(memory + (clients+1)*(2<<20+64<<10)); most.Load() > limit {
			t.Errorf("%s: %d bytes were held, the limit is %d", network, most.Load(), limit)
		}
		s.cutAll()
	}
}

// cutAll ends all connections as a failing network would.
func (s *server) cutAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ses := range s.sessions {
		ses.conn.Close()
	}
}

// TestFlood: many small requests at once, more than may be in progress.
func TestFlood(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		dev := &hooked{Device: memDisk(t, 1<<20), tryReadAt: never}
		var now, most atomic.Int64
		dev.readAt = func(p []byte, off int64) (int, error) {
			n := now.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			defer now.Add(-1)
			return dev.Device.ReadAt(p, off)
		}
		s := serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) { s.Limits.Requests = 4 })
		p := s.connect(network, "", style)
		const count = 3000
		var out []byte
		for i := range uint64(count) {
			out = append(out, p.header(nbd.CmdRead, 0, i, i*64, 64)...)
		}
		go p.conn.Write(out)
		seen := make(map[uint64]bool)
		for range count {
			c := p.chunk(64)
			if c.errno != 0 || seen[c.cookie] {
				t.Fatalf("request %d: error %d, again %v", c.cookie, c.errno, seen[c.cookie])
			}
			seen[c.cookie] = true
		}
		if most.Load() > 4 {
			t.Errorf("%d requests were in progress", most.Load())
		}
	})
}

// A client that aborts the negotiation has not left in disorder because it does
// not wait for the answer.
func TestAbortWithoutWaiting(t *testing.T) {
	here, there := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- new(Server).ServeConn(there) }()
	if _, err := io.ReadFull(here, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	abort := binary.BigEndian.AppendUint32(nil, nbd.FlagFixedNewstyle)
	abort = binary.BigEndian.AppendUint64(abort, nbd.MagicOption)
	abort = binary.BigEndian.AppendUint64(abort, uint64(nbd.OptAbort)<<32)
	if _, err := here.Write(abort); err != nil {
		t.Fatal(err)
	}
	here.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestDisconnect: what was asked for before DISC is answered; a client that
// vanishes in the middle of anything leaves nothing behind.
func TestDisconnect(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		dev := &hooked{Device: memDisk(t, 8<<20), tryReadAt: never}
		s := serve(t, map[string]*Export{"": {Device: dev}}, nil)

		p := s.connect(network, "", style)
		var out []byte
		for i := range uint64(8) {
			out = append(out, p.header(nbd.CmdRead, 0, i, 0, 4096)...)
		}
		go p.conn.Write(append(out, p.header(nbd.CmdDisc, 0, 0, 0, 0)...))
		for range 8 {
			p.chunk(4096)
		}
		if _, err := p.conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after DISC: %v", err)
		}

		// In mid header, in a small payload, in a large one, after many reads.
		for _, cut := range []func(p *peer) []byte{
			func(p *peer) []byte { return p.header(nbd.CmdRead, 0, 1, 0, 512)[:20] },
			func(p *peer) []byte { return append(p.header(nbd.CmdWrite, 0, 1, 0, 512), 1, 2, 3) },
			func(p *peer) []byte { return append(p.header(nbd.CmdWrite, 0, 1, 0, 4<<20), make([]byte, 1<<20)...) },
			func(p *peer) []byte {
				// Expecting another large write, and getting half of it.
				h := p.header(nbd.CmdWrite, 0, 1, 0, 1<<20)
				whole := append(h, make([]byte, 1<<20)...)
				return append(whole, whole[:len(whole)/2]...)
			},
			func(p *peer) []byte { return bytes.Repeat(p.header(nbd.CmdRead, 0, 1, 0, 1<<20), 64) },
		} {
			p := s.connect(network, "", style)
			b := cut(p)
			p.conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)) // a pipe is not read for ever
			p.conn.Write(b)
			p.conn.Close()
		}
	})
}

// A vsock is a connection of which the client must not see the end of both ways
// before it has ended its own.
type vsock struct {
	*net.UnixConn
	closed chan<- time.Time
}

func (vsock) RemoteAddr() net.Addr { return vsockAddr{} }

func (c vsock) Close() error {
	select {
	case c.closed <- time.Now():
	default:
	}
	return c.UnixConn.Close()
}

type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }
func (vsockAddr) String() string  { return "1:2" }

// TestParting: over AF_VSOCK, the client leaves first, if it does not take too
// long.
func TestParting(t *testing.T) {
	for name, bye := range map[string]func(*peer){
		"DISC": func(p *peer) {
			p.write(p.header(nbd.CmdDisc, 0, 0, 0, 0))
		},
		"ABORT": func(p *peer) { p.option(nbd.OptAbort, nil) },
	} {
		for _, leaves := range []bool{true, false} {
			t.Run(fmt.Sprint(name, leaves), func(t *testing.T) {
				s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
				p, conn := accepted(t)
				closed := make(chan time.Time, 2)
				ended := make(chan error, 1)
				go func() { ended <- s.ServeConn(vsock{conn, closed}) }()
				p.greet()
				if name == "DISC" {
					p.option(nbd.OptGo, make([]byte, 6))
				}
				began := time.Now()
				bye(p)
				if _, err := p.conn.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("after it: %v", err)
				}
				select {
				case at := <-closed:
					if at.Sub(began) < partingTime { // else this was not in time
						t.Error("the connection was closed before the client had left")
					}
				case <-time.After(partingTime / 20):
				}
				if leaves {
					p.conn.Close()
				}
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// nameless is a connection that knows no addresses.
type nameless struct{ *net.UnixConn }

func (nameless) RemoteAddr() net.Addr { return nil }

// TestNoAddress: nothing needs to know where a client is.
func TestNoAddress(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	p, conn := accepted(t)
	ended := make(chan error, 1)
	go func() { ended <- s.ServeConn(nameless{conn}) }()
	p.greet()
	p.option(nbd.OptGo, make([]byte, 6))
	p.ok(nbd.CmdRead, 0, 0, 512, nil)
	p.write(p.header(nbd.CmdDisc, 0, 0, 0, 0))
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// accepted returns a client of nobody yet, and the other end of its connection.
func accepted(t *testing.T) (*peer, *net.UnixConn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := &peer{t: t}
	if p.conn, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.conn.Close() })
	p.conn.SetDeadline(time.Now().Add(patience))
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return p, conn.(*net.UnixConn)
}

// TestShutdownUnderLoad: what was accepted is done and flushed, and every
// reply that was sent was sent whole.
func TestShutdownUnderLoad(t *testing.T) {
	for _, network := range []string{"unix", "tcp", "pipe"} {
		dev := &hooked{Device: memDisk(t, 16<<20)}
		var writes, flushed atomic.Int64
		dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
			defer writes.Add(1)
			return dev.Device.WriteAt(p, off, flags)
		}
		dev.flush = func() error { flushed.Store(writes.Load()); return nil }
		s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
		var wg sync.WaitGroup
		var replied atomic.Int64
		started := make(chan struct{}, 4)
		for c := range 4 {
			p := s.connect(network, "", simple)
			wg.Go(func() {
				go func() {
					for i := range uint64(1 << 20) {
						b := append(p.header(nbd.CmdWrite, 0, i, uint64(c)<<20, 4096), make([]byte, 4096)...)
						if _, err := p.conn.Write(b); err != nil {
							return
						}
					}
				}()
				for n := 0; ; n++ {
					var reply [nbd.SimpleReplySize]byte
					if got, err := io.ReadFull(p.conn, reply[:]); err != nil {
						// A stream socket that is closed with input unread is
						// reset, and then may lose what was on its way.
						if got != 0 && !errors.Is(err, syscall.ECONNRESET) {
							t.Errorf("%s: a reply of %d bytes: %v", network, got, err)
						}
						p.conn.Close()
						return
					}
					replied.Add(1)
					if n == 100 {
						started <- struct{}{}
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		s.shutdown()
		if w, f := writes.Load(), flushed.Load(); w != f {
			t.Errorf("%s: %d writes, %d when flushed", network, w, f)
		}
		wg.Wait()
		if r, w := replied.Load(), writes.Load(); r > w {
			t.Errorf("%s: %d replies to %d writes", network, r, w)
		}
	}
}

// TestShutdownCut: a device that never answers does not keep Shutdown from
// returning, with an error.
func TestShutdownCut(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20), tryReadAt: never}
	asked, goOn := make(chan struct{}), make(chan struct{})
	dev.readAt = func(p []byte, off int64) (int, error) {
		close(asked)
		<-goOn
		return len(p), nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", simple)
	p.write(p.header(nbd.CmdRead, 0, 1, 0, 512))
	<-asked
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if !p.gone() {
		t.Error("the connection goes on")
	}
	close(goOn)
	settled := func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.sessions) == 0 }
	for !settled() {
		runtime.Gosched()
	}
}

// TestShutdownCutInUse: nor does a descriptor that is in use, as by sendfile
// from a medium that stalls, which keeps it from being closed.
func TestShutdownCutInUse(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20), tryReadAt: never}
	asked, goOn := make(chan struct{}, 2), make(chan struct{})
	dev.readAt = func(p []byte, off int64) (int, error) {
		asked <- struct{}{}
		<-goOn
		return len(p), nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	for range 2 {
		p := s.connect("unix", "", simple)
		p.write(p.header(nbd.CmdRead, 0, 1, 0, 512))
		<-asked
	}
	s.mu.Lock()
	sessions := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	for _, ses := range sessions {
		rc, err := ses.conn.(*net.UnixConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		using := make(chan struct{})
		go rc.Control(func(uintptr) { close(using); <-goOn })
		<-using
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	ended := make(chan error, 1)
	go func() {
		err := s.Shutdown(ctx)
		for _, ses := range sessions {
			<-ses.ctx.Done() // it is cut
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown: %v", err)
		}
	case <-time.After(patience):
		t.Error("Shutdown waits for the descriptors")
	}
	close(goOn)
	settled := func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.sessions) == 0 }
	for !settled() {
		runtime.Gosched()
	}
}

// TestShutdownFlushesLateWrite: a write that was on its way while another
// client flushed is not covered by that flush.
func TestShutdownFlushesLateWrite(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20)}
	begun, goOn := make(chan struct{}), make(chan struct{})
	dev.writeAt = func([]byte, int64, image.WriteFlags) error {
		close(begun)
		<-goOn
		return nil
	}
	var flushes atomic.Int64
	dev.flush = func() error { flushes.Add(1); return nil }
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	writer, flusher := s.connect("unix", "", simple), s.connect("unix", "", simple)
	writer.write(append(writer.header(nbd.CmdWrite, 0, 1, 0, 512), make([]byte, 512)...))
	<-begun
	flusher.ok(nbd.CmdFlush, 0, 0, 0, nil)
	close(goOn)
	writer.answer(0, 0)
	s.shutdown()
	if n := flushes.Load(); n < 2 { // two connections may end at once
		t.Errorf("%d flushes, want one more at the end", n)
	}
}

func TestShutdownReportsFlush(t *testing.T) {
	broken := errors.New("medium is broken")
	dev := &hooked{Device: memDisk(t, 1<<20), flush: func() error { return broken }}
	for cmd, payload := range map[nbd.Command][]byte{nbd.CmdWrite: make([]byte, 512), nbd.CmdWriteZeroes: nil, nbd.CmdTrim: nil} {
		s := &Server{Open: func(context.Context, *Client, string) (*Export, error) { return &Export{Device: dev}, nil }}
		srv := &server{Server: s, t: t}
		p := srv.connect("pipe", "", simple)
		p.ok(cmd, 0, 0, 512, payload)
		// That a client has asked for a flush, and heard that it failed, does
		// not make the data durable.
		if a := p.call(nbd.CmdFlush, 0, 0, 0, nil); a.errno != nbd.EIO {
			t.Errorf("flush: %v", a)
		}
		if err := s.Shutdown(t.Context()); !errors.Is(err, broken) {
			t.Errorf("Shutdown after %v: %v", cmd, err)
		}
		if err := s.ServeConn(p.conn); err != ErrServerClosed {
			t.Errorf("ServeConn afterwards: %v", err)
		}
	}
}

// TestFailuresAreLogged: a device that fails is heard of, and does not fill
// the log; that a client has left is no failure.
func TestFailuresAreLogged(t *testing.T) {
	broken := errors.New("medium is broken")
	dev := &hooked{Device: memDisk(t, 1<<20)}
	dev.readAt = func([]byte, int64) (int, error) { return 0, broken }
	dev.tryReadAt = func([]byte, int64) error { return broken }
	begun, goOn := make(chan struct{}), make(chan struct{})
	dev.writeZeroes = func(int64, int64, image.WriteFlags) error {
		close(begun)
		<-goOn
		return nil
	}
	var log lockedBuffer
	s := serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) {
		s.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	})
	p := s.connect("unix", "", simple)
	p.write(p.header(nbd.CmdWriteZeroes, 0, 1, 0, 512))
	<-begun
	p.conn.Close()
	s.cutAll()
	close(goOn)

	p = s.connect("unix", "", simple)
	for range 10 * maxComplaints {
		p.write(p.header(nbd.CmdRead, 0, 1, 0, 512))
		if a := p.answer(0, 512); a.errno != nbd.EIO {
			t.Fatalf("got %+v", a)
		}
	}
	if n := strings.Count(log.String(), "medium is broken"); n != maxComplaints {
		t.Errorf("%d failures were logged, want %d", n, maxComplaints)
	}
	if strings.Contains(log.String(), "canceled") {
		t.Errorf("that a client left was logged:\n%s", log.String())
	}
}

func TestComplaints(t *testing.T) {
	var c complaints
	now := time.Now()
	for range maxComplaints {
		if ok, kept := c.next(now); !ok || kept != 0 {
			t.Fatalf("got %v, %d", ok, kept)
		}
	}
	for range 7 {
		if ok, _ := c.next(now.Add(complaintsWindow - 1)); ok {
			t.Fatal("one too many")
		}
	}
	if ok, kept := c.next(now.Add(complaintsWindow)); !ok || kept != 7 {
		t.Errorf("got %v, %d in the next window", ok, kept)
	}
	if ok, kept := c.next(now.Add(complaintsWindow)); !ok || kept != 0 {
		t.Errorf("got %v, %d after that", ok, kept)
	}
}

// A lockedBuffer is written to by several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestGroupCommit: flushes that wait while one runs are served by the next
// one, all of them, whatever connection they came from.
func TestGroupCommit(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20)}
	var flushes atomic.Int64
	begun, goOn := make(chan struct{}, 100), make(chan struct{})
	dev.flush = func() error {
		flushes.Add(1)
		begun <- struct{}{}
		<-goOn
		return nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	first := s.connect("unix", "", simple)
	first.write(first.header(nbd.CmdFlush, 0, 1, 0, 0))
	<-begun
	var peers []*peer
	for range 3 {
		p := s.connect("unix", "", simple)
		for i := range uint64(5) {
			p.write(p.header(nbd.CmdFlush, 0, i, 0, 0))
		}
		// The line takes requests in order: when this is answered, the
		// flushes before it are waiting.
		p.write(p.header(nbd.CmdRead, 0, 99, 0, 512))
		if c := p.chunk(512); c.cookie != 99 {
			t.Fatalf("a flush was answered before it was done")
		}
		peers = append(peers, p)
	}
	close(goOn)
	first.answer(0, 0)
	for _, p := range peers {
		for range 5 {
			p.answer(0, 0)
		}
	}
	if n := flushes.Load(); n != 2 {
		t.Errorf("%d flushes of the device, want 2", n)
	}
}

// TestWaitOnLine: a client that has nothing else in progress waits with its line for
// a medium that was brief. What it sends meanwhile comes after that, but the next
// time goes on; other clients never wait, and their flushes are not taken to be covered.
func TestWaitOnLine(t *testing.T) {
	block := pattern(0, 512)
	for name, request := range map[string]func(p *peer, cookie uint64) []byte{
		"flush": func(p *peer, cookie uint64) []byte { return p.header(nbd.CmdFlush, 0, cookie, 0, 0) },
		"FUA": func(p *peer, cookie uint64) []byte {
			return append(p.header(nbd.CmdWrite, nbd.CmdFlagFUA, cookie, 0, 512), block...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev := &hooked{Device: memDisk(t, 1<<20)}
			var stalls atomic.Bool
			var flushes atomic.Int64
			begun, goOn := make(chan struct{}, 10), make(chan struct{})
			wait := func() {
				if stalls.Load() {
					begun <- struct{}{}
					<-goOn
				}
			}
			dev.flush = func() error {
				flushes.Add(1)
				wait()
				return nil
			}
			dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
				if flags&image.FUA == 0 {
					t.Error("a write without FUA")
				}
				wait()
				return dev.Device.WriteAt(p, off, 0)
			}
			s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
			brief := func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				for _, d := range s.devices {
					d.brief.Store(true)
				}
			}
			p, other := s.connect("unix", "", simple), s.connect("unix", "", simple)
			other.ok(nbd.CmdRead, 0, 4096, 512, nil)
			brief()
			stalls.Store(true)

			p.write(request(p, 1))
			<-begun
			p.write(p.header(nbd.CmdRead, 0, 2, 0, 512))
			if name == "flush" {
				other.write(other.header(nbd.CmdFlush, 0, 3, 0, 0))
			}
			other.write(other.header(nbd.CmdRead, 0, 4, 4096, 512))
			if c := other.chunk(512); c.cookie != 4 {
				t.Fatalf("the reply to %d came", c.cookie)
			}
			goOn <- struct{}{}
			for cookie := range uint64(2) {
				if c := p.chunk(int(cookie) * 512); c.cookie != cookie+1 || c.errno != 0 {
					t.Fatalf("the reply to %d came: %d", c.cookie, c.errno)
				}
			}
			if name == "flush" {
				<-begun
				goOn <- struct{}{}
				if c := other.chunk(0); c.cookie != 3 || flushes.Load() != 2 {
					t.Fatalf("the reply to %d came after %d flushes of the device, want 3 and 2", c.cookie, flushes.Load())
				}
			}

			brief()
			p.write(request(p, 5))
			<-begun
			p.write(p.header(nbd.CmdRead, 0, 6, 0, 512))
			if c := p.chunk(512); c.cookie != 6 {
				t.Fatalf("the reply to %d came", c.cookie)
			}
			goOn <- struct{}{}
			if c := p.chunk(0); c.cookie != 5 {
				t.Fatalf("the reply to %d came", c.cookie)
			}

			stalls.Store(false)
		})
	}
}

// TestMayWait: a line does not wait for the medium where that may take long, or while
// its client may be waiting for something else.
func TestMayWait(t *testing.T) {
	const slow = 4096 // where reads are left to workers and wait
	flush := func(p *peer) []byte { return p.header(nbd.CmdFlush, 0, 1, 0, 0) }
	look := func(p *peer) []byte { return p.header(nbd.CmdRead, 0, 2, slow, 512) }
	for name, tt := range map[string]struct {
		lasting bool
		shared  bool
		try     error // what reads below slow get
		ask     func(p, other *peer, begun chan struct{})
	}{
		"the last time took long": {lasting: true, ask: func(p, _ *peer, begun chan struct{}) {
			p.write(flush(p))
			<-begun
			p.write(look(p))
		}},
		"more has arrived": {ask: func(p, _ *peer, _ chan struct{}) {
			p.write(append(flush(p), look(p)...))
		}},
		"a read is in progress": {try: image.ErrWouldBlock, ask: func(p, _ *peer, begun chan struct{}) {
			p.write(p.header(nbd.CmdRead, 0, 3, 0, 512))
			<-begun
			p.write(flush(p))
			<-begun
			p.write(look(p))
		}},
		"a read is under way": {try: image.ErrUnderWay, ask: func(p, _ *peer, begun chan struct{}) {
			p.write(append(p.header(nbd.CmdRead, 0, 3, 0, 512), flush(p)...))
			<-begun
			p.write(look(p))
		}},
		"much was written": {ask: func(p, _ *peer, begun chan struct{}) {
			p.ok(nbd.CmdWrite, 0, 0, briefBytes, make([]byte, briefBytes))
			p.ok(nbd.CmdWrite, 0, 0, 512, make([]byte, 512))
			p.write(flush(p))
			<-begun
			p.write(look(p))
		}},
		"a reply was not sent": {ask: func(p, _ *peer, _ chan struct{}) {
			const n = 300 << 10
			p.ok(nbd.CmdWrite, 0, 0, n, make([]byte, n))
			p.write(append(p.header(nbd.CmdWrite, 0, 4, 0, n), make([]byte, n/2)...))
			time.Sleep(20 * time.Millisecond)
			p.write(append(make([]byte, n/2), flush(p)...))
			if c := p.chunk(0); c.cookie != 4 {
				t.Fatalf("the reply to %d came", c.cookie)
			}
			p.write(look(p))
		}},
		"somebody else flushes": {shared: true, ask: func(p, other *peer, begun chan struct{}) {
			other.write(append(flush(other), look(other)...))
			other.chunk(512)
			<-begun
			p.write(append(p.header(nbd.CmdWrite, nbd.CmdFlagFUA, 1, 0, 512), make([]byte, 512)...))
			<-begun
			p.write(look(p))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dev := &hooked{Device: memDisk(t, 4<<20)}
			begun, goOn := make(chan struct{}, 10), make(chan struct{})
			wait := func() {
				begun <- struct{}{}
				<-goOn
			}
			dev.flush = func() error {
				wait()
				return nil
			}
			dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
				if flags&image.FUA != 0 {
					wait()
				}
				return dev.Device.WriteAt(p, off, 0)
			}
			dev.tryReadAt = func(p []byte, off int64) error {
				if off < slow && tt.try != nil {
					return tt.try
				}
				return dev.Device.TryReadAt(p, off)
			}
			dev.readAt = func(p []byte, off int64) (int, error) {
				if tt.try == image.ErrWouldBlock {
					wait()
				}
				return dev.Device.ReadAt(p, off)
			}
			s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
			p := s.connect("unix", "", simple)
			other := p
			if tt.shared {
				other = s.connect("unix", "", simple)
			}
			other.ok(nbd.CmdRead, 0, slow, 512, nil) // both are being served
			p.ok(nbd.CmdRead, 0, slow, 512, nil)
			s.mu.Lock()
			for _, d := range s.devices {
				d.brief.Store(!tt.lasting)
			}
			s.mu.Unlock()
			defer close(goOn)
			tt.ask(p, other, begun)
			for {
				// That to the read that is under way may come before.
				c := p.chunkOf(func(cookie uint64) int { return map[uint64]int{2: 512, 3: 512}[cookie] })
				if c.cookie == 2 {
					break
				}
				if c.cookie != 3 || tt.try != image.ErrUnderWay {
					t.Fatalf("the reply to %d came", c.cookie)
				}
			}
		})
	}
}

// TestWriteThrough: what is written with FUA on the line goes where it belongs.
func TestWriteThrough(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20)}
	var fua atomic.Int64
	dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
		if flags&image.FUA != 0 {
			fua.Add(1)
		}
		return dev.Device.WriteAt(p, off, flags)
	}
	s := serve(t, map[string]*Export{"": {Device: dev, Offset: 4096}}, nil)
	p := s.connect("unix", "", simple)
	p.ok(nbd.CmdRead, 0, 0, 512, nil) // it is being served
	brief := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.devices[dev].isBrief()
	}
	if brief() {
		t.Error("nothing was written, and that was brief")
	}
	for i := range uint64(10) { // by a worker, then on the line
		p.ok(nbd.CmdWrite, nbd.CmdFlagFUA, i*512, 512, pattern(i*512, 512))
	}
	for range 2 * briefBytes / largeWrite { // it is durable, however much
		p.ok(nbd.CmdWrite, nbd.CmdFlagFUA, 8192, largeWrite, make([]byte, largeWrite))
	}
	for try := 0; !brief(); try++ {
		if try == 100 {
			t.Fatal("it is never brief")
		}
		p.ok(nbd.CmdWrite, nbd.CmdFlagFUA, 0, 512, pattern(0, 512))
	}
	got := make([]byte, 5120)
	if _, err := dev.Device.ReadAt(got, 4096); err != nil {
		t.Fatal(err)
	}
	same(t, "what was written", got, pattern(0, 5120))
	if n := fua.Load(); n < 10 {
		t.Errorf("%d writes with FUA, want 10 at least", n)
	}
}

// TestMultiConn: a flush on one connection covers the writes that were
// answered on another, and a flush that comes while one runs is not taken to
// be covered by it.
func TestMultiConn(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20)}
	var mu sync.Mutex
	var cached, durable int
	block := make(chan chan struct{}, 1)
	dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
		mu.Lock()
		defer mu.Unlock()
		cached++
		return nil
	}
	dev.flush = func() error {
		mu.Lock()
		n := cached // a flush covers what was written before it began
		mu.Unlock()
		select {
		case c := <-block:
			<-c
		default:
		}
		mu.Lock()
		defer mu.Unlock()
		durable = n
		return nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev, MultiConn: true}}, nil)
	a, b := s.connect("unix", "", simple), s.connect("tcp", "", simple)
	if a.flags&nbd.FlagCanMultiConn == 0 {
		t.Fatal("multi-conn is not told")
	}
	a.ok(nbd.CmdWrite, 0, 0, 512, make([]byte, 512))
	hold := make(chan struct{})
	block <- hold
	b.write(b.header(nbd.CmdFlush, 0, 1, 0, 0)) // runs, and takes long
	for len(block) > 0 {
		runtime.Gosched()
	}
	a.ok(nbd.CmdWrite, 0, 0, 512, make([]byte, 512))
	a.write(a.header(nbd.CmdFlush, 0, 2, 0, 0))
	a.write(a.header(nbd.CmdRead, 0, 3, 0, 512))
	if c := a.chunk(512); c.cookie != 3 {
		t.Fatal("the flush was answered before it was done")
	}
	close(hold)
	b.answer(0, 0)
	a.answer(0, 0)
	mu.Lock()
	defer mu.Unlock()
	if durable != 2 {
		t.Errorf("%d writes are durable, want 2", durable)
	}
}

// TestMaxClients: clients beyond the limit wait, as at qemu-nbd, also when
// there are several listeners.
func TestMaxClients(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, func(s *Server) { s.MaxClients = 1 })
	first := s.connect("unix", "", simple)
	second := s.dial("tcp")
	second.conn.SetDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := second.conn.Read(make([]byte, 1)); err == nil {
		t.Fatal("a second client was greeted")
	}
	first.ok(nbd.CmdRead, 0, 0, 512, nil)
	first.conn.Close()
	second.conn.SetDeadline(time.Now().Add(patience))
	second.greet()
}

func TestHandshakeDeadline(t *testing.T) {
	s := serve(t, nil, func(s *Server) { s.Limits.Handshake = 50 * time.Millisecond })
	for _, network := range []string{"unix", "tcp"} {
		// Whether it is greeted before is the machine's.
		if err := drain(s.dial(network)); err != nil {
			t.Errorf("%s: an idle client was kept", network)
		}
	}
}

// TestConnState: each connection is told of once in each state, in order.
func TestConnState(t *testing.T) {
	var mu sync.Mutex
	told := make(map[*Client][]State)
	refused := errors.New("not you")
	var refuse, releases atomic.Int64
	e := &Export{Device: memDisk(t, 1<<20), Release: func() { releases.Add(1) }}
	s := serve(t, map[string]*Export{"": e}, func(s *Server) {
		s.ConnState = func(c *Client, st State) {
			mu.Lock()
			defer mu.Unlock()
			told[c] = append(told[c], st)
		}
		s.Authorize = func(context.Context, *Client) error {
			if refuse.Load() != 0 {
				return refused
			}
			return nil
		}
	})
	s.connect("tcp", "", simple).write(encodeRequest(false, request{cmd: nbd.CmdDisc}))
	p := s.dial("unix")
	p.greet()
	p.option(nbd.OptAbort, nil)
	refuse.Store(1)
	if !s.dial("unix").gone() {
		t.Error("a client was not refused")
	}
	s.shutdown()
	counts := make(map[string]int)
	for _, states := range told {
		counts[fmt.Sprint(states)]++
	}
	if got, want := fmt.Sprint(counts), "map[[new active closed]:1 [new closed]:2]"; got != want {
		t.Errorf("states %s, want %s", got, want)
	}
	if releases.Load() != 1 {
		t.Errorf("released %d times", releases.Load())
	}
}

// TestServeSeveral: a closed listener ends Serve with its error.
func TestServeListenerFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{}
	ended := make(chan error)
	go func() { ended <- s.Serve(l) }()
	l.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}
