package export

import (
	"net"
	"path/filepath"
	"testing"
)

// pair returns a transport of the network and the other end of its connection.
func pair(t *testing.T, network, address string) (*socket, net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return newTransport(conn).(*socket), peer
}

func TestLinger(t *testing.T) {
	s, peer := pair(t, "tcp", "127.0.0.1:0")
	s.linger(false)
	if want := (restraint{1, 1}); s.restraint != want {
		t.Errorf("after nothing has come: %+v, want %+v", s.restraint, want)
	}
	s.linger(false)
	if want := (restraint{1, 0}); s.restraint != want {
		t.Errorf("the next time it is left off: %+v, want %+v", s.restraint, want)
	}
	if _, err := peer.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ready(); err != nil {
		t.Fatal(err)
	}
	s.linger(false)
	if want := (restraint{}); s.restraint != want {
		t.Errorf("after something has come: %+v, want %+v", s.restraint, want)
	}

	s.restraint.left = 1
	s.linger(true)
	if want := (restraint{0, 1}); s.restraint != want {
		t.Errorf("in the midst of a request: %+v, want %+v", s.restraint, want)
	}

	s, _ = pair(t, "unix", filepath.Join(t.TempDir(), "socket"))
	s.linger(false)
	if want := (restraint{}); s.restraint != want {
		t.Errorf("on a Unix socket: %+v, want %+v", s.restraint, want)
	}
	s.linger(true)
	if want := (restraint{1, 1}); s.restraint != want {
		t.Errorf("in the midst of a request on a Unix socket: %+v, want %+v", s.restraint, want)
	}
}

func TestRestraint(t *testing.T) {
	var r restraint
	for tried, next := 0, 0; tried < 15; tried++ {
		for range next {
			if !r.keeps() {
				t.Fatalf("after %d times in vain it was not left off %d times", tried, next)
			}
		}
		if r.keeps() {
			t.Fatalf("after %d times in vain it was left off more than %d times", tried, next)
		}
		r.inVain()
		next = min(max(2*next, 1), mostOften)
	}
	r.paid()
	r.left = 0
	r.inVain()
	if r.left != 1 {
		t.Errorf("after it has paid it is left off %d times", r.left)
	}
}
