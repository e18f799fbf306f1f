package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/image"
)

// serving returns a service of a new overlay, above base.raw in dir, with
// what it has to say.
func serving(t *testing.T, dir string) (*service, <-chan string) {
	t.Helper()
	base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if o := ours("imgnbd", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top); o.Code != 0 {
		t.Fatal(o)
	}
	o := newServeOptions()
	if err := o.flags.Parse([]string{"--format=qcow2", "--journal=off"}); err != nil {
		t.Fatal(err)
	}
	said := make(said, 100)
	return &service{opt: o, u: newUI("imgnbd", nil, nil, said), file: top, signals: make(chan os.Signal, 2)}, said
}

// said are messages.
type said chan string

func (s said) Write(b []byte) (int, error) {
	s <- string(b)
	return len(b), nil
}

// A server that goes on because its successor found another image finds
// that, too.
func TestReopenAnotherImage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, _ := serving(t, dir)
	d, err := s.reopen(nil)
	if err != nil {
		t.Fatal(err)
	}
	was := s.opt.connect.origin.stores
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	check := func(_ string, stores []string, _ []connect.Property) error {
		if !slices.Equal(stores, was[:len(stores)]) {
			return &connect.DifferentError{}
		}
		return nil
	}
	if d, err = s.reopen(check); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other.raw")
	if err := os.WriteFile(other, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, filepath.Join(dir, "base.raw")); err != nil {
		t.Fatal(err)
	}
	d, err = s.reopen(check)
	if _, ok := errors.AsType[*connect.DifferentError](err); d != nil || !ok {
		t.Errorf("%v, %v", d, err)
	}
}

// A successor that gives up may have the image for a while yet. A signal that
// comes meanwhile is not lost.
func TestReopenWaits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, said := serving(t, dir)
	successor, err := s.opt.open(context.Background(), s.u, s.file)
	if err != nil {
		t.Fatal(err)
	}
	s.signals <- syscall.SIGTERM
	type opened struct {
		device image.Device
		err    error
	}
	done := make(chan opened)
	go func() {
		d, err := s.reopen(nil)
		done <- opened{d, err}
	}()
	if text := <-said; !strings.Contains(text, "it is tried again") {
		t.Error(text)
	}
	if err := successor.Close(); err != nil {
		t.Fatal(err)
	}
	o := <-done
	if o.err != nil {
		t.Fatal(o.err)
	}
	defer o.device.Close()
	if sig := <-s.signals; sig != syscall.SIGTERM {
		t.Error(sig)
	}

	s.signals <- syscall.SIGTERM
	s.signals <- syscall.SIGTERM
	if d, err := s.reopen(nil); d != nil || err == nil || !strings.Contains(err.Error(), "is not open again yet") {
		t.Errorf("two signals: %v, %v", d, err)
	}
}

// What there is to say about an image that was waited for is not lost.
func TestReopenWarns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, said := serving(t, dir)
	f, err := os.OpenFile(s.file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	const dirty, features = 1, 72
	_, err = f.WriteAt([]byte{dirty}, features+7)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	looks := newServeOptions()
	if err := looks.flags.Parse([]string{"--format=qcow2", "--journal=off", "--read-only"}); err != nil {
		t.Fatal(err)
	}
	successor, err := looks.open(context.Background(), newUI("imgnbd", nil, nil, io.Discard), s.file)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		d, err := s.reopen(nil)
		if err == nil {
			err = d.Close()
		}
		done <- err
	}()
	if text := <-said; !strings.Contains(text, "it is tried again") {
		t.Error(text)
	}
	if err := successor.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	select {
	case text := <-said:
		if !strings.Contains(text, "warning: the image was not closed properly") {
			t.Error(text)
		}
	default:
		t.Error("it does not say that the image was repaired")
	}
}
