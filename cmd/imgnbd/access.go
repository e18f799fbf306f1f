package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/imgnbd/imgnbd/export"
)

// An accessList says where clients may come from. A client that a rule of deny
// matches is refused; where something is allowed, so is who no rule of that
// matches.
type accessList struct {
	allow, deny []accessRule
	file        string // more of allow, read for every client; "" is none
}

// An accessRule reports whether it is about a client. A client of which
// nothing is known is never meant by a rule that asks for it.
type accessRule func(c *export.Client) bool

// addAccess adds rules with commas in between:
//
//	any  unix  192.0.2.7  192.0.2.0/24  2001:db8::/32  uid:NAME  gid:7
func addAccess(rules *[]accessRule, s string) error {
	for _, word := range strings.Split(s, ",") {
		r, err := parseAccessRule(strings.TrimSpace(word))
		if err != nil {
			return err
		}
		*rules = append(*rules, r)
	}
	return nil
}

func parseAccessRule(s string) (accessRule, error) {
	if s == "any" {
		return func(*export.Client) bool { return true }, nil
	}
	if s == "unix" {
		return func(c *export.Client) bool { _, ok := c.Addr.(*net.UnixAddr); return ok }, nil
	}
	if name, ok := strings.CutPrefix(s, "uid:"); ok {
		id, err := number(name, func() (string, error) {
			u, err := user.Lookup(name)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
		return func(c *export.Client) bool { return c.Cred != nil && c.Cred.UID == id }, err
	}
	if name, ok := strings.CutPrefix(s, "gid:"); ok {
		id, err := number(name, func() (string, error) {
			g, err := user.LookupGroup(name)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
		return func(c *export.Client) bool { return c.Cred != nil && c.Cred.GID == id }, err
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return nil, fmt.Errorf("'%s' is no address, ADDRESS/BITS, uid:USER, gid:GROUP, unix or any", s)
		}
		addr = addr.Unmap()
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if prefix.Addr().Is4In6() {
		return nil, fmt.Errorf("'%s': an IPv4 address is written as one", s)
	}
	return func(c *export.Client) bool {
		a, ok := c.Addr.(*net.TCPAddr)
		return ok && prefix.Contains(a.AddrPort().Addr().Unmap().WithZone(""))
	}, nil
}

// number returns an id that is one, or that the system has for a name.
func number(s string, lookup func() (string, error)) (uint32, error) {
	if s != "" && strings.Trim(s, "0123456789") != "" {
		var err error
		if s, err = lookup(); err != nil {
			return 0, err
		}
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("'%s' is no user or group", s)
	}
	return uint32(n), nil
}

// setFile names a file of rules, one a line, as nbd-server's authorization
// file has addresses. # begins a comment.
func (l *accessList) setFile(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	l.file = path
	_, err = l.readFile()
	return err
}

func (l *accessList) readFile() ([]accessRule, error) {
	text, err := os.ReadFile(l.file)
	if err != nil {
		return nil, says("Failed to open %s: %s", l.file, strerror(err))
	}
	var rules []accessRule
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		r, err := parseAccessRule(line)
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", l.file, n, err)
		}
		rules = append(rules, r)
	}
	return rules, lines.Err()
}

// check returns why a client may not come in. A file that cannot be read lets
// in nobody.
func (l *accessList) check(c *export.Client) error {
	match := func(r accessRule) bool { return r(c) }
	if slices.ContainsFunc(l.deny, match) {
		return errors.New("denied")
	}
	allow := l.allow
	if l.file != "" {
		more, err := l.readFile()
		if err != nil {
			return err
		}
		allow = append(slices.Clip(allow), more...)
	}
	if (len(l.allow) > 0 || l.file != "") && !slices.ContainsFunc(allow, match) {
		return errors.New("not allowed")
	}
	return nil
}
