package export

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// What is accepted has the send buffer that its listener was given, where that is
// allowed and there are few clients, and otherwise what the kernel chooses.
func TestPrepareListener(t *testing.T) {
	sndbuf := func(maxClients int) (size int) {
		t.Helper()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		PrepareListener(l, maxClients)
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		rc, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		rc.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) })
		if err != nil {
			t.Fatal(err)
		}
		return size
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	want := 2 * sendBufferTCP
	if forceSendBuffer(fd, sendBufferTCP) != nil {
		want = sndbuf(0)
	}
	if got := sndbuf(sendBufferClients); got != want {
		t.Errorf("%d bytes, not %d", got, want)
	}
	for _, clients := range []int{0, sendBufferClients + 1} {
		if got := sndbuf(clients); got >= 2*sendBufferTCP {
			t.Errorf("%d bytes for each of %d clients", got, clients)
		}
	}
}
