package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A remote is an export of a server that is to be a device of this machine.
type remote struct {
	uri  nbd.URI
	tls  *tlsOptions // nil: in the clear
	noGo bool
	size int64    // in bytes; 0: as the server says
	at   net.Addr // where the server was found last
}

// findRemote returns what --connect was given in place of an image: the URI of
// an export, or nothing, which means the device's line in nbdtab. It returns
// nil for an image.
func (o *serveOptions) findRemote(u *ui, operands []string) (*remote, error) {
	var r *remote
	switch {
	case o.connect.device == "":
		return nil, nil
	case len(operands) == 0:
		client, err := readNBDTab(u, o.connect.device)
		if err != nil {
			return nil, hinted(err, "to attach an image, or the URI of an export, name it after the device: -c /dev/nbd0 FILE")
		}
		if r, err = client.remote(u, o); err != nil {
			return nil, err
		}
	case remoteURI.MatchString(operands[0]):
		uri, err := nbd.ParseURI(operands[0])
		if err != nil {
			return nil, err
		}
		r = &remote{uri: *uri}
	default:
		for _, only := range []string{"timeout", "swap"} {
			if o.flags.Changed(only) {
				err := fmt.Errorf("--%s is for the exports of servers, and %s is an image", only, operands[0])
				if only == "swap" {
					err = hinted(err, "this process would need memory in order to free it; swap to a raw image as swapon(8) does with any file")
				}
				return nil, err
			}
		}
		return nil, nil
	}
	return r, o.checkRemote()
}

// remoteURI matches what names an export of a server, and no image.
var remoteURI = regexp.MustCompile(`^nbds?(\+\w+)?://`)

// withRemote are the options that mean something for a server's export.
var withRemote = []string{"connect", "read-only", "verbose", "fork", "pid-file", "object", "tls-creds", "tls-hostname",
	"tls-mode", "connections", "block-size", "timeout", "dead-timeout", "max-part", "swap"}

// checkRemote refuses options that are about images or their clients.
func (o *serveOptions) checkRemote() error {
	var err error
	o.flags.VisitAll(func(f *pflag.Flag) {
		plain := f.Name == "format" && o.images.format == "raw" // no other is looked for
		if f.Changed && err == nil && !plain && !slices.Contains(withRemote, f.Name) {
			err = fmt.Errorf("--%s does not go with the export of a server", f.Name)
		}
	})
	return err
}

// secureRemote finds out how TLS is spoken with the server, if it is: by
// options, or else by the parameters of the URI.
func (o *serveOptions) secureRemote(r *remote) error {
	uri := &r.uri
	query := uri.TLSQuery
	switch {
	case uri.User != "" || query.Has("tls-psk-file") || query.Has("tls-type") && query.Get("tls-type") != "x509":
		return errors.New("of the kinds of authentication over TLS, only that by certificates (x509) is supported")
	case query.Has("tls-priority"):
		return errors.New("tls-priority is not supported: TLS 1.2 and 1.3 are spoken, with the ciphers of Go's choice")
	case r.tls != nil: // it is known already
	case o.tls.found != nil:
		r.tls = &o.tls
	case uri.TLS:
		creds, err := uriCreds(query)
		if err != nil {
			return err
		}
		r.tls = &tlsOptions{found: creds, hostname: query.Get("tls-hostname")}
	case len(query) > 0:
		return errors.New("parameters of TLS are for URIs that begin with nbds")
	}
	uri.TLS = r.tls != nil
	return nil
}

// uriCreds are the credentials that a URI asks for. Those of the machine say
// whom to trust if it does not.
func uriCreds(query url.Values) (*tlsCreds, error) {
	c := &tlsCreds{verifyPeer: true}
	switch s := query.Get("tls-verify-peer"); s {
	case "", "true", "1", "yes", "on":
	case "false", "0", "no", "off":
		c.verifyPeer = false
	default:
		return nil, fmt.Errorf("tls-verify-peer=%s is neither true nor false", s)
	}
	if dir := query.Get("tls-certificates"); dir != "" {
		return c, c.load(credsIn(dir, "client"), "client", true)
	}
	return c, nil
}

// dial connects to the server. It is called from one goroutine at a time.
func (r *remote) dial(ctx context.Context) (net.Conn, error) {
	conn, host, err := r.reach(ctx)
	if err != nil || r.tls == nil {
		return conn, err
	}
	secured, err := r.tls.secure(ctx, conn, host)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return secured, nil
}

// reach connects to the server, at the same place as before if it is still
// there: to look up a name may need what is on the device.
func (r *remote) reach(ctx context.Context) (conn net.Conn, host string, err error) {
	d := net.Dialer{
		// A server that is silent for half a minute is gone.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		Control:         limitSilence,
	}
	if r.uri.Network == "unix" {
		conn, err = d.DialContext(ctx, "unix", r.uri.Address)
		if err != nil {
			err = &unreachableError{r.uri.Address, err}
		}
		return conn, "localhost", err
	}
	host, port, err := net.SplitHostPort(r.uri.Address)
	if err != nil {
		return nil, "", err
	}
	if r.uri.Network == "vsock" {
		conn, err = dialVsock(r.uri.Address)
		return conn, host, err
	}
	if r.at != nil {
		if conn, err = d.DialContext(ctx, "tcp", r.at.String()); err == nil {
			return conn, host, nil
		}
	}
	addrs, err := resolve(ctx, host, port)
	if err != nil {
		return nil, "", err
	}
	for _, a := range addrs {
		if conn, err = d.DialContext(ctx, "tcp", a.String()); err == nil {
			r.at = conn.RemoteAddr()
			return conn, host, nil
		}
	}
	return nil, "", &unreachableError{r.uri.Address, err}
}

// An unreachableError says that nobody listens where a server should be.
type unreachableError struct {
	address string
	err     error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("Failed to connect to '%s': %s", e.address, strerror(e.err))
}

func (e *unreachableError) Unwrap() error { return e.err }

// runRemote is the bare command with --connect and a server's export. The
// kernel is the client; this process stays to open connections again, and for
// what the kernel does not speak, TLS and AF_VSOCK, is between the two.
func (s *service) runRemote(r *remote) (err error) {
	defer s.catchSignals()()
	if err := s.opt.secureRemote(r); err != nil {
		return err
	}
	if s.opt.connect.swap {
		const why = " exclude each other: this process would need memory for what is swapped to free it"
		switch {
		case r.tls != nil:
			return hinted(errors.New("--swap and TLS"+why), "use a network that needs no TLS, a VPN of the kernel's for instance")
		case r.uri.Network == "vsock":
			return hinted(errors.New("--swap and AF_VSOCK"+why), "use TCP")
		}
		if err := s.protect(); err != nil {
			return fmt.Errorf("--swap: %w", err)
		}
	} else if err := s.protect(); err != nil {
		s.u.logger(s.opt.verbose).Debug("not protected from a shortage of memory", "err", err)
	}
	if r.uri.Network == "unix" && !strings.HasPrefix(r.uri.Address, "@") {
		if r.uri.Address, err = filepath.Abs(r.uri.Address); err != nil {
			return err
		}
	}
	s.file = r.uri.String()
	pred, err := connect.FindUntended(context.Background(), s.opt.connect.device, s.file)
	if err != nil {
		return err
	}
	if pred != nil && !s.opt.flags.Changed("connections") {
		s.opt.connect.connections = pred.Connections()
	}
	if r.tls != nil || r.uri.Network == "vsock" { // this process is between the kernel and the server
		if err := s.startGuardian(); err != nil {
			return err
		}
		defer s.closeGuardian()
	}
	a, err := s.attach(pred, connect.Options{
		Export: r.uri.Export,
		NoGo:   r.noGo,
		Server: s.file,
		Dial:   r.dial,
		Size:   r.size,
	})
	if err != nil && pred != nil {
		err = errors.Join(err, pred.Close())
	}
	if refused, ok := errors.AsType[*nbd.OptionError](err); ok && refused.Reply == nbd.RepErrTLSReqd {
		return hinted(err, "begin the URI with nbds, or name credentials with --tls-creds")
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var tended error
	over := make(chan struct{})
	s.over = over
	go func() {
		defer close(over)
		tended = a.Tend(ctx)
	}()
	err = s.serveDevice(a, pred != nil)
	cancel()
	<-over
	if gone, ok := errors.AsType[*departed](err); ok {
		return gone.err
	}
	if errors.Is(tended, context.Canceled) {
		tended = nil
	}
	return errors.Join(err, tended, a.Close(), s.awaitDetacher())
}
