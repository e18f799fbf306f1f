package export

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/pki"
)

// A secured server has one disk and asks clients for certificates.
type secured struct {
	*server
	ca     *pki.CA
	client *tls.Config // of a client that is let in
}

func serveTLS(t *testing.T, set func(*Server)) *secured {
	ca := pki.New(t)
	cert := ca.Server(nil, "localhost")
	s := &secured{ca: ca}
	s.server = serve(t, map[string]*Export{"disk": {Name: "disk", Device: memDisk(t, 1<<20)}}, func(srv *Server) {
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(), MinVersion: tls.VersionTLS10}
		if set != nil {
			set(srv)
		}
	})
	s.client = &tls.Config{
		RootCAs: ca.Pool(), ServerName: "localhost",
		Certificates: []tls.Certificate{ca.Client(nil, pkix.Name{CommonName: "client"})},
	}
	return s
}

// startTLS changes p over. What goes wrong may show in the first bytes only:
// with TLS 1.3 a client does not wait for the server's verdict.
func (p *peer) startTLS(c *tls.Config) error {
	p.t.Helper()
	if replies := p.option(nbd.OptStartTLS, nil); len(replies) > 0 {
		p.t.Fatalf("STARTTLS has replies: %q", replies)
	}
	return p.overTLS(c)
}

func (p *peer) overTLS(c *tls.Config) error {
	conn := tls.Client(p.conn, c)
	p.conn = conn
	return conn.Handshake()
}

// ask sends an option and returns the type of the first reply.
func (p *peer) ask(id nbd.Option, data []byte) (nbd.OptionReply, error) {
	b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
	if _, err := p.conn.Write(b); err != nil {
		return 0, err
	}
	var h [20]byte
	if _, err := io.ReadFull(p.conn, h[:]); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(p.conn, make([]byte, binary.BigEndian.Uint32(h[16:])))
	return nbd.OptionReply(binary.BigEndian.Uint32(h[12:])), err
}

// agree is GO for the disk.
func (p *peer) agree(style style) {
	p.t.Helper()
	p.style = style
	switch style {
	case structured:
		p.option(nbd.OptStructuredReply, nil)
	case extended:
		p.option(nbd.OptExtendedHeaders, nil)
	}
	p.option(nbd.OptGo, optionData(p.t, nbd.OptGo, []string{"disk"}))
}

// TestTLSData: data arrives whole over TLS, however it is read.
func TestTLSData(t *testing.T) {
	s := serveTLS(t, nil)
	direct := serveTLS(t, func(s *Server) { s.TLSMode = TLSDirect })
	for _, mode := range []string{"starttls", "direct"} {
		each(t, func(t *testing.T, network string, style style) {
			var p *peer
			if mode == "direct" {
				p = direct.dial(network)
				p.t = t
				if err := p.overTLS(direct.client); err != nil {
					t.Fatal(err)
				}
				p.greet()
			} else {
				p = s.dial(network)
				p.t = t
				p.greet()
				if err := p.startTLS(s.client); err != nil {
					t.Fatal(err)
				}
			}
			p.agree(style)
			for _, n := range []int{1, 512, 4096, 70000, 1 << 20} {
				want := pattern(uint64(n), n)
				p.ok(nbd.CmdWrite, 0, 0, uint64(n), want)
				p.ok(nbd.CmdFlush, 0, 0, 0, nil)
				same(t, fmt.Sprint(n), p.ok(nbd.CmdRead, 0, 0, uint64(n), nil), want)
			}
			// Many at once, answered in any order.
			var reads []byte
			for i := range 64 {
				reads = append(reads, p.header(nbd.CmdRead, 0, uint64(i), uint64(i)*4096, 4096)...)
			}
			sent := make(chan error, 1)
			go func() { // a pipe holds nothing
				_, err := p.conn.Write(reads)
				sent <- err
			}()
			for range 64 {
				for !p.chunk(4096).done {
				}
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			p.write(p.header(nbd.CmdDisc, 0, 0, 0, 0))
			// The end is told in TLS's own words.
			if _, err := p.conn.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the end: %v", err)
			}
		})
	}
}

// TestTLSLastRequests: what a client has asked for before it said goodbye is done
// and answered, also where that arrives with the last bytes.
func TestTLSLastRequests(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, n := range []int{512, 100 << 10} {
			t.Run(fmt.Sprint(tls.VersionName(version), " ", n), func(t *testing.T) {
				dev := &hooked{Device: memDisk(t, 1<<20)}
				entered, goOn := make(chan struct{}), make(chan struct{})
				dev.writeAt = func(p []byte, off int64, flags image.WriteFlags) error {
					if off == 0 {
						close(entered)
						<-goOn
					}
					return dev.Device.WriteAt(p, off, flags)
				}
				s := serveTLS(t, func(s *Server) {
					s.Open = func(context.Context, *Client, string) (*Export, error) { return &Export{Device: dev}, nil }
				})
				c := s.client.Clone()
				c.MinVersion, c.MaxVersion = version, version
				p := s.dial("tcp")
				p.greet()
				if err := p.startTLS(c); err != nil {
					t.Fatal(err)
				}
				p.agree(simple)
				// While the line is in the first, all others arrive.
				p.write(append(p.header(nbd.CmdWrite, 0, 1, 0, 512), make([]byte, 512)...))
				<-entered
				p.write(append(p.header(nbd.CmdWrite, 0, 2, 4096, uint64(n)), pattern(4096, n)...))
				if err := p.conn.(*tls.Conn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
				close(goOn)
				for cookie := range uint64(2) {
					if c := p.chunk(0); c.cookie != cookie+1 || c.errno != 0 {
						t.Errorf("%+v", c)
					}
				}
			})
		}
	}
}

// TestTLSRefuses: who has not what it takes never gets as far as an answer.
func TestTLSRefuses(t *testing.T) {
	s := serveTLS(t, func(s *Server) {
		s.Authorize = func(_ context.Context, c *Client) error {
			if c.TLS != nil && c.TLS.PeerCertificates[0].Subject.CommonName == "stranger" {
				return errors.New("not on the list")
			}
			return nil
		}
		open := s.Open
		s.Open = func(ctx context.Context, c *Client, name string) (*Export, error) {
			if c.TLS == nil || len(c.TLS.VerifiedChains) == 0 {
				t.Error("opened for a client that is not known")
			}
			return open(ctx, c, name)
		}
	})
	stranger := pki.New(t)
	with := func(cert ...tls.Certificate) *tls.Config {
		c := s.client.Clone()
		c.Certificates = cert
		return c
	}
	old := s.client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	for name, c := range map[string]*tls.Config{
		"no certificate":          with(),
		"another CA":              with(stranger.Client(nil, pkix.Name{CommonName: "client"})),
		"expired":                 with(s.ca.Client(pki.Expired, pkix.Name{CommonName: "client"})),
		"server certificate":      with(s.ca.Server(nil, "localhost")),
		"signed by no CA of ours": with(forged(t, s)),
		"TLS 1.1":                 old,
		"not on the list":         with(s.ca.Client(nil, pkix.Name{CommonName: "stranger"})),
		"not yet good":            with(s.ca.Client(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, pkix.Name{CommonName: "client"})),
	} {
		t.Run(name, func(t *testing.T) {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				c := c.Clone()
				if c.MaxVersion == 0 {
					c.MaxVersion = version
				}
				p := s.dial("tcp")
				p.t = t
				p.greet()
				err := p.startTLS(c)
				if err == nil {
					_, err = p.ask(nbd.OptList, nil)
				}
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("version %#x: %v", version, err)
				}
			}
		})
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		p := s.dial("tcp")
		p.greet()
		c := s.client.Clone()
		c.MaxVersion = version
		if err := p.startTLS(c); err != nil {
			t.Fatal(err)
		}
		p.agree(simple)
	}
}

// forged returns a certificate that a client signed.
func forged(t *testing.T, s *secured) tls.Certificate {
	mallory := pki.New(t)
	cert := mallory.Client(nil, pkix.Name{CommonName: "client"})
	cert.Certificate = append(cert.Certificate, s.client.Certificates[0].Certificate[0])
	return cert
}

// TestNoDowngrade: nothing but STARTTLS is done in the clear where TLS is
// required, and nothing at all where it comes first.
func TestNoDowngrade(t *testing.T) {
	s := serveTLS(t, func(s *Server) {
		s.Open = func(context.Context, *Client, string) (*Export, error) {
			t.Error("opened in the clear")
			return nil, errors.New("no")
		}
		s.List = func(context.Context, *Client) ([]Info, error) {
			t.Error("listed in the clear")
			return nil, errors.New("no")
		}
	})
	p := s.dial("tcp")
	p.greet()
	for _, o := range []nbd.Option{nbd.OptList, nbd.OptInfo, nbd.OptGo, nbd.OptStructuredReply, nbd.OptExtendedHeaders,
		nbd.OptListMetaContext, nbd.OptSetMetaContext, nbd.OptPeekExport, 119} {
		if typ, err := p.ask(o, optionData(t, nbd.OptGo, []string{"disk"})); typ != nbd.RepErrTLSReqd || err != nil {
			t.Errorf("%v: %#x, %v", o, typ, err)
		}
	}
	if _, err := p.ask(nbd.OptExportName, []byte("disk")); err == nil {
		t.Error("EXPORT_NAME is answered")
	}

	direct := serveTLS(t, func(s *Server) { s.TLSMode = TLSDirect })
	p = direct.dial("tcp")
	p.write([]byte{0, 0, 0, 3})
	p.write(make([]byte, 64))
	b, err := io.ReadAll(p.conn)
	if errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 7 {
		t.Errorf("%q, %v", b, err) // an alert at most
	}
}

// TestInjection: what was said in the clear, before STARTTLS or behind it,
// has no effect on what follows.
// CVE-2021-3716: https://bugzilla.redhat.com/show_bug.cgi?id=1994695
func TestInjection(t *testing.T) {
	s := serveTLS(t, func(s *Server) { s.TLSMode = TLSOffered })
	p := s.dial("tcp")
	p.greet()
	p.option(nbd.OptExtendedHeaders, nil)
	p.option(nbd.OptSetMetaContext, optionData(t, nbd.OptSetMetaContext, []string{"disk", "base:allocation"}))
	if err := p.startTLS(s.client); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ask(nbd.OptSetMetaContext, optionData(t, nbd.OptSetMetaContext, []string{"disk", "base:allocation"})); err != nil {
		t.Fatal(err)
	}
	p.agree(simple)
	p.ok(nbd.CmdRead, 0, 0, 512, nil) // a chunk would be told from it

	// An option that comes together with STARTTLS is taken for TLS, and is none.
	p = s.dial("tcp")
	p.greet()
	b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
	b = append(b, 0, 0, 0, byte(nbd.OptStartTLS), 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint64(b, nbd.MagicOption)
	b = append(b, 0, 0, 0, byte(nbd.OptStructuredReply), 0, 0, 0, 0)
	p.write(b)
	p.read(20)
	if err := p.overTLS(s.client); err == nil {
		t.Error("bytes in front of the handshake are swallowed")
	}
}

// No session is resumed: each connection shows its certificate.
func TestNoResumption(t *testing.T) {
	s := serveTLS(t, nil)
	c := s.client.Clone()
	c.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	for range 3 {
		p := s.dial("unix")
		p.greet()
		if err := p.startTLS(c); err != nil {
			t.Fatal(err)
		}
		p.agree(structured) // tickets come with what follows
		if p.conn.(*tls.Conn).ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
	}
}

// TestTLSDeadline: who begins TLS and goes on no further is cut off.
func TestTLSDeadline(t *testing.T) {
	for _, mode := range []TLSMode{TLSRequired, TLSDirect} {
		begun := false
		for limit := 50 * time.Millisecond; !begun; limit *= 2 { // until a busy machine is in time
			s := serveTLS(t, func(s *Server) {
				s.TLSMode = mode
				s.Limits.Handshake = limit
			})
			p := s.dial("tcp")
			begun = p.beginTLS(mode) == nil
			if drain(p) != nil {
				t.Errorf("mode %d: still there", mode)
			}
		}
	}
}

// beginTLS sends the beginning of a record, and fails where the connection has ended.
func (p *peer) beginTLS(mode TLSMode) error {
	if mode == TLSRequired {
		if _, err := io.ReadFull(p.conn, make([]byte, 18)); err != nil {
			return err
		}
		if _, err := p.conn.Write([]byte{0, 0, 0, 3}); err != nil {
			return err
		}
		if _, err := p.ask(nbd.OptStartTLS, nil); err != nil {
			return err
		}
	}
	_, err := p.conn.Write([]byte{22, 3, 1, 1, 0})
	return err
}

// TestTLSSlowReader: a client that sends requests and reads nothing costs its
// connection bounded memory, and does not keep the server from ending.
func TestTLSSlowReader(t *testing.T) {
	s := serveTLS(t, nil)
	p := s.dial("tcp")
	p.greet()
	if err := p.startTLS(s.client); err != nil {
		t.Fatal(err)
	}
	p.agree(structured)
	p.conn.SetDeadline(time.Now().Add(200 * time.Millisecond)) // until the socket is full
	for i := range 10000 {
		if _, err := p.conn.Write(p.header(nbd.CmdRead, 0, uint64(i), 0, 1<<20)); err != nil {
			break
		}
	}
	other := s.dial("tcp")
	other.greet()
	if err := other.startTLS(s.client); err != nil {
		t.Fatal(err)
	}
	other.agree(simple)
	other.ok(nbd.CmdRead, 0, 0, 4096, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); err == nil {
		t.Log("all connections had ended")
	}
}

// TestShutdownTLS: idle clients are let go in good order.
func TestShutdownTLS(t *testing.T) {
	s := serveTLS(t, nil)
	p := s.dial("tcp")
	p.greet()
	if err := p.startTLS(s.client); err != nil {
		t.Fatal(err)
	}
	p.agree(simple)
	s.shutdown()
	if _, err := p.conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the end: %v", err)
	}
}

// TestCredentials: the peer of a Unix socket is known before it says anything.
func TestCredentials(t *testing.T) {
	seen := make(chan *Client, 1)
	s := serve(t, nil, func(s *Server) {
		s.Authorize = func(_ context.Context, c *Client) error {
			seen <- c
			return errors.New("nobody")
		}
	})
	for _, network := range []string{"unix", "tcp"} {
		conn, err := net.Dial(network, s.addr[network].String())
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		if b, err := io.ReadAll(conn); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %q, %v", network, b, err)
		}
		conn.Close()
		c := <-seen
		if network == "tcp" {
			if c.Cred != nil || c.Addr == nil {
				t.Errorf("%+v", c)
			}
			continue
		}
		if c.Cred != nil && (c.Cred.PID != os.Getpid() || int(c.Cred.UID) != os.Geteuid() || int(c.Cred.GID) != os.Getegid()) {
			t.Errorf("%+v", c.Cred)
		}
	}
}
