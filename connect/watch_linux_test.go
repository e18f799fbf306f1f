package connect

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The end of a connection is seen from either side, data that nobody reads is
// not, and one that takes its place is watched too.
func TestWatch(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tcp := func() (ours, server net.Conn) {
		ours, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if server, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ours.Close(); server.Close() })
		return ours, server
	}
	a, aServer := tcp()
	b, bServer := tcp()
	// c is relayed, d is dropped by the kernel, and the relay of e has ended.
	var relayed relays
	cServer, c := net.Pipe()
	if c, err = relayed.socket(c); err != nil {
		t.Fatal(err)
	}
	dServer, d, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	eServer, e, err := SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); dServer.Close(); e.Close() })
	eServer.Close()
	w, err := linux{}.watch([]net.Conn{a, b, c, d, e})
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	for _, server := range []net.Conn{aServer, bServer, cServer, dServer} {
		if _, err := server.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want ...int) {
		t.Helper()
		var all []int
		for len(all) < len(want) {
			got, err := w.wait(limited(t))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, got...)
		}
		if slices.Sort(all); !slices.Equal(all, want) {
			t.Errorf("%d have ended, not %d", all, want)
		}
	}
	expect(4)
	d.Close()
	expect(3)
	aServer.Close()
	expect(0)
	// As the kernel does when it gives up a connection, or is told to.
	raw, err := b.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) })
	if err != nil {
		t.Fatal(err)
	}
	expect(1)
	a, aServer = tcp()
	if err := w.set(0, a); err != nil {
		t.Fatal(err)
	}
	cServer.Close()
	aServer.Close()
	expect(0, 2)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := w.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if n, err := unix.Poll(w.(poller), 0); n != 0 || err != nil {
		t.Errorf("%d, %v: the next wait does not sleep", n, err)
	}
}

// An end that somebody else has, too, is kept; one that nobody has is not.
func TestKept(t *testing.T) {
	var conns []net.Conn
	var others []net.Conn
	var holds []io.Closer
	for range 4 {
		ours, kernels, err := SocketPair()
		if err != nil {
			t.Fatal(err)
		}
		defer ours.Close()
		hold, err := kernels.(*kernelEnd).File()
		if err != nil {
			t.Fatal(err)
		}
		conns, others, holds = append(conns, kernels), append(others, ours), append(holds, hold)
		kernels.Close()
	}
	for i, want := range []int{4, 3, 2} {
		if got, err := (linux{}).kept(conns); len(got) != want || err != nil {
			t.Errorf("%v, %v are kept, not %d", got, err, want)
		}
		holds[i].Close()
	}
	others[3].Close() // by who served it
	if got, err := (linux{}).kept(conns); len(got) != 0 || err != nil {
		t.Errorf("%v, %v are kept, and the end of all was seen", got, err)
	}
	holds[3].Close()
}
