package export

import (
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// fetching is a Device of which reads are under way until they are let in.
type fetching struct {
	hooked
	arrived atomic.Bool
	tries   atomic.Int64
	reads   atomic.Int64 // that waited
}

func newFetching(t *testing.T) *fetching {
	d := &fetching{hooked: hooked{Device: memDisk(t, 1<<20)}}
	if err := d.Device.WriteAt(pattern(0, 1<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	d.tryReadAt = func(p []byte, off int64) error {
		d.tries.Add(1)
		if !d.arrived.Load() && off >= 4096 {
			return image.ErrUnderWay
		}
		return d.Device.TryReadAt(p, off)
	}
	d.readAt = func(p []byte, off int64) (int, error) {
		d.reads.Add(1)
		return d.Device.ReadAt(p, off)
	}
	// A line that is alone on its processor does not look.
	old := runtime.GOMAXPROCS(0)
	if old == 1 {
		runtime.GOMAXPROCS(2)
		t.Cleanup(func() { runtime.GOMAXPROCS(old) })
	}
	return d
}

// read4k takes the replies to reads of 4 KiB whose cookies are where, in any order.
func (p *peer) read4k(offsets ...uint64) {
	p.t.Helper()
	left := map[uint64]bool{}
	for _, off := range offsets {
		left[off] = true
	}
	for range offsets {
		c := p.chunk(4096)
		if !left[c.cookie] || c.errno != 0 {
			p.t.Fatalf("the reply to %d came, error %d, want those to %v", c.cookie, c.errno, offsets)
		}
		delete(left, c.cookie)
		same(p.t, "a read", c.data, pattern(c.cookie, 4096))
	}
}

func (p *peer) ask4k(offsets ...uint64) {
	p.t.Helper()
	var all []byte
	for _, off := range offsets {
		all = append(all, p.header(nbd.CmdRead, 0, off, off, 4096)...)
	}
	p.write(all)
}

// TestFetch: the line itself answers reads whose data arrives soon.
func TestFetch(t *testing.T) {
	d := newFetching(t)
	s := serve(t, map[string]*Export{"": {Device: d}}, nil)
	for try := 0; ; try++ {
		// A machine that is busy may have made the line wait for too long.
		if try == 100 {
			t.Fatal("each time somebody else has waited for a read")
		}
		p := s.connect("unix", "", simple)
		reads, tries := d.reads.Load(), d.tries.Load()
		d.arrived.Store(false)
		p.ask4k(4096, 8192, 12288)
		for d.tries.Load() < tries+4 && d.reads.Load() == reads { // three, and again the first
			runtime.Gosched()
		}
		d.arrived.Store(true)
		p.read4k(4096, 8192, 12288)
		p.conn.Close()
		if d.reads.Load() == reads {
			return
		}
	}
}

// TestFetchServes: while the line looks for what is under way it serves what comes,
// and what does not arrive is waited for by others, which it then does not hold up.
func TestFetchServes(t *testing.T) {
	d := newFetching(t)
	goOn := make(chan struct{})
	wait := d.readAt
	d.readAt = func(p []byte, off int64) (int, error) {
		<-goOn
		return wait(p, off)
	}
	s := serve(t, map[string]*Export{"": {Device: d}}, nil)
	p := s.connect("unix", "", simple)
	for range 20 {
		p.ask4k(4096, 8192)
		p.ask4k(0)
		p.read4k(0)
		goOn <- struct{}{}
		goOn <- struct{}{}
		p.read4k(4096, 8192)
	}
}

// TestFetchInMidst: reads under way are answered though the client is in the midst of
// a request, or leaves, or the connection is handed over.
func TestFetchInMidst(t *testing.T) {
	for name, n := range map[string]int{"small write": 512, "large write": largeWrite + 512} {
		t.Run(name, func(t *testing.T) {
			d := newFetching(t)
			s := serve(t, map[string]*Export{"": {Device: d}}, nil)
			p := s.connect("unix", "", simple)
			write := append(p.header(nbd.CmdWrite, 0, 1, 0, uint64(n)), make([]byte, n)...)
			p.write(append(p.header(nbd.CmdRead, 0, 4096, 4096, 4096), write[:100]...))
			p.read4k(4096)
			p.write(write[100:])
			if c := p.chunk(0); c.cookie != 1 || c.errno != 0 {
				t.Fatalf("the reply to %d came, error %d", c.cookie, c.errno)
			}
		})
	}
	// The line has to wait for a place, or for memory, that the read has.
	for name, limits := range map[string]Limits{
		"requests": {Requests: 1}, "bytes of the connection": {ConnBytes: 256 << 10}, "memory": {Memory: 1030 << 10},
	} {
		t.Run("large write, few "+name, func(t *testing.T) {
			const n = 900 << 10
			d := newFetching(t)
			s := serve(t, map[string]*Export{"": {Device: d}}, func(s *Server) { s.Limits = limits })
			p := s.connect("unix", "", simple)
			p.write(append(p.header(nbd.CmdRead, 0, 4096, 4096, 4096), append(p.header(nbd.CmdWrite, 0, 1, 0, n), make([]byte, n/2)...)...))
			p.read4k(4096)
			p.write(make([]byte, n/2))
			if c := p.chunk(0); c.cookie != 1 || c.errno != 0 {
				t.Fatalf("the reply to %d came, error %d", c.cookie, c.errno)
			}
		})
	}
	t.Run("stalled flushes", func(t *testing.T) {
		d := newFetching(t)
		goOn := make(chan struct{})
		d.flush = func() error {
			<-goOn
			return nil
		}
		defer close(goOn)
		s := serve(t, map[string]*Export{"": {Device: d}}, func(s *Server) { s.Limits = Limits{Requests: 4} })
		p := s.connect("unix", "", simple)
		all := p.header(nbd.CmdRead, 0, 4096, 4096, 4096)
		for range 5 {
			all = append(all, p.header(nbd.CmdFlush, 0, 1, 0, 0)...)
		}
		p.write(all)
		p.read4k(4096)
		s.mu.Lock()
		for ses := range s.sessions {
			if n := ses.out.inProgress.Load(); n > 4 {
				t.Errorf("%d requests are in progress, of 4", n)
			}
		}
		s.mu.Unlock()
	})
	t.Run("refused", func(t *testing.T) {
		d := newFetching(t)
		s := serve(t, map[string]*Export{"": {Device: d}}, nil)
		p := s.connect("unix", "", simple)
		p.write(append(p.header(nbd.CmdRead, 0, 4096, 4096, 4096), p.header(nbd.CmdWrite, 0, 1, 2<<20, 600000)...))
		for range 2 {
			if c := p.chunk(4096); c.cookie == 1 && c.errno != nbd.ENOSPC || c.cookie != 1 && c.errno != 0 {
				t.Fatalf("the reply to %d came, error %d", c.cookie, c.errno)
			}
		}
		p.write(make([]byte, 600000))
		p.ok(nbd.CmdFlush, 0, 0, 0, nil)
	})
	t.Run("disconnect", func(t *testing.T) {
		d := newFetching(t)
		s := serve(t, map[string]*Export{"": {Device: d}}, nil)
		p := s.connect("unix", "", simple)
		p.write(append(p.header(nbd.CmdRead, 0, 4096, 4096, 4096), p.header(nbd.CmdDisc, 0, 0, 0, 0)...))
		p.read4k(4096)
		if !p.gone() {
			t.Error("the connection is open")
		}
	})
	t.Run("hand-over", func(t *testing.T) {
		d := newFetching(t)
		e := &Export{Name: "e", Device: d}
		first := serve(t, map[string]*Export{"e": e}, nil)
		p := first.connect("unix", "e", simple)
		s := first.Server
		for range 10 {
			tries := d.tries.Load()
			p.ask4k(4096, 8192)
			for d.tries.Load() == tries {
				runtime.Gosched()
			}
			s = handOver(t, s, e)
			p.read4k(4096, 8192)
		}
	})
}

// TestFetchNotAlone: while there is another connection, the line looks for nothing.
func TestFetchNotAlone(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		d := newFetching(t)
		s := serve(t, map[string]*Export{"": {Device: d}}, nil)
		p := s.connect("unix", "", simple)
		s.connect("unix", "", simple)
		for s.transmitting.Load() != 2 {
			runtime.Gosched()
		}
		const n = 10
		for range n {
			p.ask4k(4096)
			p.read4k(4096)
		}
		if tries := d.tries.Load(); tries != n {
			t.Errorf("%d reads were tried %d times", n, tries)
		}
	})
	t.Run("from then on", func(t *testing.T) {
		d := newFetching(t)
		s := serve(t, map[string]*Export{"": {Device: d}}, nil)
		defer s.transmitting.Add(-1)
		var first, second atomic.Int64
		d.tryReadAt = func(p []byte, off int64) error {
			switch {
			case off == 8192:
				second.Add(1)
			case first.Add(1) == 2: // the line has looked once, and in this turn will look at the other
				s.transmitting.Add(1)
				return d.Device.TryReadAt(p, off)
			}
			return image.ErrUnderWay
		}
		p := s.connect("unix", "", simple)
		p.ask4k(4096, 8192)
		p.read4k(4096, 8192)
		if n := second.Load(); n > 2 || d.reads.Load() != 1 {
			t.Errorf("the other read was tried %d times, and %d were waited for", n, d.reads.Load())
		}
	})
}

// TestFetchPays: looking is given up where it takes too long for what it brings.
func TestFetchPays(t *testing.T) {
	var f fetcher
	judge := func(kept, answered int, spent time.Duration) (pays bool, skips int) {
		f.kept, f.answered, f.spent = kept, answered, spent
		pays = f.pays()
		return pays, f.restraint.skips
	}
	for _, tt := range []struct {
		kept, answered int
		spent          time.Duration
		pays           bool
		skips          int
	}{
		{8, 63, time.Second, true, 0}, // too early
		{8, 64, 64 * fetchCost, true, 0},
		{8, 64, 64*fetchCost + 1, false, 1},
		{0, 1, fetchCost + 1, false, 2},
		{0, 1, fetchCost, true, 0},
		{0, 0, 0, true, 0}, // nothing to judge
	} {
		if pays, skips := judge(tt.kept, tt.answered, tt.spent); pays != tt.pays || skips != tt.skips {
			t.Errorf("%+v: %v, %d", tt, pays, skips)
		}
	}
}

// An inbox is a stream that knows what has arrived.
type inbox struct {
	stream
	mu  sync.Mutex
	new sync.Cond
	in  []byte
	err error
}

func newInbox(conn net.Conn) *inbox {
	b := &inbox{stream: stream{conn}}
	b.new.L = &b.mu
	go func() {
		for p := make([]byte, 4096); ; {
			n, err := conn.Read(p)
			b.mu.Lock()
			b.in, b.err = append(b.in, p[:n]...), err
			b.mu.Unlock()
			b.new.Signal()
			if err != nil {
				return
			}
		}
	}()
	return b
}

func (b *inbox) read(p, _ []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.in) == 0 && b.err == nil {
		b.new.Wait()
	}
	n := copy(p, b.in)
	if b.in = b.in[n:]; n == 0 {
		return 0, b.err
	}
	return n, nil
}

func (b *inbox) arrived() (bool, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.in) > 0 || b.err != nil, true
}

// TestFetchStops: while the medium gives one read at a time and not soon, the line does
// not look for long, though there is always one that it could wait for.
func TestFetchStops(t *testing.T) { synctest.Test(t, testFetchStops) }

// On a machine's own clock a line that is kept from looking for as long as a read takes
// finds one each time.
func testFetchStops(t *testing.T) {
	d := newFetching(t)
	var mu sync.Mutex
	var next time.Time
	come := func() bool {
		mu.Lock()
		defer mu.Unlock()
		if time.Now().Before(next) {
			return false
		}
		next = time.Now().Add(300 * time.Microsecond)
		return true
	}
	d.tryReadAt = func(p []byte, off int64) error {
		d.tries.Add(1)
		time.Sleep(5 * time.Microsecond)
		if !come() {
			return image.ErrUnderWay
		}
		return d.Device.TryReadAt(p, off)
	}
	d.readAt = func(p []byte, off int64) (int, error) {
		for !come() {
			time.Sleep(50 * time.Microsecond)
		}
		return d.Device.ReadAt(p, off)
	}
	s := &server{t: t, Server: &Server{Open: func(context.Context, *Client, string) (*Export, error) {
		return &Export{Device: d}, nil
	}}}
	s.init()
	here, there := net.Pipe()
	ses, err := s.admit(there, false)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		err := ses.begin()
		if ses.agreement != nil {
			err = ses.transmit(newInbox(there))
			s.putDevice(ses.dev)
			s.exit(ses.export)
		}
		ses.ended(err)
	}()
	p := &peer{t: t, conn: here}
	p.greet()
	p.option(nbd.OptGo, make([]byte, 6))

	p.ask4k(0, 0, 0, 0, 0, 0, 0, 0)
	const reads = 3000
	half := int64(0)
	for i := range reads {
		if i == reads/2 {
			half = d.tries.Load()
		}
		p.read4k(0)
		p.ask4k(0)
	}
	for range 8 {
		p.read4k(0)
	}
	if late := d.tries.Load() - half; late > half/2 {
		t.Errorf("the line has looked %d times, then %d times", half, late)
	}
	s.shutdown()
}
