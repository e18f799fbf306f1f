package export

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// A peer that is gone without a word is noticed, whoever made the connection.
func TestKeepAlive(t *testing.T) {
	quiet := net.ListenConfig{KeepAlive: -1}
	l, err := quiet.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	alive := func() (on int) {
		raw, err := accepted.(*net.TCPConn).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { on, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE) })
		}
		if err != nil {
			t.Fatal(err)
		}
		return on
	}
	if alive() != 0 {
		t.Fatal("it is on already: nothing is tested")
	}
	s := serve(t, nil, nil)
	ended := make(chan error)
	go func() { ended <- s.ServeConn(accepted) }()
	p := &peer{t: t, conn: conn}
	p.greet() // the server has begun
	if alive() != 1 {
		t.Error("SO_KEEPALIVE is off")
	}
	conn.Close()
	<-ended
}
