package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// listTime bounds the conversation with the server that is listed.
const listTime = 30 * time.Second

// flagWords are the transmission flags in qemu-nbd's words, in its order.
var flagWords = []struct {
	flag nbd.TransmissionFlags
	word string
}{
	{nbd.FlagReadOnly, "readonly"},
	{nbd.FlagSendFlush, "flush"},
	{nbd.FlagSendFUA, "fua"},
	{nbd.FlagRotational, "rotational"},
	{nbd.FlagSendTrim, "trim"},
	{nbd.FlagSendWriteZeroes, "zeroes"},
	{nbd.FlagSendDF, "df"},
	{nbd.FlagCanMultiConn, "multi"},
	{nbd.FlagSendResize, "resize"},
	{nbd.FlagSendCache, "cache"},
	{nbd.FlagSendFastZero, "fast-zero"},
	{nbd.FlagBlockStatusPayload, "block-status-payload"},
}

// listExports prints what a server exports.
func (o *serveOptions) listExports(u *ui) error {
	ctx, cancel := context.WithTimeout(context.Background(), listTime)
	defer cancel()
	conn, err := o.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if o.tls.found != nil {
		host := o.bind
		if o.socket != "" || !o.flags.Changed("bind") {
			host = "localhost"
		}
		if conn, err = o.tls.secure(ctx, conn, host); err != nil {
			return err
		}
	}
	l, err := nbd.List(ctx, conn)
	refused, _ := errors.AsType[*nbd.OptionError](err)
	switch {
	case errors.Is(err, nbd.ErrNoList):
		return says("Server does not support export lists")
	case refused != nil && refused.Reply == nbd.RepErrTLSReqd:
		text := fmt.Sprintf("TLS negotiation required before option %d (%s)\nDid you forget a valid tls-creds?", refused.Option, refused.Option)
		if refused.Message != "" {
			text += "\nserver reported: " + printable(refused.Message)
		}
		return says("%s", text)
	case err != nil:
		return err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "exports available: %d\n", len(l.Exports))
	for _, e := range l.Exports {
		writeListed(&b, &e, l.Protocol == nbd.Extended)
		if e.Err != nil {
			u.warning(fmt.Sprintf("export '%s': %v", printable(e.Name), e.Err))
		}
	}
	u.printf("%s", b.String())
	return nil
}

func writeListed(b *strings.Builder, e *nbd.Listed, extended bool) {
	fmt.Fprintf(b, " export: '%s'\n", printable(e.Name))
	if e.Description != "" {
		fmt.Fprintf(b, "  description: %s\n", printable(e.Description))
	}
	if e.Flags&nbd.FlagHasFlags == 0 {
		return // the server would not describe it
	}
	fmt.Fprintf(b, "  size:  %d\n  flags: 0x%x (", e.Size, uint16(e.Flags))
	for _, f := range flagWords {
		if e.Flags&f.flag != 0 {
			b.WriteString(" " + f.word)
		}
	}
	b.WriteString(" )\n")
	if e.Sized {
		fmt.Fprintf(b, "  min block: %d\n  opt block: %d\n  max block: %d\n", e.BlockSize.Min, e.BlockSize.Preferred, e.BlockSize.Max)
	}
	if extended {
		b.WriteString("  transaction size: 64-bit\n")
	}
	if len(e.Contexts) > 0 {
		fmt.Fprintf(b, "  available meta contexts: %d\n", len(e.Contexts))
		for _, c := range e.Contexts {
			fmt.Fprintf(b, "   %s\n", printable(c))
		}
	}
}

// dial connects to the server that the options name.
func (o *serveOptions) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	if o.socket != "" {
		conn, err := d.DialContext(ctx, "unix", o.socket)
		if err != nil {
			return nil, says("Failed to connect to '%s': %s", o.socket, strerror(err))
		}
		return conn, nil
	}
	addrs, err := resolve(ctx, o.bind, o.port)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		var conn net.Conn
		if conn, err = d.DialContext(ctx, "tcp", a.String()); err == nil {
			return conn, nil
		}
	}
	return nil, says("Failed to connect to '%s:%s': %s", o.bind, o.port, strerror(err))
}
