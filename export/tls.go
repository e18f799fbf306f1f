package export

import (
	"context"
	"crypto/tls"
	"fmt"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A TLSMode says what Server.TLS means to clients.
type TLSMode int

const (
	// TLSRequired refuses everything but STARTTLS and ABORT in the clear.
	TLSRequired TLSMode = iota
	// TLSOffered leaves it to the client, and to whoever is between it and
	// the server: nothing is told from a client that wanted no TLS.
	TLSOffered
	// TLSDirect expects TLS from the first byte on, before NBD's greeting.
	TLSDirect
)

// A tlsState is what a negotiation answers to STARTTLS.
type tlsState int

const (
	tlsNone    tlsState = iota // not configured
	tlsOffered                 // may begin
	tlsAwaited                 // has to begin before anything else
	tlsDone
)

// tlsAtStart returns the state of a negotiation in the clear.
func (s *Server) tlsAtStart() tlsState {
	switch {
	case s.tls == nil:
		return tlsNone
	case s.TLSMode == TLSOffered:
		return tlsOffered
	}
	return tlsAwaited // TLSDirect never gets here
}

// tlsConfig returns c with what is not left to choice.
func tlsConfig(c *tls.Config) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	c.MinVersion = max(c.MinVersion, tls.VersionTLS12)
	// A ticket would let a client return without its certificate being looked
	// at again, to save what matters little here.
	c.SessionTicketsDisabled = true
	// Replies are long; small records would only serve whoever renders them.
	c.DynamicRecordSizingDisabled = true
	return c
}

// startTLS answers STARTTLS.
func (n *negotiation) startTLS(r *replies, data []byte) step {
	if !r.empty(data) {
		return stay
	}
	switch n.tls {
	case tlsNone:
		r.refuse(nbd.RepErrPolicy, "TLS not configured")
	case tlsDone:
		r.refuse(nbd.RepErrInvalid, "TLS already enabled")
	default:
		r.ack()
		return upgrade
	}
	return stay
}

// afterTLS returns the negotiation that begins when n has led to TLS.
func (n *negotiation) afterTLS() *negotiation {
	return &negotiation{exporter: n.exporter, tls: tlsDone, fixed: n.fixed, noZeroes: n.noZeroes}
}

// startTLS makes the connection one over TLS. Whatever the client has sent
// after the option is taken for the beginning of TLS, since nothing is read
// ahead. The time that it takes is part of the handshake's.
func (s *session) startTLS(ctx context.Context) error {
	conn := tls.Server(s.conn, s.srv.tls)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	s.channel = conn
	state := conn.ConnectionState()
	s.client.TLS = &state
	return s.authorize()
}

// authorize asks whether the client may go on.
func (s *session) authorize() error {
	if s.srv.Authorize == nil {
		return nil
	}
	if err := s.srv.Authorize(s.ctx, s.client); err != nil {
		s.srv.reached(limitRefused, "client", s.client.Addr, "err", err)
		return fmt.Errorf("client refused: %w", err)
	}
	return nil
}

// endTLS tells the client that the stream was not cut short by a stranger.
// crypto/tls bounds how long it waits for a client that reads nothing.
func (s *session) endTLS() {
	if c, ok := s.channel.(*tls.Conn); ok {
		_ = c.CloseWrite() // the client may be gone
	}
}
