package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// A URI says where an export is, as in doc/uri.md of the NBD project: nbd://,
// nbd+unix:// and nbd+vsock://, or the same beginning with nbds for TLS.
type URI struct {
	TLS      bool
	Network  string // tcp, unix or vsock
	Address  string // host:port; path of the socket, "@" first if abstract; CID:port
	User     string // for some kinds of TLS authentication
	Export   string
	TLSQuery url.Values // the parameters tls-*, which say how to authenticate
}

// vsockHost is the context id that reaches the host from its guest.
const vsockHost = "2"

var tlsParameters = []string{"tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file", "tls-priority"}

// ParseURI parses an NBD URI. A parameter that is not known is an error, since
// what it asks for would not be done, unless it begins with x-.
func ParseURI(s string) (*URI, error) {
	bad := func(format string, a ...any) (*URI, error) {
		return nil, fmt.Errorf("URI %q: %w", s, fmt.Errorf(format, a...))
	}
	p, err := url.Parse(s)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return bad("%w", err)
	}
	u := &URI{}
	scheme, ok := strings.CutPrefix(p.Scheme, "nbd")
	if ok {
		scheme, u.TLS = strings.CutPrefix(scheme, "s")
	}
	switch {
	case ok && scheme == "":
		u.Network = "tcp"
	case ok && scheme == "+unix":
		u.Network = "unix"
	case ok && scheme == "+vsock":
		u.Network = "vsock"
	default:
		return bad("scheme %q is none of nbd, nbds, nbd+unix, nbds+unix, nbd+vsock, nbds+vsock", p.Scheme)
	}
	if p.Opaque != "" {
		return bad("no // after the scheme")
	}
	if p.Fragment != "" {
		return bad("fragment %q (a # in a name is written %%23)", p.Fragment)
	}
	if p.User != nil {
		if _, set := p.User.Password(); set {
			return bad("password")
		}
		u.User = p.User.Username()
	}
	u.Export = strings.TrimPrefix(p.Path, "/")
	if len(u.Export) > MaxString || strings.ContainsRune(u.Export, 0) {
		return bad("export name of %d bytes is too long or holds a NUL", len(u.Export))
	}
	query, err := url.ParseQuery(p.RawQuery)
	if err != nil {
		return bad("%w", err)
	}
	var socket string
	for key, values := range query {
		switch {
		case len(values) > 1:
			return bad("parameter %q given twice", key)
		case key == "socket" && u.Network == "unix":
			socket = values[0]
		case slices.Contains(tlsParameters, key):
			if u.TLSQuery == nil {
				u.TLSQuery = url.Values{}
			}
			u.TLSQuery.Set(key, values[0])
		case strings.HasPrefix(key, "x-"):
		default:
			return bad("parameter %q", key)
		}
	}
	if u.Address, err = address(u.Network, p, socket); err != nil {
		return bad("%w", err)
	}
	return u, nil
}

func address(network string, p *url.URL, socket string) (string, error) {
	if network == "unix" {
		if p.Host != "" {
			return "", fmt.Errorf("host %q of a Unix socket (the path follows ///?socket=)", p.Host)
		}
		if abstract, ok := strings.CutPrefix(socket, "\x00"); ok {
			socket = "@" + abstract
		} else if strings.HasPrefix(socket, "@") {
			socket = "./" + socket // a file, which package net would take for an abstract one
		}
		if socket == "" || strings.ContainsRune(socket, 0) {
			return "", errors.New("no parameter socket with a path")
		}
		return socket, nil
	}
	host, port := p.Hostname(), p.Port()
	if port == "" {
		port = strconv.Itoa(DefaultPort)
	}
	bits := 16
	if network == "vsock" {
		bits = 32
		if host == "" {
			host = vsockHost
		}
		if _, err := strconv.ParseUint(host, 10, 32); err != nil {
			return "", fmt.Errorf("context id %q is no number of 32 bits", host)
		}
	}
	if strings.Contains(host, ":") {
		ip, err := netip.ParseAddr(host)
		if err != nil {
			return "", fmt.Errorf("host %q has a colon but is no IPv6 address", host)
		}
		// RFC 6874 would have it escaped, which net/url does not read back.
		if strings.ContainsFunc(ip.Zone(), func(r rune) bool { return r > unicode.MaxASCII }) {
			return "", fmt.Errorf("zone %q is not ASCII", ip.Zone())
		}
	}
	if _, err := strconv.ParseUint(port, 10, bits); err != nil {
		return "", fmt.Errorf("port %q is no number of %d bits", port, bits)
	}
	if host == "" {
		host = "localhost"
	}
	return net.JoinHostPort(host, port), nil
}

// String writes the URI so that ParseURI gives it back. The default port is
// left out.
func (u *URI) String() string {
	scheme := "nbd"
	if u.TLS {
		scheme = "nbds"
	}
	authority := &url.URL{}
	if u.User != "" {
		authority.User = url.User(u.User)
	}
	query := url.Values{}
	for key, values := range u.TLSQuery {
		query[key] = values
	}
	if u.Network == "unix" {
		socket := u.Address
		if abstract, ok := strings.CutPrefix(socket, "@"); ok {
			socket = "\x00" + abstract
		}
		query.Set("socket", socket)
	} else {
		authority.Host = strings.TrimSuffix(u.Address, ":"+strconv.Itoa(DefaultPort))
	}
	if u.Network != "tcp" {
		scheme += "+" + u.Network
	}
	path := &url.URL{Path: "/" + u.Export}
	s := scheme + "://" + strings.TrimPrefix(authority.String(), "//") + path.EscapedPath()
	if len(query) > 0 {
		// Slashes need no escapes in a query, and people read the paths.
		s += "?" + strings.ReplaceAll(query.Encode(), "%2F", "/")
	}
	return s
}
