package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/pki"
)

// A starter is a server up to STARTTLS: it answers the option with a reply,
// then with what behind writes, and serves TLS with one export.
func starter(t *testing.T, reply OptionReply, behind []byte, config *tls.Config) net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ours.SetDeadline(time.Now().Add(5 * time.Minute))
	theirs.SetDeadline(time.Now().Add(5 * time.Minute))
	done := make(chan struct{})
	t.Cleanup(func() { ours.Close(); <-done; theirs.Close() })
	go func() {
		defer close(done)
		b := binary.BigEndian.AppendUint64(nil, Magic)
		b = binary.BigEndian.AppendUint64(b, MagicOption)
		theirs.Write(append(b, 0, 3))
		var in [4 + 16]byte
		if _, err := io.ReadFull(theirs, in[:]); err != nil {
			return
		}
		if Option(binary.BigEndian.Uint32(in[12:])) != OptStartTLS {
			t.Errorf("the client begins with %x", in)
			return
		}
		theirs.Write(append(optionReply(OptStartTLS, reply), behind...))
		if reply != RepAck {
			b, _ := io.ReadAll(theirs)
			if len(b) != 16 || Option(binary.BigEndian.Uint32(b[8:])) != OptAbort {
				t.Errorf("the client goes on in the clear: %x", b)
			}
			return
		}
		c := tls.Server(theirs, config)
		for {
			var head [16]byte
			if _, err := io.ReadFull(c, head[:]); err != nil {
				return
			}
			io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[12:])))
			opt := Option(binary.BigEndian.Uint32(head[8:]))
			if opt != OptGo {
				c.Write(optionReply(opt, RepErrUnsup))
				continue
			}
			info := optionReply(opt, RepInfo)
			binary.BigEndian.PutUint32(info[16:], 12)
			info = binary.BigEndian.AppendUint16(info, InfoExport)
			info = binary.BigEndian.AppendUint64(info, 4096)
			c.Write(append(binary.BigEndian.AppendUint16(info, 1), optionReply(opt, RepAck)...))
		}
	}()
	return ours
}

func optionReply(opt Option, rep OptionReply) []byte {
	b := binary.BigEndian.AppendUint64(nil, MagicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(rep))
	return binary.BigEndian.AppendUint32(b, 0)
}

func TestStartTLS(t *testing.T) {
	ca, other := pki.New(t), pki.New(t)
	server := func(ca *pki.CA, names ...string) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{ca.Server(nil, names...)}, MinVersion: tls.VersionTLS10}
	}
	old := server(ca, "host")
	old.MaxVersion = tls.VersionTLS11
	for _, test := range []struct {
		name   string
		reply  OptionReply
		behind []byte
		config *tls.Config
		want   string // of the error
	}{
		{"good", RepAck, nil, server(ca, "host"), ""},
		{"refused", RepErrPolicy, nil, nil, ErrNoTLS.Error()},
		{"unknown", RepErrUnsup, nil, nil, ErrNoTLS.Error()},
		{"another CA", RepAck, nil, server(other, "host"), "unknown authority"},
		{"another host", RepAck, nil, server(ca, "elsewhere"), "valid for elsewhere, not host"},
		{"TLS 1.1", RepAck, nil, old, "protocol version"},
		// Replies in the clear behind the acknowledgement are no TLS.
		{"injected", RepAck, bytes.Repeat(optionReply(OptGo, RepAck), 4), server(ca, "host"), "TLS"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := starter(t, test.reply, test.behind, test.config)
			conn, err := StartTLS(t.Context(), conn, &tls.Config{RootCAs: ca.Pool(), ServerName: "host", MinVersion: tls.VersionTLS10})
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("%v, want %q", err, test.want)
				}
				if (test.reply != RepAck) != errors.Is(err, ErrNoTLS) {
					t.Error(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			s, err := Handshake(t.Context(), conn, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if s.Size != 4096 {
				t.Errorf("%+v", s)
			}
			conn.Close()
		})
	}
}
