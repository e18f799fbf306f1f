package export

import (
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// count is how often a limit was reached.
func (s *server) count(l limit) int64 { return s.reachedCounts[l].Load() }

// TestScarceMemory: when clients that take nothing of a reply, or send nothing
// of a payload, have all the memory, those that hold nothing are served all the
// same, in all that they may ask for.
func TestScarceMemory(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		const size, large = 32 << 20, 4 << 20
		broken := errors.New("medium is broken")
		var breakAt atomic.Int64
		breakAt.Store(-1)
		dev := &hooked{Device: memDisk(t, size), tryReadAt: never}
		dev.readAt = func(p []byte, off int64) (int, error) {
			if at := breakAt.Load(); at >= off && at < off+int64(len(p)) {
				return 0, broken
			}
			return dev.Device.ReadAt(p, off)
		}
		dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
			if at := breakAt.Load(); at >= off && at < off+int64(len(p)) {
				return broken
			}
			return dev.Device.WriteAt(p, off, flags)
		}
		s := serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) {
			s.Limits = Limits{ConnBytes: large, Memory: 3 * large}
		})
		used := func() int64 {
			s.memory.mu.Lock()
			defer s.memory.mu.Unlock()
			return s.memory.used
		}
		p := s.connect(network, "", style)
		if style != simple {
			p = s.connect(network, "", style, "base:allocation")
		}
		p.ok(nbd.CmdWrite, 0, 0, large, pattern(0, large))
		holds := func(want func(int64) bool) {
			t.Helper()
			for deadline := time.Now().Add(patience); !want(used()); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d bytes are held", used())
				}
			}
		}
		holds(func(n int64) bool { return n == 0 }) // the reply comes a moment before
		for _, cmd := range []nbd.Command{nbd.CmdRead, nbd.CmdWrite} {
			c := s.connect(network, "", simple)
			c.write(c.header(cmd, 0, 1, 0, large))
			if cmd == nbd.CmdWrite {
				c.write([]byte("x"))
			}
		}
		holds(func(n int64) bool { return n >= 2*large })

		same(t, "read", p.ok(nbd.CmdRead, 0, 0, large, nil), pattern(0, large))
		p.ok(nbd.CmdWrite, nbd.CmdFlagFUA, 8<<20, large, pattern(8<<20, large))
		p.ok(nbd.CmdFlush, 0, 0, 0, nil)
		p.ok(nbd.CmdCache, 0, 0, size, nil)
		p.ok(nbd.CmdTrim, 0, 16<<20, 8<<20, nil)
		if style != simple {
			p.ok(nbd.CmdBlockStatus, 0, 0, size, nil)
		}
		same(t, "read", p.ok(nbd.CmdRead, 0, 8<<20, large, nil), pattern(8<<20, large))

		// Many at once, of which only the last is alone.
		var out []byte
		for i := range uint64(4) {
			out = append(out, p.header(nbd.CmdRead, 0, i, i<<20, 1<<20)...)
		}
		p.write(out)
		for left := 4; left > 0; {
			if p.chunk(1 << 20).done {
				left--
			}
		}
		if s.count(limitMemory) == 0 {
			t.Error("memory was not scarce: nothing was tested")
		}

		// What fails fails as ever, but for what has been promised.
		breakAt.Store(10 << 20)
		if a := p.call(nbd.CmdWrite, 0, 8<<20, large, make([]byte, large)); a.errno != nbd.EIO {
			t.Errorf("write: %v", a)
		}
		p.ok(nbd.CmdRead, 0, 0, 64<<10, nil)
		if style != simple {
			if a := p.call(nbd.CmdRead, 0, 8<<20, large, nil); a.errno != nbd.EIO {
				t.Errorf("read: %v", a)
			}
			p.ok(nbd.CmdRead, 0, 0, 64<<10, nil)
		} else {
			p.write(p.header(nbd.CmdRead, 0, 1, 8<<20, large))
			if b, _ := io.ReadAll(p.conn); len(b) == 0 || len(b) >= large {
				t.Errorf("%d bytes of a read that fails half way", len(b))
			}
		}
		s.cutAll()
	})
}

// TestScarceWrite: a payload that is already here when memory is scarce is
// written, durably if so asked for, as one that is still to come.
func TestScarceWrite(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		if network == "pipe" {
			return // nothing arrives in it before it is read
		}
		const large = 70 << 10
		dev := &hooked{Device: memDisk(t, 1<<20)}
		entered, goOn := make(chan struct{}, 1), make(chan struct{})
		dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
			if off == 0 {
				entered <- struct{}{}
				<-goOn
			} else if durable := off < 2*large; durable != (flags == image.FUA) {
				t.Errorf("a write at %d with flags %v", off, flags)
			}
			return dev.Device.WriteAt(p, off, flags)
		}
		s := serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) {
			s.Limits.Memory = large / 2
		})
		p := s.connect(network, "", style)
		// While the line is in the first, which is a slow one, the others arrive.
		p.write(append(p.header(nbd.CmdWrite, 0, 1, 0, 512), pattern(0, 512)...))
		<-entered
		out := append(p.header(nbd.CmdWrite, nbd.CmdFlagFUA, 2, large, large), pattern(large, large)...)
		out = append(append(out, p.header(nbd.CmdWrite, 0, 3, 2*large, large)...), pattern(2*large, large)...)
		p.write(out)
		close(goOn)
		for cookie := range uint64(3) {
			if c := p.chunk(0); c.cookie != cookie+1 || c.errno != 0 {
				t.Fatalf("%+v", c)
			}
		}
		for _, off := range []uint64{large, 2 * large} {
			same(t, "what was written", p.ok(nbd.CmdRead, 0, off, large, nil), pattern(off, large))
		}
		if s.count(limitMemory) == 0 {
			t.Error("memory was not scarce: nothing was tested")
		}
	})
}

// TestMemoryRefused: what asks for memory that the system does not give is
// served without.
func TestMemoryRefused(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		const size, large = 8 << 20, 1 << 20
		var waits atomic.Bool
		dev := &hooked{Device: memDisk(t, size)}
		dev.tryReadAt = func(p []byte, off int64) error {
			if waits.Load() {
				return image.ErrWouldBlock
			}
			return dev.Device.TryReadAt(p, off)
		}
		s := serve(t, map[string]*Export{"": {Device: dev}}, func(s *Server) {
			s.bufs.alloc = func(int) ([]byte, error) { return nil, syscall.ENOMEM }
		})
		p := s.connect(network, "", style)
		for _, n := range []int{512, 128 << 10, large, large} { // the last is expected
			for _, flags := range []nbd.CommandFlags{nbd.CmdFlagFUA, 0} {
				off := uint64(n + int(flags))
				p.ok(nbd.CmdWrite, flags, off, uint64(n), pattern(off, n))
				for _, w := range []bool{false, true} {
					waits.Store(w)
					same(t, "read", p.ok(nbd.CmdRead, 0, off, uint64(n), nil), pattern(off, n))
				}
			}
		}
		p.ok(nbd.CmdCache, 0, 0, size, nil)
		p.ok(nbd.CmdTrim, 0, 0, size, nil)
		p.ok(nbd.CmdFlush, 0, 0, 0, nil)
		if s.count(limitMemory) == 0 {
			t.Error("memory was not scarce: nothing was tested")
		}
	})
}

// drain reads to the end of a connection.
func drain(p *peer) error {
	p.conn.SetDeadline(time.Now().Add(patience))
	for b := make([]byte, 1<<20); ; {
		if _, err := p.conn.Read(b); err != nil {
			if strings.Contains(err.Error(), "timeout") {
				return err
			}
			return nil
		}
	}
}

// TestOptionFlood: a handshake has a bounded number of options of bounded
// length, and holds memory for long ones only if there is any.
func TestOptionFlood(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, func(s *Server) { s.Limits.Memory = 3 * maxOption / 2 })
	option := func(id nbd.Option, size, sent int) []byte {
		b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
		b = binary.BigEndian.AppendUint32(b, uint32(id))
		b = binary.BigEndian.AppendUint32(b, uint32(size))
		return append(b, make([]byte, sent)...)
	}
	for _, id := range []nbd.Option{nbd.OptList, nbd.OptStructuredReply, 0x12345} {
		before := s.count(limitOption)
		p := s.dial("unix")
		p.greet()
		go func() {
			for range maxOptions + 1 {
				if _, err := p.conn.Write(option(id, 0, 0)); err != nil {
					return
				}
			}
		}()
		if err := drain(p); err != nil || s.count(limitOption) != before+1 {
			t.Errorf("option %v: %v, %d", id, err, s.count(limitOption))
		}
	}

	// One has the memory, so that there is not enough for another, until the
	// first has gone.
	first, second := s.dial("unix"), s.dial("unix")
	first.greet()
	first.write(option(99, maxOption, 1))
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s.memory.mu.Lock()
		used := s.memory.used
		s.memory.mu.Unlock()
		if used == maxOption {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are counted", used)
		}
	}
	second.greet()
	second.write(option(99, maxOption, 0))
	if !second.gone() {
		t.Error("there is memory for two")
	}
	first.write(make([]byte, maxOption-1))
	first.read(20) // unsupported
	third := s.dial("unix")
	third.greet()
	third.write(option(99, maxOption, maxOption))
	third.read(20)
	if n := s.count(limitOption); n != 4 {
		t.Errorf("%d limits", n)
	}
	if r := s.Reached(); len(r) != 1 || r[0].N != 4 {
		t.Errorf("%+v", r)
	}
}
