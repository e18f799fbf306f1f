// Package pki makes certificates for tests, in the files that QEMU, libnbd and
// nbdkit look for.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A CA signs certificates.
type CA struct {
	t      testing.TB
	Cert   *x509.Certificate
	key    crypto.Signer
	rsa    bool // keys, as most have
	serial int64
}

// New makes a CA with keys of elliptic curves.
func New(t testing.TB) *CA {
	t.Helper()
	return (&CA{t: t, serial: 1}).root()
}

// NewRSA makes a CA with the keys that most have.
func NewRSA(t testing.TB) *CA {
	t.Helper()
	return (&CA{t: t, serial: 1, rsa: true}).root()
}

func (c *CA) root() *CA {
	c.t.Helper()
	c.Cert, c.key = c.sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Test CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil)
	return c
}

// sign makes a key and a certificate for it; a nil parent signs itself.
func (c *CA) sign(template, parent *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	c.t.Helper()
	var key crypto.Signer
	var err error
	if c.rsa {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.serial++
	template.SerialNumber = big.NewInt(c.serial)
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	signer := c.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return cert, key
}

// Server makes the certificate of a server with these names or addresses.
// change, unless it is nil, has the last word.
func (c *CA) Server(change func(*x509.Certificate), names ...string) tls.Certificate {
	c.t.Helper()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "server"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	return c.leaf(template, change)
}

// Client makes the certificate of a client.
func (c *CA) Client(change func(*x509.Certificate), subject pkix.Name) tls.Certificate {
	c.t.Helper()
	return c.leaf(&x509.Certificate{
		Subject:     subject,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, change)
}

func (c *CA) leaf(template *x509.Certificate, change func(*x509.Certificate)) tls.Certificate {
	if change != nil {
		change(template)
	}
	cert, key := c.sign(template, c.Cert)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// Expired is a change to a certificate: it was good an hour ago.
func Expired(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)
}

// Pool holds the CA alone.
func (c *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.Cert)
	return p
}

// Dir writes the CA and what certs has, by "server" and "client", to a new
// folder, and returns its path.
func (c *CA) Dir(certs map[string]tls.Certificate) string {
	c.t.Helper()
	dir := c.t.TempDir()
	c.Write(filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", c.Cert.Raw)
	for name, cert := range certs {
		c.Write(filepath.Join(dir, name+"-cert.pem"), "CERTIFICATE", cert.Certificate[0])
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		if err != nil {
			c.t.Fatal(err)
		}
		c.Write(filepath.Join(dir, name+"-key.pem"), "PRIVATE KEY", key)
	}
	return dir
}

// Write writes one block of PEM.
func (c *CA) Write(path, kind string, der []byte) {
	c.t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// CRL makes a revocation list, good until next.
func (c *CA) CRL(next time.Time, revoked ...*x509.Certificate) []byte {
	c.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-48 * time.Hour), NextUpdate: next}
	for _, r := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: r.SerialNumber, RevocationTime: time.Now().Add(-time.Hour)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, c.Cert, c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return der
}
