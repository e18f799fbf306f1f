package main

import (
	"context"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
)

// A stuck device does not come back from Close until it is told to.
type stuck struct {
	image.Device
	goOn chan struct{}
}

func (d stuck) Close() error {
	<-d.goOn
	return nil
}

// A medium that does not answer keeps the program until a second signal, and
// not much longer. One that answers late is closed all the same.
func TestStuckDeviceIsGivenUp(t *testing.T) {
	t.Parallel()
	s := &service{file: "disk", signals: make(chan os.Signal, 2), device: stuck{goOn: make(chan struct{})}}
	s.signals <- syscall.SIGTERM
	if err := s.closeDevice(); err == nil || !strings.Contains(err.Error(), "disk does not answer") {
		t.Errorf("got %v", err)
	}
	goOn := make(chan struct{})
	s = &service{file: "disk", signals: make(chan os.Signal, 2), device: stuck{goOn: goOn}}
	s.signals <- syscall.SIGTERM
	close(goOn)
	if err := s.closeDevice(); err != nil {
		t.Errorf("one that answers: %v", err)
	}
}

// A signal ends what waits, and says that it did; without one nothing is ended.
func TestUntilSignal(t *testing.T) {
	s := &service{signals: make(chan os.Signal, 2)}
	ctx, done := s.untilSignal()
	if err := ctx.Err(); err != nil {
		t.Error(err)
	}
	if sig := done(); sig != nil {
		t.Error(sig)
	}
	ctx, done = s.untilSignal()
	s.signals <- syscall.SIGTERM
	<-ctx.Done()
	if why := context.Cause(ctx).Error(); why != "ended by a signal: terminated" {
		t.Error(why)
	}
	if sig := done(); sig != syscall.SIGTERM {
		t.Error(sig)
	}
}
