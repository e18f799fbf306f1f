package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// tlsOptions are those of the bare command that are about TLS.
type tlsOptions struct {
	creds, authz, hostname string
	mode                   string // of our own; "" is require

	// What they name, once it has been looked up.
	found     *tlsCreds
	authority authz
}

var tlsModes = map[string]export.TLSMode{"require": export.TLSRequired, "allow": export.TLSOffered, "direct": export.TLSDirect}

// check refuses options that contradict each other, in qemu-nbd's order, and
// looks up what they name.
func (o *tlsOptions) check(made objects, list bool) error {
	if o.creds == "" {
		switch {
		case o.hostname != "":
			return says("--tls-hostname is not permitted without --tls-creds")
		case o.authz != "":
			return says("--tls-authz is not permitted without --tls-creds")
		case o.mode != "":
			return errors.New("--tls-mode is not permitted without --tls-creds")
		}
		return nil
	}
	switch {
	case o.hostname != "" && !list:
		return says("TLS hostname is only supported with export list")
	case o.authz != "" && list:
		return says("TLS authorization is incompatible with export list")
	case o.mode == "allow" && list:
		return errors.New("--tls-mode=allow is for servers: a client asks for TLS or does without")
	case o.mode == "allow" && o.authz != "":
		return errors.New("--tls-authz is not permitted with --tls-mode=allow, which lets in whoever does without TLS")
	}
	failed := func(format string, a ...any) error {
		return says("Failed to get TLS creds: "+format, a...)
	}
	object, ok := made[o.creds]
	if !ok {
		return failed("No TLS credentials with id '%s'", o.creds)
	}
	o.found, ok = object.(*tlsCreds)
	switch {
	case !ok:
		return failed("Object with id '%s' is not TLS credentials", o.creds)
	case o.found.server && list:
		return failed("Expected TLS credentials for a client endpoint")
	case !o.found.server && !list:
		return failed("Expected TLS credentials for a server endpoint")
	}
	if o.authz == "" {
		return nil
	}
	if !o.found.verifyPeer {
		return errors.New("--tls-authz is not permitted with verify-peer=off: who clients are would not be known")
	}
	if object, ok = made[o.authz]; !ok {
		return fmt.Errorf("there is no object with id '%s'", o.authz)
	}
	if o.authority, ok = object.(authz); !ok {
		return fmt.Errorf("object with id '%s' is no authorization", o.authz)
	}
	return nil
}

// authorize refuses a client whose certificate is not on the list.
func (o *tlsOptions) authorize(c *export.Client) error {
	if o.authority == nil || c.TLS == nil {
		return nil // TLS is required then, so that it is asked again
	}
	if len(c.TLS.PeerCertificates) == 0 {
		return errors.New("client has no certificate")
	}
	name, err := distinguishedName(c.TLS.PeerCertificates[0])
	if err != nil {
		return err
	}
	ok, err := o.authority.allows(name)
	if err == nil && !ok {
		err = says("TLS x509 authz check for %s is denied", name)
	}
	return err
}

// secure makes a connection to a server one over TLS.
func (o *tlsOptions) secure(ctx context.Context, conn net.Conn, host string) (net.Conn, error) {
	config := o.found.config()
	if config.ServerName = o.hostname; o.hostname == "" {
		config.ServerName = host
	}
	if o.mode != "direct" {
		return nbd.StartTLS(ctx, conn, config)
	}
	c := tls.Client(conn, config)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return c, nil
}

// A tlsCreds is an object tls-creds-x509: the certificates in a folder, under
// the names that QEMU, libnbd and nbdkit look for.
type tlsCreds struct {
	server     bool
	verifyPeer bool
	cas        *x509.CertPool
	own        []tls.Certificate // one or, for a client, none
	revoked    []*x509.RevocationList
}

func newTLSCreds(p *properties) (any, error) {
	endpoint, err := p.choice("endpoint", "client", "server")
	if err != nil {
		return nil, err
	}
	c := &tlsCreds{server: endpoint == "server"}
	if c.verifyPeer, err = p.flag("verify-peer", true); err != nil {
		return nil, err
	}
	check, err := p.flag("sanity-check", true)
	if err != nil {
		return nil, err
	}
	if s, ok := p.take("priority"); ok && s != "NORMAL" {
		return nil, hinted(fmt.Errorf("priority '%s' is not supported", s), "TLS 1.2 and 1.3 are spoken, with the ciphers of Go's choice")
	}
	if _, ok := p.take("passwordid"); ok {
		return nil, hinted(errors.New("passwordid is not supported"), otherKinds["secret"])
	}
	if err := p.unexpectedBut("dir"); err != nil {
		return nil, err
	}
	dir, ok := p.take("dir")
	if !ok {
		return nil, says("Missing 'dir' property value")
	}
	if err := c.load(credsIn(dir, endpoint), endpoint, check); err != nil {
		return nil, err
	}
	return c, nil
}

// credsFiles are where credentials are read from.
type credsFiles struct {
	ca, crl   string
	cert, key string // of this end's own
}

// credsIn returns the files of a folder.
func credsIn(dir, endpoint string) credsFiles {
	at := func(name string) string { return filepath.Join(dir, name) }
	return credsFiles{at("ca-cert.pem"), at("ca-crl.pem"), at(endpoint + "-cert.pem"), at(endpoint + "-key.pem")}
}

func (c *tlsCreds) load(files credsFiles, endpoint string, check bool) error {
	caPath := files.ca
	cas, err := readCertificates(caPath)
	if err != nil {
		return err
	}
	c.cas = x509.NewCertPool()
	for _, ca := range cas {
		if check {
			if err := inTime(ca, "CA", caPath); err != nil {
				return err
			}
			if !ca.IsCA {
				return says("The certificate %s basic constraints do not show a CA", caPath)
			}
		}
		c.cas.AddCert(ca)
	}
	if c.revoked, err = readRevoked(files.crl, cas); err != nil {
		return err
	}
	certPath, keyPath := files.cert, files.key
	chain, err := readCertificates(certPath)
	if !c.server && errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := c.loadOwn(certPath, keyPath); err != nil {
		return err
	}
	if !check {
		return nil
	}
	if err := inTime(chain[0], endpoint, certPath); err != nil {
		return err
	}
	between := x509.NewCertPool()
	for _, cert := range chain[1:] {
		between.AddCert(cert)
	}
	usage := x509.ExtKeyUsageClientAuth
	if c.server {
		usage = x509.ExtKeyUsageServerAuth
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: c.cas, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return fmt.Errorf("Our own certificate %s failed validation against %s: %w", certPath, caPath, err)
	}
	return nil
}

func (c *tlsCreds) loadOwn(certPath, keyPath string) error {
	keyText, err := os.ReadFile(keyPath)
	if err != nil {
		return unreadable(keyPath, err)
	}
	certText, err := os.ReadFile(certPath)
	if err != nil {
		return unreadable(certPath, err)
	}
	pair, err := tls.X509KeyPair(certText, keyText)
	if err != nil {
		return fmt.Errorf("Unable to load certificate '%s' & key '%s': %w", certPath, keyPath, err)
	}
	c.own = []tls.Certificate{pair}
	return nil
}

// loadClient loads what nbd-client names, each only if it does.
func (c *tlsCreds) loadClient(ca, cert, key string) error {
	if ca != "" {
		certs, err := readCertificates(ca)
		if err != nil {
			return err
		}
		c.cas = x509.NewCertPool()
		for _, ca := range certs {
			c.cas.AddCert(ca)
		}
	}
	if cert == "" {
		return nil
	}
	return c.loadOwn(cert, key)
}

func inTime(c *x509.Certificate, what, path string) error {
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		return says("The %s certificate %s has expired", what, path)
	case now.Before(c.NotBefore):
		return says("The %s certificate %s is not yet active", what, path)
	}
	return nil
}

// unreadable is an error in QEMU's words that still is err.
func unreadable(path string, err error) error {
	return &quoted{says("Unable to access credentials %s: %s", path, strerror(err)), err}
}

type quoted struct{ text, cause error }

func (q *quoted) Error() string { return q.text.Error() }
func (q *quoted) Unwrap() error { return q.cause }

// readBlocks returns the blocks of PEM of one kind, at least one.
func readBlocks(path, kind string) ([][]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, unreadable(path, err)
	}
	var blocks [][]byte
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == kind {
			blocks = append(blocks, block.Bytes)
		}
	}
	if blocks == nil {
		return nil, fmt.Errorf("%s has no PEM block of type %s", path, kind)
	}
	return blocks, nil
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	blocks, err := readBlocks(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, b := range blocks {
		c, err := x509.ParseCertificate(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// readRevoked reads the revocation lists in a file that need not exist. Each
// is of one of the CAs.
func readRevoked(path string, cas []*x509.Certificate) ([]*x509.RevocationList, error) {
	blocks, err := readBlocks(path, "X509 CRL")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var lists []*x509.RevocationList
	for _, b := range blocks {
		l, err := x509.ParseRevocationList(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		signed := false
		for _, ca := range cas {
			signed = signed || l.CheckSignatureFrom(ca) == nil
		}
		if !signed {
			return nil, fmt.Errorf("%s: a list that no CA of ours has signed", path)
		}
		lists = append(lists, l)
	}
	return lists, nil
}

// config returns what crypto/tls needs, for this end of a connection.
func (c *tlsCreds) config() *tls.Config {
	t := &tls.Config{Certificates: c.own, MinVersion: tls.VersionTLS12}
	switch {
	case !c.server:
		t.RootCAs, t.InsecureSkipVerify = c.cas, !c.verifyPeer
		t.VerifyConnection = func(state tls.ConnectionState) error { return c.notRevoked(state.VerifiedChains) }
	case c.verifyPeer:
		// ClientCAs would be named to clients, and GnuTLS 3.7 then finds that
		// an RSA certificate of its own does not fit TLS 1.3 as Go speaks it.
		t.ClientAuth = tls.RequireAnyClientCert
		t.VerifyConnection = c.verifyClient
	}
	return t
}

// verifyClient does what tls.RequireAndVerifyClientCert does.
func (c *tlsCreds) verifyClient(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("client has no certificate")
	}
	between := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		between.AddCert(cert)
	}
	chains, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: c.cas, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("client's certificate: %w", err)
	}
	return c.notRevoked(chains)
}

// notRevoked looks for a chain of the peer's in which nothing is revoked.
func (c *tlsCreds) notRevoked(chains [][]*x509.Certificate) error {
	if !c.verifyPeer || len(c.revoked) == 0 {
		return nil
	}
	err := errors.New("no certificate that could be looked up in the revocation list")
	for _, chain := range chains {
		if err = c.chainRevoked(chain); err == nil {
			return nil
		}
	}
	return err
}

func (c *tlsCreds) chainRevoked(chain []*x509.Certificate) error {
	for _, cert := range chain {
		for _, l := range c.revoked {
			if string(l.RawIssuer) != string(cert.RawIssuer) {
				continue
			}
			if !l.NextUpdate.IsZero() && time.Now().After(l.NextUpdate) {
				return fmt.Errorf("revocation list of %s is out of date", l.Issuer)
			}
			for _, e := range l.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
					return fmt.Errorf("certificate of %s is revoked", cert.Subject)
				}
			}
		}
	}
	return nil
}
