package connect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// What somebody else attaches while a device is being detached is his.
func TestDetachAnother(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	h.kernel = &attachedAnew{fakeKernel: k}
	for _, force := range []bool{false, true} {
		if err := h.detach(limited(t), 0, a.backend, force); err != nil {
			t.Error(err)
		}
	}
	log := k.logged()
	if slices.Contains(log, "disconnect 0") || log[len(log)-1] != "release /dev/nbd0" {
		t.Errorf("%q", log)
	}
}

// An attachedAnew device is another attachment by the time that it is opened.
type attachedAnew struct{ *fakeKernel }

func (k *attachedAnew) open(path string, exclusive bool) (block, error) {
	k.write("nbd0", "backend", "imgnbd:other")
	return k.fakeKernel.open(path, exclusive)
}

// A server that hangs is not waited for by force, unless it answers something
// now and then.
func TestDetachHung(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	k.opened(os.Getpid(), h.recordPath(0))
	k.write("nbd0", "stat", "1 0 8 5 7 0 8 5 1 20 20 0 0 0 0 3 1")
	synctest.Test(t, func(t *testing.T) {
		began, given := time.Now(), make(chan struct{})
		k.syncing = func() error {
			time.Sleep(hung / 2)
			k.write("nbd0", "stat", "1 0 8 5 7 0 8 5 1 99 99 0 0 0 0 4 1")
			<-given
			return syscall.EIO
		}
		k.killed = func() {
			a.record.f.Close()
			close(given)
		}
		if err := a.Detach(t.Context(), true); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != 2*hung {
			t.Errorf("after %v", took)
		}
	})
	want := []string{"connect 0", "scan 0", "claim /dev/nbd0", "sync /dev/nbd0", fmt.Sprint("kill ", os.Getpid()), "disconnect 0", "release /dev/nbd0"}
	if diff := cmp.Diff(want, k.logged()); diff != "" {
		t.Error(diff)
	}
}

// Nobody is killed but the server: its number may be another process's by now,
// and its lock that of a process which is about to take the device over.
func TestDetachHungSuccessor(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	k.opened(os.Getpid(), filepath.Join(t.TempDir(), "nbd0.json"))
	synctest.Test(t, func(t *testing.T) {
		if err := h.endServer(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "/dev/nbd0 stays attached") {
			t.Error(err)
		}
		time.AfterFunc(hung/2, func() { a.record.f.Close() })
		if err := h.endServer(t.Context(), 0); err != nil {
			t.Error(err)
		}
	})
	if log := strings.Join(k.logged(), ", "); strings.Contains(log, "kill") {
		t.Error(log)
	}
}

// Who cannot see the devices of the kernel takes none for detached.
func TestUnseen(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	if !a.Ours() {
		t.Error("it is attached")
	}
	if err := os.Rename(h.sys, h.sys+" moved"); err != nil {
		t.Fatal(err)
	}
	if !a.Ours() || a.Seen() {
		t.Error("it is taken for detached")
	}
	if err := h.attached(0); err == nil || errors.Is(err, ErrNotAttached) {
		t.Errorf("whether it is attached: %v", err)
	}
	if err := os.Rename(h.sys+" moved", h.sys); err != nil {
		t.Fatal(err)
	}
	k.free(0)
	if a.Ours() || !a.Seen() || !errors.Is(h.attached(0), ErrNotAttached) {
		t.Error("it is detached")
	}
}

// Of two that detach a device at once the second finds it free.
func TestDetachTogether(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	h.kernel = &detachedMeanwhile{fakeKernel: k}
	k.syncing = func() error { return syscall.EIO }
	k.log = nil
	if err := h.detach(limited(t), 0, a.backend, false); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"claim /dev/nbd0", "release /dev/nbd0"}, k.logged()); diff != "" {
		t.Error(diff)
	}
}

// A detachedMeanwhile device is free by the time that it is opened.
type detachedMeanwhile struct{ *fakeKernel }

func (k *detachedMeanwhile) open(path string, exclusive bool) (block, error) {
	k.free(0)
	return k.fakeKernel.open(path, exclusive)
}

// Who is told to wait no longer says so, and lets go of the device when he can.
func TestDetachInterrupted(t *testing.T) {
	for _, force := range []bool{false, true} {
		h, k := newFake(t)
		a := attach(t, h, to("/dev/nbd0", disk))
		ctx, cancel := context.WithCancel(limited(t))
		answer, released := make(chan struct{}), make(chan struct{})
		k.syncing = func() error {
			cancel()
			<-answer
			return nil
		}
		k.released = func() { close(released) }
		err := h.detach(ctx, 0, a.backend, force)
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "/dev/nbd0 stays attached") || !h.connected(0) {
			t.Errorf("%v, %q", err, k.logged())
		}
		close(answer)
		<-released
	}
	// Who waits for long enough does not.
	h, k := newFake(t)
	a := attach(t, h, to("/dev/nbd0", disk))
	late, cancel := context.WithDeadline(limited(t), time.Unix(1, 0))
	defer cancel()
	k.syncing = func() error {
		time.Sleep(50 * time.Millisecond)
		return nil
	}
	if err := h.detach(late, 0, a.backend, false); err != nil || h.connected(0) {
		t.Errorf("%v, %q", err, k.logged())
	}
}
