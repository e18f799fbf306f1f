package main

import (
	"strings"
	"testing"
	"time"
)

// One guest-facing port of AF_VSOCK has one server.
func TestVsock(t *testing.T) {
	p, err := listenVsock("1234567890")
	if err != nil {
		t.Skipf("AF_VSOCK: %v", err)
	}
	if got := p.uri.String(); got != "nbd+vsock://1:1234567890/" {
		t.Error(got)
	}
	if _, err := listenVsock("1234567890"); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a second server: %v", err)
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := p.listeners[0].Accept()
		accepted <- err
	}()
	p.close()
	select {
	case err := <-accepted:
		if err == nil {
			t.Error("a client came from nowhere")
		}
	case <-time.After(deadline):
		t.Error("Accept does not end when the listener is closed")
	}
	if _, err := listenVsock("4294967296"); err == nil {
		t.Error("a port of 33 bits")
	}
	if p, err = listenVsock("1234567890"); err != nil {
		t.Fatal(err)
	}
	p.close()
}
