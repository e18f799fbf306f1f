package export

import (
	"io"
	"net"
	"path/filepath"
	"slices"
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
	for _, test := range []struct {
		network, address string
		midst            bool
		there            restraint // after something was there at once
	}{
		{"tcp", "127.0.0.1:0", false, restraint{0, 0}},
		{"unix", filepath.Join(t.TempDir(), "socket"), true, restraint{2, 0}},
	} {
		t.Run(test.network, func(t *testing.T) {
			s, peer := pair(t, test.network, test.address)
			linger := func(midst bool, what string, want restraint) {
				t.Helper()
				s.linger(midst)
				if s.restraint != want {
					t.Errorf("%s: %+v, want %+v", what, s.restraint, want)
				}
			}
			linger(!test.midst, "where that is slower", restraint{})
			linger(test.midst, "while nothing comes", restraint{1, 1})
			linger(test.midst, "the next time", restraint{1, 0})
			linger(test.midst, "while nothing comes again", restraint{2, 2})

			if _, err := peer.Write([]byte{1}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.ready(); err != nil {
				t.Fatal(err)
			}
			s.restraint.left = 0
			linger(test.midst, "when something is there", test.there)
			if _, err := s.read(make([]byte, 1), nil); err != nil {
				t.Fatal(err)
			}

			// It comes meanwhile, unless this process has to wait.
			s.restraint.skips = 2
			for try := 0; s.restraint.skips != 0; try++ {
				if try == 1000 {
					t.Fatal("it has never paid")
				}
				s.restraint.left = 0
				sent := make(chan error)
				go func() {
					_, err := peer.Write([]byte{1})
					sent <- err
				}()
				s.linger(test.midst)
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				if _, err := s.read(make([]byte, 1), nil); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestRestraint(t *testing.T) {
	var r restraint
	for tried, next := 0, 0; tried < 15; tried++ {
		for range next {
			if !r.holds() {
				t.Fatalf("after %d times in vain it was not skipped %d times", tried, next)
			}
		}
		if r.holds() {
			t.Fatalf("after %d times in vain it was skipped more than %d times", tried, next)
		}
		r.inVain()
		next = min(max(2*next, 1), mostSkips)
	}
	r.paid()
	r.inVain()
	if r.left != 1 {
		t.Errorf("after it has paid it is skipped %d times", r.left)
	}
}

// A hurrier notes what it is told.
type hurrier struct {
	stream
	told []bool
}

func (h *hurrier) hurry(many bool) { h.told = append(h.told, many) }

// One share of requests may be all there is, or part of more: it changes nothing.
func TestHurry(t *testing.T) {
	for served, want := range map[int][]bool{0: {false}, 1: {false}, lineShare - 1: {false}, lineShare: nil, lineShare + 1: {true}} {
		here, there := net.Pipe()
		defer here.Close()
		there.Close()
		h := &hurrier{stream: stream{here}}
		s := &session{srv: &Server{}}
		s.out.t = h
		s.line.in, s.line.served = make([]byte, lineInput), served
		if err := s.fill(); err != io.EOF {
			t.Error(err)
		}
		if !slices.Equal(h.told, want) {
			t.Errorf("after %d requests: %v, not %v", served, h.told, want)
		}
	}
}

// A lingerer counts how often it is to linger.
type lingerer struct {
	stream
	times int
}

func (l *lingerer) linger(bool) { l.times++ }

func TestLingerAlone(t *testing.T) {
	for connections, want := range map[int32]int{1: 1, 2: 0} {
		l := &lingerer{}
		s := &session{srv: &Server{}}
		s.srv.transmitting.Store(connections)
		s.out.t = l
		s.linger(true)
		if l.times != want {
			t.Errorf("with %d connections it lingers %d times", connections, l.times)
		}
	}
}
