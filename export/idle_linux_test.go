package export

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"
	"weak"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// residentPages returns how many pages of mem are there.
func residentPages(t *testing.T, mem []byte) int {
	t.Helper()
	there := make([]byte, (len(mem)+int(pageSize)-1)/int(pageSize))
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), uintptr(unsafe.Pointer(unsafe.SliceData(there))))
	if errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, b := range there {
		n += int(b & 1)
	}
	return n
}

// waiting returns a session of s, once it waits for input and has no replies to send.
func (s *server) waiting() *session {
	s.t.Helper()
	for began := time.Now(); ; runtime.Gosched() {
		if time.Since(began) > patience {
			s.t.Fatal("no line lets go of its memory")
		}
		s.mu.Lock()
		for ses := range s.sessions {
			if m := &ses.line.memory; m.used.Load() && m.mu.TryLock() {
				m.mu.Unlock()
				s.mu.Unlock()
				return ses
			}
		}
		s.mu.Unlock()
	}
}

// packed returns what tells whether the packer's memory is still there.
func (s *session) packed() weak.Pointer[byte] {
	for ; ; runtime.Gosched() {
		s.out.mu.Lock()
		if !s.out.busy {
			defer s.out.mu.Unlock()
			return weak.Make(unsafe.SliceData(s.out.out.small))
		}
		s.out.mu.Unlock()
	}
}

// TestIdleMemory: a connection that has waited for a while holds no pages for what it
// has moved, and goes on as if it had them.
func TestIdleMemory(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 4<<20)}}, nil)
	s.idler.mu.Lock()
	s.idler.due = true // nobody else looks
	s.idler.mu.Unlock()
	for _, network := range []string{"unix", "tcp"} {
		p := s.connect(network, "", simple)
		for range 2 {
			for _, n := range []int{4096, 128 << 10, 1 << 20} {
				p.ok(nbd.CmdWrite, 0, 0, uint64(n), pattern(0, n))
				same(t, "a read", p.ok(nbd.CmdRead, 0, 0, uint64(n), nil), pattern(0, n))
				p.ok(nbd.CmdTrim, 0, 2<<20, 4096, nil) // by a worker
				ses := s.waiting()
				if residentPages(t, ses.line.memory.mem) == 0 {
					t.Fatal("nothing was moved")
				}
				if !ses.trim() || residentPages(t, ses.line.memory.mem) == 0 {
					t.Fatal("what was just used is not there")
				}
				packed := ses.packed()
				for ses.trim() { // the one who has sent the last reply may not have ended
					runtime.Gosched()
				}
				ses.line.memory.mu.Lock()
				ses.out.mu.Lock()
				if n := residentPages(t, ses.line.memory.mem); n > 0 || ses.out.out.small != nil {
					t.Errorf("%d pages are there, and of the packer %d bytes", n, cap(ses.out.out.small))
				}
				ses.out.mu.Unlock()
				ses.line.memory.mu.Unlock()
				for collected := 0; packed.Value() != nil; collected++ {
					if collected == 10 {
						t.Fatal("the memory of the packer is there")
					}
					runtime.GC()
				}
			}
		}
		// A request of which a part has arrived.
		all := append(p.header(nbd.CmdWrite, 0, 7, 512, 4096), pattern(512, 4096)...)
		p.write(all[:1000])
		ses := s.waiting()
		for arrived := 0; arrived != 1000; {
			ses.line.memory.mu.Lock()
			arrived = ses.line.w - ses.line.r
			ses.line.memory.mu.Unlock()
		}
		ses.trim()
		ses.trim()
		p.write(all[1000:])
		if c := p.chunk(0); c.cookie != 7 || c.errno != 0 {
			t.Fatalf("the reply to %d came, error %d", c.cookie, c.errno)
		}
		same(t, "what was written", p.ok(nbd.CmdRead, 0, 512, 4096, nil), pattern(512, 4096))
		// After a large write another is waited for in another way.
		p.ok(nbd.CmdWrite, 0, 0, 1<<20, pattern(0, 1<<20))
		for ses = s.waiting(); ses.trim(); {
			runtime.Gosched()
		}
		p.ok(nbd.CmdWrite, 0, 1<<20, 1<<20, pattern(1<<20, 1<<20))
		same(t, "two writes", p.ok(nbd.CmdRead, 0, 0, 2<<20, nil), pattern(0, 2<<20))
		p.conn.Close()
		for left := 1; left > 0; runtime.Gosched() { // so that waiting finds the next one
			s.mu.Lock()
			left = len(s.sessions)
			s.mu.Unlock()
		}
	}
}

// TestIdleTimer: whoever has moved something is looked at, until there is nothing more
// to give back.
func TestIdleTimer(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	due := func() bool {
		s.idler.mu.Lock()
		defer s.idler.mu.Unlock()
		if s.idler.timer != nil {
			s.idler.timer.Stop() // the test is faster
		}
		return s.idler.due
	}
	p := s.connect("unix", "", simple)
	for range 2 {
		p.ok(nbd.CmdRead, 0, 0, 4096, nil)
		used := &s.waiting().line.memory.used
		for used.Load() {
			for began := time.Now(); !due() && used.Load(); runtime.Gosched() {
				if time.Since(began) > patience {
					t.Fatal("nobody will look")
				}
			}
			s.trimIdle() // as the timer does
		}
		for began := time.Now(); due(); s.trimIdle() {
			if time.Since(began) > patience {
				t.Fatal("there is nothing to look at, and yet somebody will")
			}
		}
	}
}

// TestIdleRace: memory that is in use is never given back.
func TestIdleRace(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 4<<20)}}, nil)
	peers := []*peer{s.connect("unix", "", simple), s.connect("tcp", "", simple)}
	stop := make(chan struct{})
	var trimming sync.WaitGroup
	defer trimming.Wait()
	defer close(stop)
	trimming.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				s.trimIdle()
				time.Sleep(time.Microsecond) // who spins keeps a processor, which may be the only one, from the sockets
			}
		}
	})
	for _, p := range peers {
		rnd := rand.New(rand.NewPCG(1, 2))
		for i := range uint64(150) {
			n := []int{512, 4096, 60000, 100000, 300000}[rnd.IntN(5)]
			off := uint64(rnd.IntN(4<<20 - n))
			data := pattern(off+i, n)
			all := append(p.header(nbd.CmdWrite, 0, i, off, uint64(n)), data...)
			for len(all) > 0 { // in pieces, so that the line waits in the midst of it
				piece := min(1+rnd.IntN(40000), len(all))
				p.write(all[:piece])
				all = all[piece:]
				runtime.Gosched()
			}
			if c := p.chunk(0); c.cookie != i || c.errno != 0 {
				t.Fatalf("the reply to %d came, error %d", c.cookie, c.errno)
			}
			same(t, "a read", p.ok(nbd.CmdRead, 0, off, uint64(n), nil), data)
		}
	}
}
