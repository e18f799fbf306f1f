package main

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// An authz decides by the distinguished name of a client's certificate.
type authz interface {
	// allows reports whether the name may come in. An error means that it
	// cannot be told, which is no.
	allows(name string) (bool, error)
}

type authzSimple struct{ identity string }

func newAuthzSimple(p *properties) (any, error) {
	identity, ok := p.take("identity")
	if !ok {
		return nil, says("Parameter 'identity' is missing")
	}
	return authzSimple{identity}, nil
}

func (a authzSimple) allows(name string) (bool, error) { return name == a.identity, nil }

// An authzList is the first rule that matches, or else its policy.
type authzList struct {
	rules []authzRule
	allow bool
}

type authzRule struct {
	match func(name string) bool
	allow bool
}

func newAuthzList(p *properties) (any, error) {
	l, err := parseAuthzList(p)
	if err != nil {
		return nil, err
	}
	return l, nil
}

func parseAuthzList(p *properties) (*authzList, error) {
	policy, err := p.choice("policy", "deny", "allow")
	if err != nil {
		return nil, err
	}
	l := &authzList{allow: policy == "allow"}
	for i := 0; ; i++ {
		prefix := "rules." + strconv.Itoa(i) + "."
		match, ok := p.take(prefix + "match")
		if !ok {
			for _, q := range p.rest {
				if strings.HasPrefix(q.Key, prefix) {
					return nil, says("Parameter '%smatch' is missing", prefix)
				}
				if strings.HasPrefix(q.Key, "rules.") {
					return nil, says("Parameter 'rules.%d' missing", i)
				}
			}
			return l, nil
		}
		policy, err := p.choice(prefix+"policy", "", "allow", "deny")
		if err == nil && policy == "" {
			err = says("Parameter '%spolicy' is missing", prefix)
		}
		if err != nil {
			return nil, err
		}
		format, err := p.choice(prefix+"format", "exact", "glob")
		if err != nil {
			return nil, err
		}
		r := authzRule{func(name string) bool { return name == match }, policy == "allow"}
		if format == "glob" {
			r.match = glob(match)
		}
		l.rules = append(l.rules, r)
	}
}

// glob knows * for any text and ? for any character.
func glob(pattern string) func(string) bool {
	s := strings.NewReplacer(`\*`, `.*`, `\?`, `.`).Replace(regexp.QuoteMeta(pattern))
	return regexp.MustCompile(`(?s)\A` + s + `\z`).MatchString
}

func (l *authzList) allows(name string) (bool, error) {
	for _, r := range l.rules {
		if r.match(name) {
			return r.allow, nil
		}
	}
	return l.allow, nil
}

// An authzListFile is an authzList in a file of JSON, which is read for every
// client, so that a change counts from the next one on.
type authzListFile struct {
	path string
	list *authzList // instead of the file; nil: read it
}

func newAuthzListFile(p *properties) (any, error) {
	path, ok := p.take("filename")
	if !ok {
		return nil, says("Parameter 'filename' is missing")
	}
	refresh, err := p.flag("refresh", true)
	if err != nil {
		return nil, err
	}
	if path, err = filepath.Abs(path); err != nil { // the program does not stay where it is
		return nil, err
	}
	f := &authzListFile{path: path}
	list, err := f.read()
	if err != nil {
		return nil, err
	}
	if !refresh {
		f.list = list
	}
	return f, nil
}

func (f *authzListFile) read() (*authzList, error) {
	text, err := os.ReadFile(f.path)
	if err != nil {
		return nil, says("Unable to read '%s': %s", f.path, strerror(err))
	}
	var v map[string]any
	p := &properties{}
	err = decodeJSON(text, &v)
	if err == nil {
		err = p.flatten("", v)
	}
	if err == nil {
		var l *authzList
		if l, err = parseAuthzList(p); err == nil {
			if err = p.end(); err == nil {
				return l, nil
			}
		}
	}
	return nil, fmt.Errorf("%s: %w", f.path, err)
}

func (f *authzListFile) allows(name string) (bool, error) {
	l := f.list
	if l == nil {
		var err error
		if l, err = f.read(); err != nil {
			return false, err
		}
	}
	return l.allows(name)
}

// attributes are the names of what a distinguished name is made of.
var attributes = map[string]string{
	"2.5.4.3": "CN", "2.5.4.4": "sn", "2.5.4.5": "serialNumber", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST",
	"2.5.4.9": "street", "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.12": "title", "2.5.4.42": "givenName",
	"2.5.4.43": "initials", "0.9.2342.19200300.100.1.1": "UID", "0.9.2342.19200300.100.1.25": "DC",
	"1.2.840.113549.1.9.1": "EMAIL",
}

// distinguishedName writes the subject of a certificate as QEMU does: in the
// order of the certificate, in the notation of RFC 4514.
func distinguishedName(c *x509.Certificate) (string, error) {
	var name pkix.RDNSequence
	if rest, err := asn1.Unmarshal(c.RawSubject, &name); err != nil || len(rest) > 0 {
		return "", fmt.Errorf("subject of the certificate: %w", err)
	}
	var b strings.Builder
	for i, set := range name {
		for j, a := range set {
			switch {
			case j > 0:
				b.WriteByte('+')
			case i > 0:
				b.WriteByte(',')
			}
			attribute, known := attributes[a.Type.String()]
			value, isText := a.Value.(string)
			if !known || !isText {
				der, err := asn1.Marshal(a.Value)
				if err != nil {
					return "", fmt.Errorf("subject of the certificate: %w", err)
				}
				b.WriteString(a.Type.String() + "=#" + hex.EncodeToString(der))
				continue
			}
			b.WriteString(attribute + "=" + escapeDN(value))
		}
	}
	return b.String(), nil
}

func escapeDN(s string) string {
	var b strings.Builder
	for i, c := range []byte(s) {
		if strings.IndexByte(`,+"\<>;`, c) >= 0 || c == '#' && i == 0 || c == ' ' && (i == 0 || i == len(s)-1) {
			b.WriteByte('\\')
		}
		if c == 0 {
			b.WriteString(`\00`)
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}
