package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
)

// ErrNoTLS is wrapped by the error of StartTLS with a server that refuses.
// Nothing was asked of it in the clear.
var ErrNoTLS = errors.New("server does not support TLS")

// StartTLS makes a connection to a server one over TLS, by option STARTTLS.
// What it returns takes conn's place and is for Handshake, List or Connect,
// which go on with it where StartTLS has ended. TLS is 1.2 or newer, whatever
// config allows. On an error, or when ctx ends first, conn is of no further
// use; closing it is the caller's.
//
// Nothing is agreed on before TLS and not a byte is read ahead, so that what a
// stranger put in between in the clear has no effect.
func StartTLS(ctx context.Context, conn net.Conn, config *tls.Config) (net.Conn, error) {
	var c *tlsConn
	err := bounded(ctx, conn, func() error {
		h := &handshake{conn: conn, protocol: Simple}
		old, err := h.greet()
		if err != nil {
			return err
		}
		if old != nil || !h.fixed {
			return ErrNoTLS
		}
		if err := h.simpleOption(OptStartTLS); isOptionError(err) {
			return h.abort(fmt.Errorf("%w: %w", ErrNoTLS, err))
		} else if err != nil {
			return err
		}
		config := config.Clone()
		config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
		c = &tlsConn{tls.Client(conn, config), h.noZeroes}
		if err := c.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// A tlsConn is a connection after STARTTLS. The greeting, which came before,
// does not come again.
type tlsConn struct {
	*tls.Conn
	noZeroes bool
}
