package connect

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// warded attaches an image by a server that is another process than this, which
// the guardian of the device is told of.
func warded(t *testing.T, h *host, deadTimeout time.Duration, peers ...peer) (*Attachment, Ward) {
	t.Helper()
	var w Ward
	opt := offer("/dev/nbd1", peers...)
	opt.DeadTimeout = deadTimeout
	opt.Guard = func(told Ward) error {
		w = told
		return nil
	}
	a := attach(t, h, opt)
	if want := (Ward{"/dev/nbd1", a.backend, os.Getpid(), len(peers), deadTimeout}); w != want {
		t.Errorf("the guardian is told %+v, want %+v", w, want)
	}
	w.PID, a.record.PID = 1, 1
	if err := a.record.write(); err != nil {
		t.Fatal(err)
	}
	return a, w
}

// releasing calls release; what that returns comes from the channel.
func releasing(t *testing.T, h *host, w Ward) chan error {
	result := make(chan error, 1)
	go func() { result <- h.release(limited(t), w) }()
	return result
}

// timeouts are those that the kernel was told.
func (k *fakeKernel) timeouts() []string {
	return slices.DeleteFunc(k.logged(), func(l string) bool { return !strings.HasPrefix(l, "timeout 1 ") })
}

// What a dead server had not answered fails in time, and after a takeover the
// kernel waits for answers again.
func TestRelease(t *testing.T) {
	h, k := newFake(t)
	a, w := warded(t, h, time.Second, disk)
	began := time.Now()
	released := releasing(t, h, w) // it is about to end
	if err := sleep(limited(t), 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if got := k.timeouts(); len(got) > 0 {
		t.Errorf("the server lives, and the kernel is told %q", got)
	}
	a.record.f.Close()
	if err := <-released; err != nil {
		t.Error(err)
	}
	if waited := time.Since(began); waited < w.DeadTimeout {
		t.Errorf("after %v", waited)
	}
	if got := k.timeouts(); !slices.Equal(got, []string{"timeout 1 2s 0s"}) {
		t.Errorf("the kernel is told %q", got)
	}
	p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
	if err != nil || p == nil {
		t.Fatalf("%v, %v", p, err)
	}
	released = releasing(t, h, w) // somebody looks whether he can have it
	opt := offer("/dev/nbd1", disk)
	opt.DeadTimeout = time.Minute
	a, err = p.TakeOver(limited(t), opt)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-released; err != nil {
		t.Error(err)
	}
	if got := k.timeouts(); !slices.Equal(got, []string{"timeout 1 2s 0s", "timeout 1 0s 1m0s"}) {
		t.Errorf("the kernel is told %q", got)
	}
	if err := errors.Join(a.Detach(limited(t), false), a.Close()); err != nil {
		t.Error(err)
	}
}

// A takeover that comes while the guardian has the record waits.
func TestReleaseKeepsOthers(t *testing.T) {
	h, _ := newFake(t)
	a, w := warded(t, h, time.Minute, disk)
	a.record.f.Close()
	f, err := h.orphan(limited(t), 1, w)
	if f == nil || err != nil {
		t.Fatalf("%v, %v", f, err)
	}
	if s := state(h); s != Dead {
		t.Errorf("the device is %s", s)
	}
	ctx, cancel := context.WithTimeout(limited(t), 100*time.Millisecond)
	defer cancel()
	if p, err := h.findPredecessor(ctx, "/dev/nbd1", "", false); err == nil {
		t.Errorf("%v: it is taken", p)
	}
	f.Close()
	p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false)
	if p == nil || err != nil {
		t.Fatalf("%v, %v", p, err)
	}
	p.Close()
}

// The guardian leaves a device that is gone, or is another server's.
func TestReleaseNothing(t *testing.T) {
	for name, change := range map[string]func(h *host, k *fakeKernel, a *Attachment, w *Ward){
		"detached":            func(_ *host, _ *fakeKernel, a *Attachment, _ *Ward) { a.host.disconnect(1); a.Close() },
		"detached, but open":  func(_ *host, k *fakeKernel, a *Attachment, _ *Ward) { a.record.f.Close(); k.detached = true },
		"free":                func(_ *host, k *fakeKernel, a *Attachment, _ *Ward) { k.free(1) },
		"another attachment":  func(_ *host, _ *fakeKernel, _ *Attachment, w *Ward) { w.Backend = "imgnbd:other" },
		"another server":      func(_ *host, _ *fakeKernel, _ *Attachment, w *Ward) { w.PID = 2 },
		"nobody ever used it": func(_ *host, _ *fakeKernel, a *Attachment, w *Ward) { a.record.f.Close(); w.Connections = 3 },
	} {
		t.Run(name, func(t *testing.T) {
			h, k := newFake(t)
			a, w := warded(t, h, 0, disk)
			change(h, k, a, &w)
			before := k.logged()
			if err := h.release(limited(t), w); err != nil {
				t.Error(err)
			}
			if got := k.logged()[len(before):]; len(got) > 0 {
				t.Errorf("it has done %q", got)
			}
		})
	}
}

// A server may be killed while it waits for the record of the one before, which
// has not closed its image yet. Nobody can take over what is noted nowhere.
func TestReleaseUnrecorded(t *testing.T) {
	for _, record := range []string{"", "{", `{"backend":"imgnbd:before","pid":1}`} {
		h, k := newFake(t)
		if err := h.makeRun(); err != nil {
			t.Fatal(err)
		}
		before, err := os.Create(h.recordPath(1))
		if err != nil {
			t.Fatal(err)
		}
		defer before.Close()
		if _, err := before.WriteString(record); err != nil {
			t.Fatal(err)
		}
		if err := lock(limited(t), before, syscall.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		told := make(chan Ward, 1)
		opt := offer("/dev/nbd1", disk)
		opt.Guard = func(w Ward) error {
			told <- w
			return errors.New("killed")
		}
		h.kernel = killed{k} // nothing is undone
		if _, err := h.attach(limited(t), opt); err == nil {
			t.Fatal("it is attached")
		}
		h.kernel = k
		if !strings.HasPrefix(record, `{"`) {
			before.Close()
		}
		if err := h.release(limited(t), <-told); err != nil {
			t.Error(err)
		}
		if log := k.logged(); log[len(log)-1] != "disconnect 1" {
			t.Errorf("%q: %q", record, log)
		}
	}
}

// A device that is detached and attached anew while the guardian looks at it is
// somebody else's.
func TestReleaseAttachedAnew(t *testing.T) {
	h, k := newFake(t)
	a, w := warded(t, h, 0, disk)
	backend := filepath.Join(h.sys, "nbd1/backend")
	if err := errors.Join(os.Remove(backend), syscall.Mkfifo(backend, 0o600)); err != nil {
		t.Fatal(err)
	}
	released := releasing(t, h, w)
	reading, err := os.OpenFile(backend, os.O_WRONLY, 0) // once the guardian reads
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(backend); err != nil {
		t.Fatal(err)
	}
	k.write("nbd1", "backend", "imgnbd:other")
	a.record.Backend = "imgnbd:other"
	_, err = reading.WriteString(w.Backend + "\n")
	if err := errors.Join(a.record.write(), err, reading.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-released; err != nil {
		t.Error(err)
	}
	if log := k.logged(); slices.Contains(log, "disconnect 1") {
		t.Errorf("%q", log)
	}
}

// A killed process disconnects nothing.
type killed struct{ *fakeKernel }

func (killed) disconnect(int) error { return nil }

// With several connections a device that is used is given up, and nothing is
// left of it.
func TestReleaseSeveral(t *testing.T) {
	for name, mounted := range map[string]func(k *fakeKernel){
		"here": func(k *fakeKernel) { k.file("proc/self/mountinfo", "1 2 43:33 / /mnt rw - ext4 /dev/nbd1p1 rw\n") },
		"a number of its own, elsewhere": func(k *fakeKernel) {
			k.namespace(123, "38 1 0:52 / /data rw - btrfs /dev/nbd1p1 rw\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, k := newFake(t)
			multi := peer{size: 1 << 20, flags: writable | nbd.FlagCanMultiConn}
			k.table = []int{1}
			a, w := warded(t, h, time.Second, multi, multi)
			mounted(k)
			a.record.f.Close()
			began := time.Now()
			if err := h.release(limited(t), w); err != nil {
				t.Error(err)
			}
			if waited := time.Since(began); waited < w.DeadTimeout {
				t.Errorf("after %v", waited)
			}
			if got := k.timeouts(); len(got) > 0 || !slices.Contains(k.logged(), "disconnect 1") {
				t.Errorf("%q", k.logged())
			}
			if p := h.partitions(1); len(p) > 0 {
				t.Errorf("%q are left", p)
			}
			if left, _ := filepath.Glob(h.run + "/*"); len(left) > 0 {
				t.Errorf("%q are left", left)
			}
		})
	}
}

// What a server had not answered that is away for too long fails, too.
func TestTendUnanswered(t *testing.T) {
	h, k := newFake(t)
	r := &remote{peer: &disk}
	a, result := tended(t, h, r, Options{DeadTimeout: time.Second})
	r.set(nil)
	k.lines <- 0
	awaitState(t, h, Away)
	for ctx := limited(t); !slices.Contains(k.logged(), "timeout 0 2s 0s"); {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			t.Fatalf("%q", k.logged())
		}
	}
	r.set(&disk)
	awaitState(t, h, Live)
	log := k.logged()
	if n := len(log); n < 2 || log[n-2] != "timeout 0 0s 1s" || log[n-1] != "reconfigure 0" {
		t.Errorf("%q", log)
	}
	if err := errors.Join(a.Detach(limited(t), false), <-result, a.Close()); err != nil {
		t.Error(err)
	}
}
