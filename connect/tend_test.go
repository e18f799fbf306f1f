package connect

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A remote is a server that comes and goes. It is told when it is dialled.
type remote struct {
	mu     sync.Mutex
	peer   *peer // nil: away
	dialed chan bool
}

func (r *remote) set(p *peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer = p
}

func (r *remote) dial(context.Context) (net.Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case r.dialed <- r.peer != nil:
	default:
	}
	if r.peer == nil {
		return nil, errors.New("nobody answers")
	}
	return r.peer.dial(), nil
}

// tended attaches r and tends it. The result of that comes from the channel.
func tended(t *testing.T, h *host, r *remote, opt Options) (*Attachment, chan error) {
	t.Helper()
	opt.Device, opt.Dial, opt.Server, opt.MaxPart = "/dev/nbd0", r.dial, "nbd://server/disk", -1
	a := attach(t, h, opt)
	result := make(chan error, 1)
	go func() { result <- a.Tend(limited(t)) }()
	return a, result
}

func state(h *host) State { return h.devices()[0].State }

func awaitState(t *testing.T, h *host, want State) {
	t.Helper()
	for ctx := limited(t); state(h) != want; {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			t.Fatalf("%s, never %s", state(h), want)
		}
	}
}

// A connection that has ended is replaced when the same server is there again.
func TestTend(t *testing.T) {
	h, k := newFake(t)
	p := disk
	p.flags |= nbd.FlagCanMultiConn
	r := &remote{peer: &p}
	a, result := tended(t, h, r, Options{Connections: 3, DeadTimeout: time.Minute})
	if d := h.devices()[0]; d.Server != "nbd://server/disk" || d.Image != "" || d.Connections != 3 || d.State != Live {
		t.Errorf("%+v", d)
	}
	other := p
	other.size *= 2
	for i, there := range []*peer{nil, &other} {
		r.set(there)
		r.dialed = make(chan bool, 1)
		k.lines <- i
		awaitState(t, h, Away)
		for _, want := range []bool{there != nil, there != nil} { // it goes on trying
			if got := <-r.dialed; got != want {
				t.Errorf("dialled: %v, want %v", got, want)
			}
		}
		k.mu.Lock()
		if k.reconf != nil {
			t.Errorf("it is given %+v", k.reconf)
		}
		k.mu.Unlock()
		r.set(&p)
		awaitState(t, h, Live)
		k.mu.Lock()
		if len(k.reconf.conns) != 1 || k.reconf.backend != a.backend || k.reconf.deadTimeout != time.Minute {
			t.Errorf("%+v", k.reconf)
		}
		k.reconf = nil
		k.mu.Unlock()
	}
	if err := a.Detach(limited(t), false); err != nil {
		t.Error(err)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	want := []string{"connect 0", "scan 0", "reconfigure 0", "reconfigure 0", "claim /dev/nbd0", "sync /dev/nbd0", "disconnect 0", "release /dev/nbd0"}
	if diff := cmp.Diff(want, k.logged()); diff != "" {
		t.Error(diff)
	}
}

// A socket that the kernel had no place for yet, not having seen the end of the
// one before, is offered again: nobody sees that it was ignored.
func TestTendIgnored(t *testing.T) {
	h, k := newFake(t)
	opt := to("/dev/nbd0", disk)
	opt.Server, opt.DeadTimeout = "nbd://server/disk", time.Minute
	opt.Dial = func(context.Context) (net.Conn, error) {
		ours, conn, err := SocketPair()
		if err != nil {
			return nil, err
		}
		go relay(ours, disk.dial())
		return conn.(*kernelEnd).UnixConn, nil // as of a server's socket
	}
	a := attach(t, h, opt)
	result := make(chan error, 1)
	go func() { result <- a.Tend(limited(t)) }()
	k.mu.Lock()
	k.deaf = 2
	k.mu.Unlock()
	k.lines <- 0
	for ctx := limited(t); ; {
		k.mu.Lock()
		taken := k.reconf != nil
		k.mu.Unlock()
		if taken {
			break
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			t.Fatalf("the device has no connection: %q", k.logged())
		}
	}
	if err := errors.Join(a.Detach(limited(t), false), <-result, a.Close()); err != nil {
		t.Error(err)
	}
}

// A connection that ends while it is offered again is replaced at once.
func TestTendEndsAgain(t *testing.T) {
	h, k := newFake(t)
	opt := to("/dev/nbd0", disk)
	opt.Server, opt.DeadTimeout = "nbd://server/disk", time.Minute
	offered := make(chan int, 100) // how many times any was, at each dial
	opt.Dial = func(context.Context) (net.Conn, error) {
		ours, conn, err := SocketPair()
		if err != nil {
			return nil, err
		}
		go relay(ours, disk.dial())
		offered <- reconfigurations(k)
		if len(offered) == 2 {
			k.lines <- 0 // is the end of the new one by the time that it is watched
		}
		return conn.(*kernelEnd).UnixConn, nil // as of a server's socket
	}
	a := attach(t, h, opt)
	result := make(chan error, 1)
	go func() { result <- a.Tend(limited(t)) }()
	k.lines <- 0
	for ctx := limited(t); len(offered) < 3; {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			t.Fatalf("it is not replaced: %q", k.logged())
		}
	}
	for i, want := range []int{0, 0, 1} {
		if got := <-offered; got != want {
			t.Errorf("dial %d: connections were offered %d times, not %d", i, got, want)
		}
	}
	if err := errors.Join(a.Detach(limited(t), false), <-result, a.Close()); err != nil {
		t.Error(err)
	}
}

// While its server is away, a device that somebody detaches is not connected
// again, and by force nobody waits for what cannot be flushed.
func TestDetachWhileAway(t *testing.T) {
	h, k := newFake(t)
	r := &remote{peer: &disk}
	a, result := tended(t, h, r, Options{DeadTimeout: time.Minute})
	r.set(nil)
	k.lines <- 0
	awaitState(t, h, Away)
	if err := h.detach(limited(t), 0, h.backend(0), true); err != nil {
		t.Error(err)
	}
	r.set(&disk)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	for _, line := range k.logged() {
		if strings.HasPrefix(line, "sync") || strings.HasPrefix(line, "reconfigure") {
			t.Error(line)
		}
	}
}

// Without a time to wait, the end of the server is that of the attachment. The
// device stays, known to be dead.
func TestTendOnce(t *testing.T) {
	h, k := newFake(t)
	a, result := tended(t, h, &remote{peer: &disk}, Options{})
	k.lines <- 0
	if err := <-result; !errors.Is(err, ErrServerEnded) {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if got := state(h); got != Dead {
		t.Error(got)
	}
	if err := h.detachAndWait(limited(t), 0, false); err != nil {
		t.Error(err)
	}
}

// Where the kernel reaches the server by itself, the end of the process that
// tends a device is not that of the device: it is flushed when it is detached.
func TestUnattended(t *testing.T) {
	h, k := newFake(t)
	a, _ := tended(t, h, &remote{peer: &disk}, Options{DeadTimeout: time.Minute})
	a.record.Direct = true // as with a socket of TCP
	if err := errors.Join(a.record.write(), a.record.f.Close()); err != nil {
		t.Fatal(err)
	}
	if got := state(h); got != Unattended {
		t.Error(got)
	}
	if err := h.detachAndWait(limited(t), 0, false); err != nil {
		t.Error(err)
	}
	if log := strings.Join(k.logged(), ", "); !strings.Contains(log, "sync /dev/nbd0") {
		t.Error(log)
	}
}

func reconfigurations(k *fakeKernel) int {
	return strings.Count(strings.Join(k.logged(), ","), "reconfigure")
}

// Where data passes through the process, its death leaves a device that waits,
// for a process that goes to the same export.
func TestAdopt(t *testing.T) {
	h, k := newFake(t)
	r := &remote{peer: &disk}
	opt := Options{Device: "/dev/nbd0", Server: "nbd://server/disk", Dial: r.dial, MaxPart: -1, DeadTimeout: time.Minute, Connections: 1}
	a := attach(t, h, opt)
	if err := a.record.f.Close(); err != nil {
		t.Fatal(err)
	}
	if got := state(h); got != Dead {
		t.Error(got)
	}
	for _, server := range []string{"", "nbd://other/disk"} {
		if p, err := h.findPredecessor(limited(t), "/dev/nbd0", server, false); p != nil || err != nil {
			t.Errorf("%q: %v, %v", server, p, err)
		}
	}
	p, err := h.findPredecessor(limited(t), "/dev/nbd0", a.opt.Server, false)
	if p == nil || err != nil {
		t.Fatal(p, err)
	}
	for want, change := range map[string]func(*Options){
		"with connections 1": func(o *Options) { o.Connections = 2 },
		"with size 1048576; nbd://server/disk has 2097152": func(o *Options) {
			o.Dial = func(context.Context) (net.Conn, error) { return peer{size: 2 << 20, flags: writable}.dial(), nil }
		},
		"no route": func(o *Options) {
			o.Dial = func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }
		},
	} {
		other := opt
		change(&other)
		if _, err := p.Adopt(limited(t), other); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
	k.deaf = 1 // the kernel has not seen the end of the old connection
	next, err := p.Adopt(limited(t), opt)
	if err != nil {
		t.Fatal(err)
	}
	if n := reconfigurations(k); n != 2 || k.watched != 1 {
		t.Errorf("%d connections were offered, and %d are watched", n, k.watched)
	}
	if got := state(h); got != Live {
		t.Error(got)
	}
	result := make(chan error, 1)
	go func() { result <- next.Tend(limited(t)) }()
	k.lines <- 0
	for ctx := limited(t); ; {
		if reconfigurations(k) == 3 {
			break
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			t.Fatal("it is not tended")
		}
	}
	if err := errors.Join(next.Detach(limited(t), false), <-result, next.Close()); err != nil {
		t.Error(err)
	}
	// Which the kernel reaches by itself is nobody's to adopt.
	direct := attach(t, h, opt)
	direct.record.Direct = true
	if err := errors.Join(direct.record.write(), direct.record.f.Close()); err != nil {
		t.Fatal(err)
	}
	if p, err := h.findPredecessor(limited(t), "/dev/nbd0", direct.opt.Server, false); p != nil || err != nil {
		t.Errorf("%v, %v", p, err)
	}
}

// The options of a device change what the kernel is told of an export.
func TestConfig(t *testing.T) {
	s := &nbd.Session{ExportInfo: nbd.ExportInfo{Name: "disk", Size: 1<<20 + 512, Flags: writable, BlockSize: nbd.BlockSize{Min: 1, Preferred: 4096, Max: 1 << 25}}}
	for _, test := range []struct {
		opt  Options
		want config
	}{
		{Options{}, config{size: 1<<20 + 512, blockSize: 512, flags: uint64(writable)}},
		{Options{BlockSize: 4096, ReadOnly: true}, config{size: 1 << 20, blockSize: 4096, flags: uint64(writable | nbd.FlagReadOnly)}},
		{Options{Size: 8192, Timeout: time.Minute}, config{size: 8192, blockSize: 512, flags: uint64(writable), timeout: time.Minute}},
	} {
		got, err := test.opt.config(s)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&test.want, got, cmp.AllowUnexported(config{})); diff != "" {
			t.Error(diff)
		}
	}
	for want, opt := range map[string]Options{
		"a power of 2 from 512 to 4096": {BlockSize: 8192},
		"blocks of 768 bytes":           {BlockSize: 768},
		"less than 2097152":             {Size: 2 << 20},
		"less than a block":             {Size: 100},
	} {
		if _, err := opt.config(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

// A server that reads nothing does not keep a relay when the kernel has dropped
// its end; until then it may take its time.
func TestRelayHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r relays
		server, conn := net.Pipe()
		defer server.Close()
		kernels, err := r.socket(conn)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kernels.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		b := make([]byte, 2)
		if _, err := io.ReadFull(server, b); err != nil || string(b) != "he" {
			t.Errorf("%q, %v", b, err)
		}
		kernels.Close()
		r.wait()
	})
}

// What a relay is given at one end comes out at the other, and the end of one
// side is that of both.
func TestRelay(t *testing.T) {
	var r relays
	server, conn := net.Pipe()
	ours, err := r.socket(conn)
	if err != nil {
		t.Fatal(err)
	}
	if !r.used {
		t.Error("a pipe is no socket")
	}
	for _, way := range [][2]net.Conn{{ours, server}, {server, ours}} {
		go way[0].Write([]byte("hello"))
		b := make([]byte, 5)
		if _, err := io.ReadFull(way[1], b); err != nil || string(b) != "hello" {
			t.Errorf("%q, %v", b, err)
		}
	}
	server.Close()
	if _, err := ours.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
	r.wait()
	a, b, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	direct := relays{}
	if got, err := direct.socket(a); err != nil || got != a || direct.used {
		t.Errorf("%v, %v", got, err)
	}
	a.Close()
}
