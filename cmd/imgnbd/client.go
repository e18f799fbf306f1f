package main

import (
	"errors"
	"net"
	"strconv"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

var defaultPort = strconv.Itoa(nbd.DefaultPort)

// clientOptions are what nbd-client can be told of a device, by its command
// line or by nbdtab.
type clientOptions struct {
	device        string // "": any free one
	host, port    string // host is the path of a socket with unix
	export        string
	unix, sdp     bool
	noGo, preinit bool
	connections   int
	blockSize     int   // bytes; 0: the least that is possible
	size          int64 // bytes; 0: as the server says
	timeout       time.Duration
	readOnly      bool
	persist, swap bool
	tls           bool
	ca, cert, key string // files
	tlsHost       string
}

// remote returns what is attached, and adds to o how, where the command line of
// o does not say.
func (c *clientOptions) remote(u *ui, o *serveOptions) (*remote, error) {
	switch {
	case c.sdp:
		return nil, errors.New("the Sockets Direct Protocol is gone: Linux does not know it, nor does this program")
	case c.preinit:
		return nil, errors.New("a server that does not negotiate is not supported")
	}
	r := &remote{noGo: c.noGo, size: c.size}
	r.uri = nbd.URI{Network: "tcp", Address: net.JoinHostPort(c.host, c.port), Export: c.export}
	if c.unix {
		r.uri.Network, r.uri.Address = "unix", c.host
	}
	for option, set := range map[string]func(){
		"connections": func() { o.connect.connections = max(c.connections, 1) },
		"block-size":  func() { o.connect.blockSize = c.blockSize },
		"timeout":     func() { o.connect.timeout = c.timeout },
		"swap":        func() { o.connect.swap = c.swap },
		"read-only":   func() { o.readOnly = c.readOnly },
	} {
		if !o.flags.Changed(option) {
			set()
		}
	}
	o.connect.device = c.device
	if !c.tls && c.ca == "" && c.cert == "" && c.key == "" && c.tlsHost == "" {
		return r, nil
	}
	// As with nbd-client, there is something to verify only if both are known.
	creds := &tlsCreds{verifyPeer: c.ca != "" && (c.tlsHost != "" || !c.unix)}
	if !creds.verifyPeer {
		u.warning("anybody could be the server: its certificate is verified only with a file of CAs, and for a socket the name in it")
	}
	cert := c.cert
	if cert == "" {
		cert = c.key
	}
	if err := creds.loadClient(c.ca, cert, c.key); err != nil {
		return nil, err
	}
	r.tls = &tlsOptions{found: creds, hostname: c.tlsHost}
	return r, nil
}
