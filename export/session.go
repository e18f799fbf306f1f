package export

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A session is one connection, from accepting to closing. Its methods are
// called by one goroutine at a time, but for stop, cut, perform and flushed.
type session struct {
	srv     *Server
	client  *Client
	conn    net.Conn        // as it was accepted
	channel net.Conn        // what is talked over: conn, or TLS over it
	ctx     context.Context // ends with the connection
	cancel  context.CancelFunc

	stopping atomic.Bool // by Shutdown
	handing  atomic.Bool // by HandOver
	late     atomic.Bool // the handshake took too long

	resumed *agreement // made elsewhere; nil: the handshake is here

	*agreement // nil until the handshake has ended
	dev        *device
	out        sender
	line       line
	loan       loan
	asking     asker
}

func newSession(s *Server, conn net.Conn) *session {
	ctx, cancel := context.WithCancel(context.Background())
	return &session{srv: s, client: &Client{Addr: conn.RemoteAddr(), Cred: peerCredentials(conn)}, conn: conn, channel: conn, ctx: ctx, cancel: cancel}
}

// stop makes the session end once what it has accepted is done.
func (s *session) stop() {
	s.stopping.Store(true)
	if s.conn.SetReadDeadline(time.Unix(1, 0)) != nil {
		s.cut() // a stream that knows no deadlines has no gentler end
	}
}

// cut ends the connection.
func (s *session) cut() {
	s.cancel()
	s.conn.Close()
}

// run has the connection served, and then called with what ended it. It returns
// after the handshake, and another goroutine serves: to wait for requests, as
// most connections do, it needs half of the stack that the handshake leaves.
func (s *session) run(then func(error)) {
	s.state(StateNew)
	if err := s.begin(); s.agreement == nil {
		then(s.ended(err))
		return
	}
	go func() { then(s.ended(s.serve())) }()
}

// ended ends the session after begin or serve.
func (s *session) ended(err error) error {
	handed := errors.Is(err, errHanded)
	if handed {
		s.cancel() // the connection goes on
	} else {
		if err == nil {
			s.part()
		}
		s.cut()
	}
	switch {
	case handed:
		err = ErrServerClosed
	case s.late.Load():
		s.srv.reached(limitHandshake, "client", s.client.Addr)
		err = fmt.Errorf("handshake took longer than %v", s.srv.Limits.Handshake)
	case s.stopping.Load() && errors.Is(err, os.ErrDeadlineExceeded):
		err = ErrServerClosed
	}
	if err != nil && !handed {
		s.srv.Log.Info("connection ended", "client", s.client.Addr, "err", err)
	}
	s.state(StateClosed)
	s.srv.leave(s)
	return err
}

// partingTime is how long a client over AF_VSOCK may take to leave after it has
// said so.
const partingTime = time.Second

// part lets a client over AF_VSOCK, which leaves in good order, be the first to
// close. Should it shut its side down when all is closed here, what it reads next
// is no end of the stream, but ENOTCONN.
func (s *session) part() {
	c, ok := s.conn.(interface{ CloseWrite() error })
	addr := s.client.Addr // nil if the connection knows none
	if !ok || addr == nil || addr.Network() != "vsock" || c.CloseWrite() != nil {
		return
	}
	if s.conn.SetReadDeadline(time.Now().Add(partingTime)) == nil && !s.stopping.Load() {
		_, _ = io.Copy(io.Discard, s.conn) // the client may be gone
	}
}

func (s *session) state(st State) {
	if s.srv.ConnState != nil {
		s.srv.ConnState(s.client, st)
	}
}

// begin comes to an agreement with the client; to none if that has left.
func (s *session) begin() error {
	if c, ok := s.conn.(*net.TCPConn); ok {
		// For speed and for dead peers; neither is worth refusing a client.
		_ = c.SetNoDelay(true)
		_ = c.SetKeepAlive(true)
	}
	agreed, err := s.resumed, error(nil)
	if agreed == nil {
		agreed, err = s.handshake()
	}
	if agreed == nil {
		return err
	}
	s.agreement = agreed
	s.dev = s.srv.device(agreed.export.Device)
	s.srv.Log.Debug("client agreed", "client", s.client.Addr, "export", agreed.name,
		"flags", agreed.flags, "structured", agreed.structured, "extended", agreed.extended)
	s.state(StateActive)
	return nil
}

// serve serves what begin has agreed on.
func (s *session) serve() error {
	defer s.release(s.export)
	defer s.srv.exit(s.export)
	defer s.srv.putDevice(s.dev)
	err := s.transmit(newTransport(s.channel))
	s.endTLS()
	return err
}

// handshake returns what was agreed on; nil if the client left without.
func (s *session) handshake() (*agreement, error) {
	if limit := s.srv.Limits.Handshake; limit > 0 {
		timer := time.AfterFunc(limit, func() {
			s.late.Store(true)
			s.cut()
		})
		defer timer.Stop()
	}
	if err := s.authorize(); err != nil {
		return nil, err
	}
	tls := s.srv.tlsAtStart()
	if s.srv.tls != nil && s.srv.TLSMode == TLSDirect {
		if err := s.startTLS(s.ctx); err != nil {
			return nil, err
		}
		tls = tlsDone
	}
	hello := binary.BigEndian.AppendUint64(nil, nbd.Magic)
	hello = binary.BigEndian.AppendUint64(hello, nbd.MagicOption)
	hello = binary.BigEndian.AppendUint16(hello, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
	if _, err := s.channel.Write(hello); err != nil {
		return nil, err
	}
	var flags [4]byte
	if _, err := io.ReadFull(s.channel, flags[:]); err != nil {
		if err == io.EOF {
			return nil, nil // someone looked whether the port is open
		}
		return nil, err
	}
	n, err := negotiate(s, binary.BigEndian.Uint32(flags[:]), tls)
	if err != nil {
		return nil, err
	}
	defer func() { n.close() }()
	for range maxOptions {
		o, err := s.readOption()
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		answer, next := n.handle(o)
		s.forgetOption(o)
		_, err = s.channel.Write(answer)
		if next == transmit {
			if err != nil {
				s.srv.exit(n.agreed.export)
				s.release(n.agreed.export)
				return nil, err
			}
			return n.agreed, nil
		}
		if next == upgrade && err == nil {
			n.close()
			if err := s.startTLS(s.ctx); err != nil {
				return nil, err
			}
			// Of what was said in the clear only the greeting is kept.
			n = n.afterTLS()
			continue
		}
		if next == hangup {
			return nil, nil // who leaves need not wait for the answer
		}
		if err != nil {
			return nil, err
		}
	}
	s.srv.reached(limitOption, "client", s.client.Addr)
	return nil, fmt.Errorf("client has asked for %d options and agreed on nothing", maxOptions)
}

// freeOption is how long an option may be without being counted as memory of
// the server's, in bytes. None of a well-meaning client is longer.
const freeOption = 8 << 10

// readOption reads one option and not a byte more.
func (s *session) readOption() (option, error) {
	var head [16]byte
	r := s.channel
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return option{}, err
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != nbd.MagicOption {
		return option{}, fmt.Errorf("bad option magic %#x", magic)
	}
	o := option{id: nbd.Option(binary.BigEndian.Uint32(head[8:]))}
	size := binary.BigEndian.Uint32(head[12:])
	if size > maxOption {
		s.srv.reached(limitOption, "client", s.client.Addr, "bytes", size)
		return option{}, fmt.Errorf("option %v has %d bytes, the limit is %d", o.id, size, maxOption)
	}
	if size > freeOption && !s.srv.memory.tryHold(int64(size)) {
		s.srv.reached(limitOption, "client", s.client.Addr, "bytes", size)
		return option{}, fmt.Errorf("option %v has %d bytes, for which there is no memory", o.id, size)
	}
	o.data = make([]byte, size)
	if _, err := io.ReadFull(r, o.data); err != nil {
		s.forgetOption(o)
		return option{}, fmt.Errorf("option %v ends early: %w", o.id, err)
	}
	return o, nil
}

// forgetOption gives back what readOption has taken.
func (s *session) forgetOption(o option) {
	if n := len(o.data); n > freeOption {
		s.srv.memory.give(int64(n))
	}
}

// The session is the exporter of its negotiation.

var errNoList = errors.New("listing is off")

func (s *session) list() ([]Info, error) {
	if s.srv.List == nil {
		return nil, errNoList
	}
	infos, err := s.srv.List(s.ctx, s.client)
	if err != nil {
		s.srv.Log.Warn("cannot list the exports", "client", s.client.Addr, "err", err)
	}
	return infos, err
}

func (s *session) open(name string) (*Export, error) {
	e, err := s.srv.Open(s.ctx, s.client, name)
	if err != nil {
		level := slog.LevelWarn
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			level = slog.LevelInfo // the client's mistake, not ours
		}
		s.srv.Log.Log(s.ctx, level, "cannot open the export", "client", s.client.Addr, "export", name, "err", err)
	}
	return e, err
}

func (s *session) release(e *Export) {
	if e.Release != nil {
		e.Release()
	}
}

func (s *session) enter(e *Export) bool { return s.srv.enter(e) }
