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

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// What ends before there is a device ends as with nbd-client: the same status
// and the same words, but for the usage.
func TestSameAsNBDClient(t *testing.T) {
	qemu.Require(t, "nbd-client")
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		t.Skip("there are devices here, which the real nbd-client would take")
	}
	if _, err := os.Stat(nbdtabPath); err == nil {
		t.Log("with the machine's " + nbdtabPath)
	}
	port, listless := clientServer(t, true), clientServer(t, false)
	for _, args := range [][]string{
		{},
		{"-foo"}, {"--foo"}, {"-si"}, {"--si"}, {"-t"}, {"-no"}, {"-n", "--n"},
		{"-b", "100", "h", "/dev/nbd0"}, {"-block-size", "x", "h"}, {"-B", "0", "h", "/dev/nbd0"},
		{"a", "1", "b", "c"}, {"a", "foo=1"}, {"a", "bs=100"},
		{"nbd99"}, {"/dev/nbd99"},
		{"-c", "/dev/nbd0"}, {"-c", "/dev/nbd0p1"}, {"-check", "/dev/null"},
		{"-d", "nbd0"}, {"-d", "/dev/null"},
		{"-n", "-N", "x", "127.0.0.1", "1", "/dev/nbd0"},
		{"-n", "127.0.0.1", "1", "/dev/nbd0"},
		{"-n", "-N", "x", "-u", "/none/s", "/dev/nbd0"},
		{"-n", "-name", "x", "-unix", "/none/s", "/dev/nbd0"},
		{"-n", "-N", "other", "127.0.0.1", port, "/dev/nbd0"},
		{"-l", "127.0.0.1", "1"},
		{"-l", "127.0.0.1", port},
		{"--list", "127.0.0.1", port},
		{"127.0.0.1", port, "-l"},
		{"-l", "127.0.0.1", listless},
	} {
		t.Run(strings.Join(args, "_"), func(t *testing.T) {
			args := append([]string{"nbd-client"}, args...)
			want, got := theirs(t, args...), ours(args...)
			for _, o := range []*outcome{&want, &got} {
				o.Stderr = strings.ReplaceAll(o.Stderr, fmt.Sprintf("while opening %s: could not open config file: No such file or directory\n", nbdtabPath), "")
				o.Stderr = strings.ReplaceAll(o.Stderr, fmt.Sprintf("nbd-client: %s: No such file or directory\n", nbdtabPath), "")
				o.Stderr = strings.ReplaceAll(o.Stderr, fmt.Sprintf("nbd-client: %s: there is no line for nbd99\n", nbdtabPath), "")
				o.Stderr, _, _ = strings.Cut(o.Stderr, "\nUsage:")
				if o.Code != 0 {
					o.Stdout = strings.TrimPrefix(o.Stdout, "Negotiation: ..\n") // before it failed
					o.Stdout = strings.TrimPrefix(o.Stdout, "Negotiation: ..")
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// clientServer has an export named disk, which it lists or not.
func clientServer(t *testing.T, listed bool) string {
	t.Helper()
	u := newUI("imgnbd", nil, nil, new(strings.Builder))
	o := newServeOptions()
	o.exportName, o.description, o.shared = "disk", "a disk", 0
	if _, err := scan(o.flags, []string{"-f", "raw"}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	dev, err := o.open(context.Background(), u, file)
	if err != nil {
		t.Fatal(err)
	}
	e, err := o.export(file, dev)
	if err != nil {
		t.Fatal(err)
	}
	s := o.newServer(u, e, newVisitors())
	if !listed {
		s.List = nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Shutdown(context.Background())
		<-served
		dev.Close()
	})
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// A command line that nbd-client takes means the same here.
func TestClientOptions(t *testing.T) {
	for args, want := range map[string]clientOptions{
		"host /dev/nbd1":               {host: "host", port: "10809", device: "/dev/nbd1", connections: 1},
		"host 99 /dev/nbd1 -persist":   {host: "host", port: "99", device: "/dev/nbd1", connections: 1, persist: true},
		"-N a -b 4096 -C 3 -R host":    {host: "host", port: "10809", export: "a", blockSize: 4096, connections: 3, readOnly: true},
		"-unix s -name=a /dev/nbd0":    {host: "s", port: "10809", export: "a", unix: true, device: "/dev/nbd0", connections: 1},
		"-s -g -t 9 -B 512 -x h":       {host: "h", port: "10809", connections: 1, swap: true, noGo: true, timeout: 9 * time.Second, size: 512, tls: true},
		"-A a -F c -K k -H n h":        {host: "h", port: "10809", connections: 1, ca: "a", cert: "c", key: "k", tlsHost: "n"},
		"h bs=1024 timeout=3":          {host: "h", port: "10809", connections: 1, blockSize: 1024, timeout: 3 * time.Second},
		"-sw -pers -- h -n":            {host: "h", port: "10809", device: "-n", connections: 1, swap: true, persist: true},
		"-cacertfile a --certfile=c h": {host: "h", port: "10809", connections: 1, ca: "a", cert: "c"},
	} {
		c := &client{u: newUI("nbd-client", nil, nil, new(strings.Builder)), clientOptions: clientOptions{port: defaultPort, connections: 1}}
		if err := scanLongOnly(c.options(), strings.Fields(args), c.operand); err != nil {
			t.Errorf("%s: %v", args, err)
		}
		if diff := cmp.Diff(want, c.clientOptions, cmp.AllowUnexported(clientOptions{})); diff != "" {
			t.Errorf("%s: %s", args, diff)
		}
	}
}

// What differs from nbd-client on purpose, as docs/compat.md has it.
func TestClientDifferences(t *testing.T) {
	for args, want := range map[string]string{
		"-L h /dev/nbd0":             "nbd-client: --nonetlink is not supported\nnbd-client: hint: leave it out",
		"-P -B 512 h /dev/nbd0":      "nbd-client: servers that do not negotiate are not supported",
		"-S h /dev/nbd0":             "nbd-client: the Sockets Direct Protocol is not supported",
		"-B 1000 -b 512 h /dev/nbd0": "E: size (1000 bytes) is not a multiple of blocksize (512)!",
		"-t -1 h /dev/nbd0":          "E: timeout is not a number: -1",
		"-t x h /dev/nbd0":           "E: timeout is not a number: x",
		"-C x h /dev/nbd0":           "E: connections is not a number: x",
		"-n -C 0 -N x -u /none/s":    "Error: CONNECT failed",
		"-F /none -K /none h":        "nbd-client: warning: anybody could be the server",
		"-A /none h":                 "nbd-client: Unable to access credentials /none: No such file or directory",
		"-d /dev/nbd99":              "Error: Cannot open NBD: No such file or directory",
		"-N x h foo":                 "Error: Invalid nbd device target",
	} {
		o := ours(append([]string{"nbd-client"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
	if o := ours("nbd-client", "-V"); o.Code != 0 || !strings.HasPrefix(o.Stdout, "This is nbd-client, from nbd 3.24 (imgnbd ") {
		t.Errorf("%+v", o)
	}
	if o := ours("nbd-client", "-h"); o.Code != 0 || o.Stdout != "" || !strings.HasPrefix(o.Stderr, "Usage: nbd-client [OPTIONS] HOST") {
		t.Errorf("%+v", o)
	}
}

// The kernel's mark for systemd is not a part of the name.
func TestMarkedName(t *testing.T) {
	if o := ours("@/sbin/nbd-client", "-V"); !strings.HasPrefix(o.Stdout, "This is nbd-client,") {
		t.Errorf("%+v", o)
	}
	if o := ours("@imgnbd", "--version"); !strings.HasPrefix(o.Stdout, "imgnbd ") {
		t.Errorf("%+v", o)
	}
}
