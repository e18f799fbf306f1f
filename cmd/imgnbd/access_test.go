package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A file of nbd-server's lets in the same addresses. CVE-2013-6410: one that is
// the beginning of another is not that other.
func TestAllowFileSameAsNBDServer(t *testing.T) {
	server := qemu.Newer(t, "nbd-server")
	dir := t.TempDir()
	disk, conf := filepath.Join(dir, "disk"), filepath.Join(dir, "conf")
	if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	host, port, _ := net.SplitHostPort(address)
	text := fmt.Sprintf("[generic]\nlistenaddr = %s\nport = %s\n", host, port)
	files := []string{
		"127.0.0.2\n", "127.0.0.2\n127.0.2.1\n", "127.0.0.0/24\n", "127.0.0.0/8\n", "127.0.2.0/23\n", "127.0.0.2/32\n", "127.0.0.0/31\n",
		"# nobody\n127.1.0.0/16\n", "0.0.0.0/0\n", "127.0.0.3/30\n", "::1\n127.0.0.1\n",
	}
	file := func(i int) string { return filepath.Join(dir, fmt.Sprint("allow", i)) }
	for i, rules := range files {
		if err := os.WriteFile(file(i), []byte(rules), 0o600); err != nil {
			t.Fatal(err)
		}
		text += fmt.Sprintf("[disk%d]\nexportname = %s\nauthfile = %s\n", i, disk, file(i))
	}
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu.Start(t, server, "-n", "-C", conf, "-p", filepath.Join(dir, "pid"))
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		for end := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
			c, err := d.Dial("tcp", address)
			if err == nil {
				return c
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	for i, rules := range files {
		for _, from := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.22", "127.0.2.1"} {
			conn := dial(from)
			_, err := nbd.Handshake(t.Context(), conn, nbd.Options{Export: fmt.Sprint("disk", i)})
			client := &export.Client{Addr: conn.LocalAddr()}
			conn.Close()
			ours := &accessList{file: file(i)}
			if e := ours.check(client); (e == nil) != (err == nil) {
				t.Errorf("%q: %s: nbd-server says %v, we say %v", strings.TrimSpace(rules), from, err, e)
			}
		}
	}
}
