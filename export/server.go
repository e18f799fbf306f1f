// Package export shows Devices to the clients of the NBD protocol.
//
// A [Server] accepts connections, agrees with each client on an [Export] and
// serves its requests. It opens no image and closes none: [Server.Open] says
// what a name means. It speaks fixed newstyle negotiation with simple,
// structured and extended replies, after the specification of the NBD project
// (doc/proto.md, the branch extension-ext-header included).
//
// One goroutine reads each connection and serves inline what can be served
// without waiting; what would wait is done by the workers of the Device. See
// transmit.go for the data path and negotiate.go for the handshake.
package export

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// ErrServerClosed is returned by Serve and ServeConn after Shutdown.
var ErrServerClosed = errors.New("export: server closed")

// A Server serves exports. Its exported fields are set before the first use
// and not changed afterwards. All methods may be called concurrently.
type Server struct {
	// Open returns what is exported under name; "" asks for the default
	// export. An error that wraps fs.ErrNotExist means that there is no such
	// export, one that wraps fs.ErrPermission that this client may not use it.
	// Clients are told no more than that; the rest is logged.
	Open func(ctx context.Context, c *Client, name string) (*Export, error)

	// List tells what may be opened. It opens nothing. nil refuses LIST.
	List func(ctx context.Context, c *Client) ([]Info, error)

	// Authorize, if set, is asked for each connection before anything is said
	// on it and before any other function is called for it, and once more when
	// TLS has begun, with Client.TLS set. An error refuses the client, without
	// a word.
	Authorize func(ctx context.Context, c *Client) error

	// TLS, if set, is how clients are met: TLSMode says when. No version
	// before 1.2 is spoken, whatever it allows, and no session is resumed.
	// Clients with GnuTLS 3.7 and an RSA certificate find it only if ClientCAs
	// is nil and VerifyConnection does the work.
	TLS     *tls.Config
	TLSMode TLSMode

	// ConnState, if set, is told of the life of each connection, with one
	// call at a time for each.
	ConnState func(*Client, State)

	// MaxClients is how many connections are served at once; 0: no limit.
	// Connections beyond it wait in the listener, as those of qemu-nbd do.
	MaxClients int

	Limits Limits
	Log    *slog.Logger // nil: nothing is logged

	once sync.Once
	tls  *tls.Config // what TLS has become

	transmitting atomic.Int32 // connections that are past their handshake

	mu        sync.Mutex // guards the fields below
	changed   *sync.Cond // sessions or closing have changed
	closing   bool
	listeners map[net.Listener]struct{}
	sessions  map[*session]struct{}
	clients   map[*Export]int // that transmit
	devices   map[image.Device]*device
	flushErr  error // of the flush that ends a session in Shutdown
	handed    []Handed

	memory budget
	bufs   bufferPool
	idler  idler

	reachedCounts [limits]atomic.Int64
}

// Limits bound what clients can make the server hold. A zero field is its
// default. Beyond its Memory the server needs about 2.6 MiB for each connection
// that moves data. When Memory is used up, those that hold nothing are served
// with that: slower, but they never wait for others.
type Limits struct {
	Handshake time.Duration // from connecting to the agreement; 10 s; negative: none
	Requests  int           // in progress per connection; 128
	ConnBytes int64         // held for them per connection; 64 MiB
	Memory    int64         // held for all connections; 512 MiB
}

func (l Limits) withDefaults() Limits {
	if l.Handshake == 0 {
		l.Handshake = 10 * time.Second
	}
	if l.Requests <= 0 {
		l.Requests = 128
	}
	if l.ConnBytes <= 0 {
		l.ConnBytes = 64 << 20
	}
	if l.Memory <= 0 {
		l.Memory = 512 << 20
	}
	return l
}

func (s *Server) init() {
	s.once.Do(func() {
		s.Limits = s.Limits.withDefaults()
		if s.Log == nil {
			s.Log = slog.New(slog.DiscardHandler)
		}
		s.tls = tlsConfig(s.TLS)
		s.changed = sync.NewCond(&s.mu)
		s.listeners = make(map[net.Listener]struct{})
		s.sessions = make(map[*session]struct{})
		s.clients = make(map[*Export]int)
		s.devices = make(map[image.Device]*device)
		s.memory.init(s.Limits.Memory)
		s.bufs.keep = min(keepFree, s.Limits.Memory/8)
	})
}

// Serve accepts connections on l until Shutdown, then returns ErrServerClosed.
// It closes l. It may be called for several listeners at once.
func (s *Server) Serve(l net.Listener) error {
	s.init()
	defer l.Close()
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()

	var pause time.Duration
	for {
		// Accept only while there is room, so that further clients wait in the
		// backlog. Two listeners may both get here; admit decides.
		if !s.waitForRoom() {
			return ErrServerClosed
		}
		conn, err := l.Accept()
		if err != nil {
			if s.isClosing() {
				return ErrServerClosed
			}
			if !transientAccept(err) {
				return err
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.reached(limitDescriptors, "err", err)
			s.Log.Debug("cannot accept a connection", "err", err, "retry", pause)
			time.Sleep(pause)
			continue
		}
		pause = 0
		ses, err := s.admit(conn, true)
		if err != nil {
			conn.Close()
			return err
		}
		go ses.run(func(error) {})
	}
}

// transientAccept reports whether accepting may succeed again later.
func transientAccept(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves one connection and closes it. It does not wait for
// MaxClients. A client that leaves in an orderly way is no error.
func (s *Server) ServeConn(conn net.Conn) error {
	s.init()
	ses, err := s.admit(conn, false)
	if err != nil {
		conn.Close()
		return err
	}
	ended := make(chan error, 1)
	ses.run(func(err error) { ended <- err })
	return <-ended
}

// Shutdown ends the server in good order: it stops accepting, stops reading
// requests, finishes those that were accepted, sends their replies, flushes
// the devices that were written to, and closes the connections. When ctx ends
// first, the connections are cut and its error is returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.init()
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		l.Close()
	}
	for ses := range s.sessions {
		ses.stop()
	}
	s.changed.Broadcast()
	s.mu.Unlock()

	cut := 0 // connections, which nobody may be handed; guarded by mu
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		cut = len(s.sessions)
		for ses := range s.sessions {
			go ses.cut() // to close waits for who uses the descriptor
		}
		s.changed.Broadcast()
	})
	defer stop()

	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.sessions) > 0 && ctx.Err() == nil {
		s.changed.Wait()
	}
	if n := max(cut, len(s.sessions)); n > 0 {
		return fmt.Errorf("%d connections did not end: %w", n, context.Cause(ctx))
	}
	s.bufs.drain()
	return s.flushErr
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// waitForRoom waits until a further client may be served. It returns false
// once the server is closing.
func (s *Server) waitForRoom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waitForRoomLocked()
}

func (s *Server) waitForRoomLocked() bool {
	full := func() bool { return !s.closing && s.MaxClients > 0 && len(s.sessions) >= s.MaxClients }
	if s.MaxClients > 1 && full() { // of one, every client would count
		s.reached(limitClients, "clients", s.MaxClients)
	}
	for full() {
		s.changed.Wait()
	}
	return !s.closing
}

// admit makes conn a session, after waiting for room if wait is set.
func (s *Server) admit(conn net.Conn, wait bool) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || wait && !s.waitForRoomLocked() {
		return nil, ErrServerClosed
	}
	ses := newSession(s, conn)
	s.sessions[ses] = struct{}{}
	return ses, nil
}

// leave forgets a session that has ended.
func (s *Server) leave(ses *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ses)
	s.changed.Broadcast()
}

// flushFailed notes what Shutdown will return.
func (s *Server) flushFailed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushErr = err
}

// enter counts a client of e, unless it has too many.
func (s *Server) enter(e *Export) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.MaxClients > 0 && s.clients[e] >= e.MaxClients {
		return false
	}
	s.clients[e]++
	return true
}

func (s *Server) exit(e *Export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients[e]--; s.clients[e] == 0 {
		delete(s.clients, e)
	}
}

// device returns what connections to d share, until putDevice.
func (s *Server) device(d image.Device) *device {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.devices[d]
	if sh == nil {
		sh = newDevice(d)
		s.devices[d] = sh
	}
	sh.users++
	return sh
}

func (s *Server) putDevice(sh *device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sh.users--; sh.users == 0 {
		delete(s.devices, sh.Device)
	}
}
