package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// What contradicts an attachment is refused before anything is opened.
func TestConnectOptions(t *testing.T) {
	for args, want := range map[string]string{
		"-c auto -d disk":                            "--connect and --disconnect exclude each other",
		"-c auto -k /s disk":                         "--connect and --socket exclude each other",
		"-c auto -p 1 disk":                          "--connect and --port exclude each other",
		"-c auto --stdio disk":                       "--connect and --stdio exclude each other",
		"-c auto --run true disk":                    "--connect and --run exclude each other",
		"-d -b ::1 /dev/nbd0":                        "--disconnect and --bind exclude each other",
		"--force disk":                               "--force goes with --disconnect",
		"--connections 2 disk":                       "--connections goes with --connect",
		"--max-part 8 disk":                          "--max-part goes with --connect",
		"--replace disk":                             "--replace goes with --connect",
		"--dead-timeout 8 disk":                      "--dead-timeout goes with --connect",
		"-c auto --dead-timeout -1 disk":             "--dead-timeout=-1 is not a number of seconds",
		"-c auto --connections 0 disk":               "--connections=0 is not a number of connections",
		"-c auto --max-part 256 disk":                "--max-part=256 is not between 0 and 255",
		"-c auto --max-part -1 disk":                 "--max-part=-1 is not between 0 and 255",
		"--timeout 8 disk":                           "--timeout goes with --connect",
		"-c auto --block-size 100 disk":              "--block-size=100 is none of 512, 1024, 2048, 4096",
		"-c auto --timeout x disk":                   "--timeout=x is not a number of seconds",
		"-c auto --timeout 8 disk":                   "--timeout is for the exports of servers, and disk is an image",
		"-c auto --swap disk":                        "--swap is for the exports of servers, and disk is an image",
		"-c auto --cache none nbd://h":               "--cache does not go with the export of a server",
		"-c auto -f qcow2 nbd://h":                   "--format does not go with the export of a server",
		"-c auto -e 2 nbd://h":                       "--shared does not go with the export of a server",
		"-c auto nbd://h?x=y":                        `URI "nbd://h?x=y": parameter "x"`,
		"-c auto nbd+ssh://h":                        `URI "nbd+ssh://h": scheme "nbd+ssh" is none of`,
		"-c auto -v nbd+vsock://2:x":                 `URI "nbd+vsock://2:x"`,
		"-c auto -v --swap nbd+vsock://2":            "--swap and AF_VSOCK exclude each other",
		"-c auto -v nbds://a@h":                      "of the kinds of authentication over TLS, only that by certificates",
		"-c auto -v nbd://h?tls-certificates=/":      "parameters of TLS are for URIs that begin with nbds",
		"-c auto -v nbds://h?tls-certificates=/none": "Unable to access credentials /none/ca-cert.pem",
		"-c auto -v nbds://h?tls-verify-peer=maybe":  "tls-verify-peer=maybe is neither true nor false",
		"-c auto -v --swap nbds://h":                 "--swap and TLS exclude each other",
		"-c /dev/nbd77":                              "/etc/nbdtab: ",
		"-c auto":                                    "Invalid number of arguments",
		"-d":                                         "Invalid number of arguments",
		"-L -c auto":                                 "List mode is incompatible with per-device settings",
		"-d /nonexistent":                            "Cannot open /nonexistent: No such file or directory",
		"-d nbd99":                                   "Cannot open /dev/nbd99: No such file or directory",
		"-d /dev/null":                               "/dev/null is not the name of a device",
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, "imgnbd: "+want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
}

func TestRemoteDial(t *testing.T) {
	for s, want := range map[string]string{
		"nbd://127.0.0.1:1":           "Failed to connect to '127.0.0.1:1': Connection refused",
		"nbd+unix:///?socket=/none/s": "Failed to connect to '/none/s': No such file or directory",
		"nbd://nohost.invalid":        "address resolution failed for nohost.invalid:10809",
	} {
		uri, err := nbd.ParseURI(s)
		if err != nil {
			t.Fatal(err)
		}
		r := &remote{uri: *uri}
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		if _, err := r.dial(ctx); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", s, err)
		}
		cancel()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	// Once it has been found, its name is not looked up again.
	r := &remote{uri: nbd.URI{Network: "tcp", Address: "localhost:" + port}}
	for range 2 {
		conn, err := r.dial(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.RemoteAddr().String(); got != l.Addr().String() {
			t.Errorf("%s, not %s", got, l.Addr())
		}
		conn.Close()
		r.uri.Address = "nohost.invalid:" + port
	}
}

// The mark that asks systemd to spare a process is not part of its name.
func TestSurvivorMark(t *testing.T) {
	for called, want := range map[string]string{"@imgnbd": "imgnbd: ", "@/usr/bin/qemu-nbd": "qemu-nbd: "} {
		if o := ours(called, "-c", "auto", "-d", "disk"); !strings.HasPrefix(o.Stderr, want) {
			t.Errorf("%s: %+v", called, o)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "s"), fmt.Sprintf("@imgnbd-test-%d", os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		t.Setenv("NOTIFY_SOCKET", path)
		notify("READY=1")
		l.SetReadDeadline(time.Now().Add(deadline))
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: %q, %v", path, b[:n], err)
		}
	}
	// Nobody who listens is no reason to fail.
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	notify("READY=1")
	t.Setenv("NOTIFY_SOCKET", "")
	notify("READY=1")
}
