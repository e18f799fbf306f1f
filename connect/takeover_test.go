package connect

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

var identity = Identity{
	Stores:     []string{"file 1:2 3", "file 1:2 4"},
	Properties: []Property{{"format", "qcow2"}, {"offset", "0"}},
	Journal:    "J",
}

// offer is what to returns, for a successor that is a qcow2 image.
func offer(device string, peers ...peer) Options {
	o := to(device, peers...)
	o.Identity = identity
	return o
}

func different(change func(*Identity)) Options {
	o := offer("", disk)
	change(&o.Identity)
	return o
}

// orphan returns a device whose server has died.
func orphan(t *testing.T, h *host, peers ...peer) *Predecessor {
	t.Helper()
	a := attach(t, h, offer("/dev/nbd1", peers...))
	a.record.f.Close()
	o, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
	if err != nil || o == nil {
		t.Fatalf("%v, %v", o, err)
	}
	return o
}

func TestTakeOver(t *testing.T) {
	h, k := newFake(t)
	multi := peer{size: 1 << 20, flags: writable | nbd.FlagCanMultiConn, block: 4096}
	o := orphan(t, h, multi, multi)
	if diff := cmp.Diff(identity.with([]Property{{"size", "1048576"}, {"block size", "4096"}, {"flags", "0x16d"}}), o.Identity()); diff != "" {
		t.Error(diff)
	}
	if o.Path() != "/dev/nbd1" || o.Connections() != 2 {
		t.Errorf("%s with %d connections", o.Path(), o.Connections())
	}
	if err := o.Check("/disk", identity.Stores, identity.Properties); err != nil {
		t.Error(err)
	}
	// Not all at once: others find it dead, and cannot have it.
	if d := h.devices(); len(d) != 1 || d[0].Image != "/disk" {
		t.Errorf("%+v", d)
	}
	if again, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false); again != nil || err != nil {
		t.Errorf("%v, %v: there are two", again, err)
	}

	k.deaf, k.places, k.log = 2, 1, nil
	offered := offer("/dev/nbd1", multi, multi)
	offered.DeadTimeout, offered.Image = 5*time.Second, "/other name of it"
	a, err := o.TakeOver(limited(t), offered)
	if err != nil {
		t.Fatal(err)
	}
	// Two pairs are ignored, of the third one takes a place, and another follows.
	if diff := cmp.Diff(slices.Repeat([]string{"reconfigure 1"}, 4), k.logged()); diff != "" {
		t.Error(diff)
	}
	if len(k.reconf.conns) != 1 || k.reconf.deadTimeout != 5*time.Second || k.reconf.backend != a.backend {
		t.Errorf("%+v", k.reconf)
	}
	if s := h.server(1); !s.alive() || s.PID != os.Getpid() || s.Image != "/other name of it" || s.Journal != "J" {
		t.Errorf("%+v", s)
	}
	if o, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false); o != nil || err != nil {
		t.Errorf("a live server has died: %v, %v", o, err)
	}
	if err := errors.Join(a.Detach(limited(t), false), a.Close()); err != nil {
		t.Error(err)
	}
	if len(h.devices()) > 0 {
		t.Errorf("left: %v", h.devices())
	}
}

// What a successor answers may depend on another journal than what its
// predecessor had answered, or on none: the next one is told.
func TestTakeOverIdentity(t *testing.T) {
	h, _ := newFake(t)
	first := offer("/dev/nbd1", disk)
	first.Identity.Journal = ""
	attach(t, h, first).record.f.Close()
	for _, change := range []func(*Identity){
		func(i *Identity) { i.Journal = "K" },
		func(i *Identity) { i.Journal, i.Volatile = "", "there was no journal" },
	} {
		next := different(change)
		p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
		if err != nil || p == nil {
			t.Fatalf("%v, %v", p, err)
		}
		a, err := p.TakeOver(limited(t), next)
		if err != nil {
			t.Fatal(err)
		}
		s := h.server(1)
		s.close()
		want := next.Identity.with([]Property{{"size", "1048576"}, {"block size", "512"}, {"flags", "0x6d"}})
		if diff := cmp.Diff(want, s.Identity); diff != "" {
			t.Error(diff)
		}
		a.record.f.Close()
	}
}

// A connection that has ended before the last was taken does not count.
func TestTakeOverEnded(t *testing.T) {
	h, k := newFake(t)
	multi := peer{size: 1 << 20, flags: writable | nbd.FlagCanMultiConn, block: 4096}
	o := orphan(t, h, multi, multi)
	k.places, k.ends, k.log = 1, 1, nil
	if _, err := o.TakeOver(limited(t), offer("/dev/nbd1", multi, multi)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(slices.Repeat([]string{"reconfigure 1"}, 3), k.logged()); diff != "" {
		t.Error(diff)
	}
}

// Whatever is not the same is refused, naming both, and the device waits on.
func TestTakeOverRefused(t *testing.T) {
	readOnly := peer{size: 1 << 20, flags: nbd.FlagHasFlags | nbd.FlagReadOnly}
	for want, offered := range map[string]Options{
		"/dev/nbd1 waits for /disk with size 1048576; /disk has 1049088":          offer("", peer{size: 1<<20 + 512, flags: writable}),
		"/dev/nbd1 waits for /disk with size 1048576; /disk has 1048064":          offer("", peer{size: 1<<20 - 512, flags: writable}),
		"/dev/nbd1 waits for /disk with block size 512; /disk has 4096":           offer("", peer{size: 1 << 20, flags: writable, block: 4096}),
		"/dev/nbd1 waits for /disk with flags 0x6d; /disk has 0x3":                offer("", readOnly),
		"/dev/nbd1 waits for /disk with connections 1; /disk has 2":               offer("", disk, disk),
		"/dev/nbd1 waits for /disk with files":                                    different(func(i *Identity) { i.Stores = i.Stores[:1] }),
		"/dev/nbd1 waits for /disk (file 1:2 4), which /disk (file 9:9 9) is not": different(func(i *Identity) { i.Stores = []string{"file 1:2 3", "file 9:9 9"} }),
		"/dev/nbd1 waits for /disk with format qcow2; /disk has raw":              different(func(i *Identity) { i.Properties = []Property{{"format", "raw"}} }),
		"export '' has 0 bytes": offer("", peer{flags: writable}),
		"/dev/nbd1 was detached, and stays only until all have closed it: /dev/nbd1 is in use by somebody who cannot be": {},
	} {
		h, k := newFake(t)
		o := orphan(t, h, disk)
		if offered.Dial == nil {
			k.detached, offered = true, offer("", disk)
		}
		_, err := o.TakeOver(limited(t), offered)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
		if k.reconf != nil || !h.connected(1) {
			t.Errorf("%q: %q", want, k.logged())
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		if next, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false); next == nil {
			t.Errorf("%q: it does not wait on: %v", want, err)
		}
	}
}

func TestPredecessorCheck(t *testing.T) {
	h, _ := newFake(t)
	o := orphan(t, h, disk)
	for _, test := range []struct {
		stores     []string
		properties []Property
		want       string // "": it is the same
	}{
		{nil, nil, ""},
		{identity.Stores[:1], nil, ""}, // as far as it is known
		{identity.Stores, []Property{{"format", "qcow2"}, {"flags", "0x6d"}}, ""},
		{[]string{"file 9:9 9"}, nil, "waits for /disk (file 1:2 3), which /b (file 9:9 9) is not"},
		{[]string{identity.Stores[0], "file 9:9 9"}, nil, "(file 1:2 4), which /b (file 9:9 9)"},
		{append(identity.Stores[:2:2], "file 9:9 9"), nil, "(nothing more), which /b (file 9:9 9)"},
		{nil, []Property{{"format", "raw"}}, "waits for /disk with format qcow2; /b has raw"},
		{nil, []Property{{"snapshot", "s"}}, "with snapshot none; /b has s"},
		{nil, []Property{{"format", ""}}, "with format qcow2; /b has none"},
	} {
		err := o.Check("/b", test.stores, test.properties)
		if test.want == "" && err == nil {
			continue
		}
		if _, ok := errors.AsType[*DifferentError](err); !ok || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v", test.want, err)
		}
	}
}

// Where nobody can have what was answered, the device fails.
func TestGiveUp(t *testing.T) {
	h, k := newFake(t)
	o := orphan(t, h, disk)
	k.log = nil
	err := o.GiveUp("there was no journal")
	if !errors.Is(err, ErrGivenUp) || !strings.Contains(err.Error(), "/dev/nbd1 is given up, and fails from now on: there was no journal") {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"disconnect 1"}, k.logged()); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(h.recordPath(1)); err == nil {
		t.Error("the record stays")
	}
}

// What its server says may be lost nobody can take over.
func TestSpoil(t *testing.T) {
	h, _ := newFake(t)
	a := attach(t, h, offer("/dev/nbd1", disk))
	if err := a.Spoil("a sync has failed"); err != nil {
		t.Fatal(err)
	}
	a.record.f.Close()
	p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
	if err != nil || p == nil {
		t.Fatalf("%v, %v", p, err)
	}
	defer p.Close()
	if i := p.Identity(); i.Volatile != "a sync has failed" || i.Journal != "J" || i.Property("format") != "qcow2" {
		t.Errorf("%+v", i)
	}
}

// The record says so from the moment at which what was answered may be lost, also
// while the device is being attached or taken over, and whatever else is noted later.
func TestSpoilEarly(t *testing.T) {
	const why = "a sync has failed"
	noted := func(t *testing.T, h *host) bool {
		f, err := os.Open(h.recordPath(1))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := readRecord(f)
		return err == nil && r.Backend == h.backend(1) && r.Volatile == why
	}
	spoiled := func(t *testing.T, h *host, spoil func(string) error) {
		t.Helper()
		if err := spoil(why); err != nil {
			t.Error(err)
		}
		if !noted(t, h) {
			t.Error("it is not noted")
		}
	}
	t.Run("before there is a record", func(t *testing.T) {
		h, _ := newFake(t)
		opt := offer("/dev/nbd1", disk)
		opt.Follow = func(spoil func(string) error) { spoiled(t, h, spoil) }
		a := attach(t, h, opt)
		if !noted(t, h) {
			t.Error("attached: it is not noted")
		}
		if err := a.Keep(limited(t), identity); err != nil || !noted(t, h) {
			t.Errorf("kept: %v, or it is not noted", err)
		}
		a.Close()
	})
	t.Run("before it is ready", func(t *testing.T) {
		h, k := newFake(t)
		k.table, k.noNodes = []int{1}, true // which it waits for
		opt := offer("/dev/nbd1", disk)
		followed := make(chan func(string) error, 1)
		opt.Follow = func(spoil func(string) error) { followed <- spoil }
		ctx, cancel := context.WithCancel(limited(t))
		done := make(chan error, 1)
		go func() {
			_, err := h.attach(ctx, opt)
			done <- err
		}()
		spoil := <-followed
		for !slices.Contains(k.logged(), "scan 1") {
			time.Sleep(time.Millisecond)
		}
		spoiled(t, h, spoil)
		cancel()
		if err := <-done; err == nil {
			t.Error("it is attached")
		}
		if err := spoil(why); err != nil {
			t.Errorf("no record any more: %v", err)
		}
	})
	t.Run("while the image is opened for a takeover", func(t *testing.T) {
		h, _ := newFake(t)
		o := orphan(t, h, disk)
		spoiled(t, h, o.Spoil)
		opt := offer("", disk)
		opt.Follow = func(func(string) error) {}
		a, err := o.TakeOver(limited(t), opt)
		if err != nil {
			t.Fatal(err)
		}
		if !noted(t, h) {
			t.Error("taken over: it is not noted")
		}
		a.Close()
	})
	t.Run("before a takeover has its connections", func(t *testing.T) {
		h, k := newFake(t)
		o := orphan(t, h, disk)
		k.log, k.deaf = nil, 1
		opt := offer("", disk)
		opt.Follow = func(spoil func(string) error) {
			if log := k.logged(); len(log) > 0 {
				t.Errorf("too late: %q", log)
			}
			spoiled(t, h, spoil)
		}
		a, err := o.TakeOver(limited(t), opt)
		if err != nil {
			t.Fatal(err)
		}
		a.Close()
	})
}

func TestNoPredecessor(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	k.write("nbd2", "pid", "1") // by somebody else
	k.write("nbd2", "size", "8")
	for _, device := range []string{"/dev/nbd0", "/dev/nbd1", "/dev/nbd2", Auto} {
		if o, err := h.findPredecessor(limited(t), device, "", false); o != nil || err != nil {
			t.Errorf("%s: %v, %v", device, o, err)
		}
	}
	if _, err := h.findPredecessor(limited(t), "/dev/sda", "", false); err == nil {
		t.Error("/dev/sda is one")
	}
	// What a dead server has left says nothing of what another program has
	// attached since.
	a.record.f.Close()
	k.write("nbd0", "backend", "other")
	if o, err := h.findPredecessor(limited(t), "/dev/nbd0", "", false); o != nil || err != nil {
		t.Errorf("%v, %v", o, err)
	}
	// Without the record nobody knows what it was.
	k.write("nbd0", "backend", a.backend)
	if err := os.Remove(h.recordPath(0)); err != nil {
		t.Fatal(err)
	}
	if o, err := h.findPredecessor(limited(t), "/dev/nbd0", "", false); o != nil || err != nil {
		t.Errorf("%v, %v", o, err)
	}
}

// Who looks at a record holds its lock for a moment, and is no server.
func TestPredecessorLookedAt(t *testing.T) {
	h, _ := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	a.record.f.Close()
	f, err := os.Open(h.recordPath(0))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { f.Close() })
	if o, err := h.findPredecessor(limited(t), "/dev/nbd0", "", false); o == nil || err != nil {
		t.Errorf("%v, %v", o, err)
	}
}

func TestTakeOverUnanswered(t *testing.T) {
	h, k := newFake(t)
	o := orphan(t, h, disk)
	k.deaf = 1 << 30
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if _, err := o.TakeOver(ctx, offer("", disk)); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
