package connect

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// lives returns the predecessor that a live server is.
func lives(t *testing.T, h *host) *Predecessor {
	t.Helper()
	p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", true)
	if err != nil || p == nil || !p.Lives() {
		t.Fatalf("%v, %v", p, err)
	}
	return p
}

// pair returns the server's end of a connection with what has arrived on it,
// and the end of the kernel.
func pair(t *testing.T, input string) (Handed, io.ReadWriter) {
	t.Helper()
	ours, theirs, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return Handed{ours, []byte(input)}, theirs
}

type outcome struct {
	taken bool
	err   error
}

// handsOver has a server hand its device over to who asks first.
func handsOver(a *Attachment, conns ...Handed) (<-chan outcome, *int) {
	done, calls := make(chan outcome, 1), new(int)
	go func() {
		taken, err := a.HandOver(<-a.Successors(), conns, nil, func() { *calls++ })
		done <- outcome{taken, err}
	}()
	return done, calls
}

func TestHandOver(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, offer("/dev/nbd1", disk))
	one, end := pair(t, "")
	two, other := pair(t, "half a request")

	// A successor that changes its mind.
	done, calls := handsOver(a, one, two)
	p := lives(t, h)
	if err := p.Receive(limited(t)); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if o := <-done; o.taken || o.err == nil || *calls != 0 {
		t.Fatalf("%+v after %d calls", o, *calls)
	}
	again := identity
	again.Journal = "K"
	if err := a.Keep(limited(t), again); err != nil {
		t.Fatal(err)
	}
	if s := h.server(1); !s.alive() || s.Journal != "K" || s.Property("size") != "1048576" {
		t.Errorf("%+v", s)
	}

	// One that is something else.
	done, _ = handsOver(a, one, two)
	p = lives(t, h)
	if err := p.Receive(limited(t)); err != nil {
		t.Fatal(err)
	}
	for want, opt := range map[string]Options{ // nothing waits for it
		"/dev/nbd1 is /disk with size 1048576; /disk has 512":              offer("", peer{size: 512, flags: writable}),
		"/dev/nbd1 is /disk with connections 1; /disk has 2":               offer("", disk, disk),
		"/dev/nbd1 is /disk with format qcow2; /disk has raw":              different(func(i *Identity) { i.Properties = []Property{{"format", "raw"}} }),
		"/dev/nbd1 is /disk (file 1:2 4), which /disk (file 9:9 9) is not": different(func(i *Identity) { i.Stores = []string{i.Stores[0], "file 9:9 9"} }),
	} {
		if _, err := p.TakeOver(limited(t), opt); err == nil || err.Error() != want {
			t.Errorf("%q: %v", want, err)
		}
	}
	p.Close()
	if o := <-done; o.taken || o.err == nil {
		t.Fatalf("%+v", o)
	}

	// One that is not.
	k.log = nil
	done, calls = handsOver(a, one, two)
	p = lives(t, h)
	if err := p.Receive(limited(t)); err != nil {
		t.Fatal(err)
	}
	next := offer("", disk)
	next.Identity.Journal = "L"
	b, err := p.TakeOver(limited(t), next)
	if err != nil {
		t.Fatal(err)
	}
	if o := <-done; !o.taken || o.err != nil || *calls != 1 {
		t.Fatalf("%+v after %d calls", o, *calls)
	}
	if log := k.logged(); len(log) > 0 {
		t.Errorf("the kernel has noticed: %q", log)
	}
	var inputs []string
	for _, c := range b.Handed() {
		inputs = append(inputs, string(c.Input))
		if _, err := c.Conn.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		defer c.Conn.Close()
	}
	if diff := cmp.Diff([]string{"", "half a request"}, inputs); diff != "" {
		t.Error(diff)
	}
	for _, e := range []io.Reader{end, other} {
		if got, err := io.ReadAll(io.LimitReader(e, 1)); string(got) != "x" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	if s := h.server(1); !s.alive() || s.Journal != "L" || s.PID != os.Getpid() {
		t.Errorf("%+v", s)
	}
	// The lock goes with the device.
	if p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false); p != nil || err != nil {
		t.Errorf("%v, %v", p, err)
	}
	lives(t, h).Close()
	if err := errors.Join(b.Detach(limited(t), false), b.Close()); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(h.run); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// The image is closed while a device is handed over: if both ends die, whoever
// takes it over needs no journal of theirs.
func TestHandOverUnfinished(t *testing.T) {
	for name, i := range map[string]Identity{
		"journal":  {Stores: identity.Stores, Journal: "J"},
		"volatile": {Stores: identity.Stores, Volatile: "there was no journal"},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := newFake(t)
			opt := offer("/dev/nbd1", disk)
			opt.Identity = i
			a := attach(t, h, opt)
			one, _ := pair(t, "")
			done, _ := handsOver(a, one)
			p := lives(t, h)
			if err := p.Receive(limited(t)); err != nil {
				t.Fatal(err)
			}
			p.Close()
			if o := <-done; o.taken || o.err == nil {
				t.Fatalf("%+v", o)
			}
			a.record.f.Close()
			p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
			if err != nil || p == nil {
				t.Fatalf("%v, %v", p, err)
			}
			defer p.Close()
			if got := p.Identity(); got.Journal != "" || got.Volatile != "" || len(got.Stores) != 2 {
				t.Errorf("%+v", got)
			}
		})
	}
}

// Whoever goes on with a device by itself may find another image, too, than the
// one that it had closed.
func TestKeepRefused(t *testing.T) {
	other := identity
	other.Stores = []string{identity.Stores[0], "file 9:9 9"}
	fewer := identity
	fewer.Stores = identity.Stores[:1]
	raw := identity
	raw.Properties = []Property{{"format", "raw"}}
	for want, test := range map[string]struct {
		offered Identity
		peer    peer
	}{
		"/dev/nbd1 waits for /disk (file 1:2 4), which /disk (file 9:9 9) is not": {other, disk},
		"/dev/nbd1 waits for /disk with files 2; /disk has 1":                     {fewer, disk},
		"/dev/nbd1 waits for /disk with format qcow2; /disk has raw":              {raw, disk},
		"/dev/nbd1 waits for /disk with size 1048576; /disk has 1048064":          {identity, peer{size: 1<<20 - 512, flags: writable}},
	} {
		h, _ := newFake(t)
		opt := offer("/dev/nbd1", disk, test.peer)
		opt.Connections = 1
		a := attach(t, h, opt)
		err := a.Keep(limited(t), test.offered)
		if err == nil || err.Error() != want {
			t.Errorf("%q: %v", want, err)
		}
	}
}

// An image may grow while it is served, which a successor refuses. The device has
// the size that it had, and whoever served it goes on.
func TestKeepGrown(t *testing.T) {
	h, _ := newFake(t)
	peers := []peer{disk, {size: 2 << 20, flags: writable}, {size: 3 << 20, flags: writable}}
	opt := offer("/dev/nbd1", peers...)
	opt.Connections = 1
	a := attach(t, h, opt)
	for range peers[1:] {
		if err := a.Keep(limited(t), identity); err != nil {
			t.Fatal(err)
		}
		if s := h.server(1); s.Property("size") != "1048576" {
			t.Errorf("%+v", s)
		}
	}
}

// A successor without a last word from its predecessor touches nothing.
func TestHandOverBroken(t *testing.T) {
	h, _ := newFake(t)
	a := attach(t, h, offer("/dev/nbd1", disk))
	one, _ := pair(t, "")
	sent := make(chan error, 1)
	go func() {
		s := <-a.Successors()
		err := a.send(s.conn, []Handed{one}, nil)
		sent <- errors.Join(err, expect(s.conn, "taken\n"), s.Close())
	}()
	p := lives(t, h)
	if err := p.Receive(limited(t)); err != nil {
		t.Fatal(err)
	}
	if b, err := p.TakeOver(limited(t), offer("", disk)); b != nil || !errors.Is(err, io.EOF) {
		t.Errorf("%v, %v", b, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	p.Close()

	go func() { sent <- (<-a.Successors()).Close() }()
	p = lives(t, h)
	if err := p.Receive(limited(t)); err == nil || !strings.Contains(err.Error(), "has not handed it over: it has hung up") {
		t.Error(err)
	}
	p.Close()
	<-sent

	// A server that nobody can talk to, and one that says nothing.
	p = lives(t, h)
	ctx, cancel := context.WithCancel(limited(t))
	cancel()
	if err := p.Receive(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v: it has received something", err)
	}
	p.Close()
	if err := os.Remove(h.controlPath(1)); err != nil {
		t.Fatal(err)
	}
	if p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", true); p != nil || err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("%v, %v", p, err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// What keeps others from the image goes with the device, until its successor
// has a hold of its own.
func TestHandOverLocks(t *testing.T) {
	h, _ := newFake(t)
	a := attach(t, h, offer("/dev/nbd1", disk))
	one, _ := pair(t, "")
	var ends []*os.File // each reads as ended once nobody has the lock
	var locks []HeldLock
	for _, store := range []string{"a", "b", "c"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		ends, locks = append(ends, r), append(locks, HeldLock{store, w})
	}
	held := func() (list string) {
		for i, r := range ends {
			c, err := r.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Read(func(fd uintptr) bool {
				if _, err := syscall.Read(int(fd), make([]byte, 1)); err == syscall.EAGAIN {
					list += locks[i].Store
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
		}
		return list
	}
	done := make(chan outcome, 1)
	go func() {
		taken, err := a.HandOver(<-a.Successors(), []Handed{one}, locks, func() {})
		done <- outcome{taken, err}
	}()
	p := lives(t, h)
	if err := p.Receive(limited(t)); err != nil {
		t.Fatal(err)
	}
	if got := held(); got != "abc" {
		t.Errorf("received: %s are held", got)
	}
	p.LetGo("b")
	p.LetGo("x")
	if got := held(); got != "ac" {
		t.Errorf("one is let go: %s are held", got)
	}
	b, err := p.TakeOver(limited(t), offer("", disk))
	if err != nil {
		t.Fatal(err)
	}
	if o := <-done; !o.taken || o.err != nil {
		t.Errorf("%+v", o)
	}
	if got := held(); got != "" {
		t.Errorf("taken over: %s are held", got)
	}
	for _, c := range b.Handed() {
		c.Conn.Close()
	}
	if err := errors.Join(b.Detach(limited(t), false), b.Close()); err != nil {
		t.Error(err)
	}
}

// Whatever fails before the last word leaves the device to its server, which goes
// on and can be asked again.
func TestHandOverKept(t *testing.T) {
	readOnly := func(t *testing.T, r *record) (restore func()) {
		f, err := os.Open(r.path)
		if err != nil {
			t.Fatal(err)
		}
		locked := r.f
		r.f = f
		return func() {
			f.Close()
			r.f = locked
		}
	}
	for name, test := range map[string]struct {
		prepare func(*testing.T, *Attachment) (restore func())
		conns   int
		fails   func(*testing.T, *Predecessor) error // what the successor does instead of taking it
		told    int                                  // how often the server believes that it is taken
	}{
		"the record cannot be written": {prepare: func(t *testing.T, a *Attachment) func() { return readOnly(t, a.record) }},
		"too many connections":         {conns: maxHanded + 1},
		"no guardian": {fails: func(t *testing.T, p *Predecessor) error {
			opt := offer("", disk)
			opt.Guard = func(Ward) error { return errors.New("no guardian") }
			_, err := p.TakeOver(limited(t), opt)
			return err
		}},
		"the last word reaches nobody": {told: 1, fails: func(t *testing.T, p *Predecessor) error {
			p.control.CloseRead()
			if _, err := io.WriteString(p.control, "taken\n"); err != nil {
				t.Error(err)
			}
			return expect(p.control, "go\n")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h, k := newFake(t)
			a := attach(t, h, offer("/dev/nbd1", disk))
			restore := func() {}
			if test.prepare != nil {
				restore = test.prepare(t, a)
			}
			conns := make([]Handed, test.conns)
			for i := range conns {
				conns[i], _ = pair(t, "")
				defer conns[i].Conn.Close()
			}
			done, calls := handsOver(a, conns...)
			p := lives(t, h)
			err := p.Receive(limited(t))
			if test.fails != nil && err == nil {
				err = test.fails(t, p)
			}
			if err == nil {
				t.Error("the successor has it")
			}
			p.Close()
			o := <-done
			restore()
			if o.taken || o.err == nil || *calls != test.told {
				t.Fatalf("%+v after %d calls", o, *calls)
			}
			if err := a.Keep(limited(t), identity); err != nil {
				t.Fatal(err)
			}
			if s := h.server(1); !s.alive() || s.PID != os.Getpid() || s.Journal != "J" || !h.connected(1) {
				t.Errorf("%+v", s)
			}

			done, _ = handsOver(a)
			p = lives(t, h)
			if err := p.Receive(limited(t)); err != nil {
				t.Fatal(err)
			}
			b, err := p.TakeOver(limited(t), offer("", disk))
			if err != nil {
				t.Fatal(err)
			}
			if o := <-done; !o.taken || o.err != nil {
				t.Errorf("%+v", o)
			}
			if err := errors.Join(b.Detach(limited(t), false), b.Close()); err != nil {
				t.Error(err)
			}
			if slices.Contains(k.logged(), "reconfigure 1") {
				t.Errorf("the kernel has noticed: %q", k.logged())
			}
		})
	}
}

// A successor that fails after the last word leaves the device to wait for whoever
// has the image, which was closed with all that was answered.
func TestHandOverWaits(t *testing.T) {
	for name, fail := range map[string]func(*testing.T, *host, *Predecessor){
		"nobody could ask it": func(t *testing.T, h *host, p *Predecessor) {
			if err := os.MkdirAll(h.controlPath(1)+"/full", 0o700); err != nil {
				t.Error(err)
			}
		},
		"the record cannot be written": func(t *testing.T, h *host, p *Predecessor) {
			f, err := os.Open(h.recordPath(1))
			if err != nil {
				t.Error(err)
			}
			p.record.f = f
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := newFake(t)
			a := attach(t, h, offer("/dev/nbd1", disk))
			p := lives(t, h)
			done := make(chan outcome, 1)
			go func() {
				taken, err := a.HandOver(<-a.Successors(), nil, nil, func() { fail(t, h, p) })
				done <- outcome{taken, err}
			}()
			if err := p.Receive(limited(t)); err != nil {
				t.Fatal(err)
			}
			locked := p.record.f
			if b, err := p.TakeOver(limited(t), offer("", disk)); b != nil || err == nil {
				t.Errorf("%v, %v", b, err)
			}
			p.Close()
			locked.Close() // with the process
			if o := <-done; !o.taken || o.err != nil {
				t.Errorf("%+v", o)
			}
			if err := os.RemoveAll(h.controlPath(1)); err != nil {
				t.Fatal(err)
			}
			next, err := h.findPredecessor(limited(t), "/dev/nbd1", "", true)
			if err != nil || next == nil || next.Lives() {
				t.Fatalf("%+v, %v", next, err)
			}
			if i := next.Identity(); i.Journal != "" || i.Volatile != "" {
				t.Errorf("%+v: the image was closed", i)
			}
			b, err := next.TakeOver(limited(t), offer("", disk))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(b.Detach(limited(t), false), b.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}
