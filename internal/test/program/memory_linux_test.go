// Package program tests the program from outside: what it holds and what it
// leaves behind, as the system sees it.
package program

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// hang bounds what should take a moment.
const hang = 2 * time.Minute

// build compiles the program and returns its path.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "imgnbd")
	qemu.Run(t, "go", "build", "-o", bin, "../../../cmd/imgnbd")
	return bin
}

// serve starts the program on a Unix socket, and returns the socket and the
// process id when it is ready.
func serve(t *testing.T, bin string, args ...string) (socket string, pid int) {
	t.Helper()
	dir := t.TempDir()
	socket = filepath.Join(dir, "s")
	ready := filepath.Join(dir, "pid")
	cmd, _ := qemu.Start(t, bin, append([]string{"--persistent", "--shared=0", "--socket=" + socket, "--pid-file=" + ready}, args...)...)
	for deadline := time.Now().Add(hang); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			return socket, cmd.Process.Pid
		}
		if time.Now().After(deadline) {
			t.Fatal("the program does not become ready")
		}
	}
}

// Address space may be as scarce as OpenStack makes it for qemu-img info.
func TestAddressSpace(t *testing.T) {
	qemu.Require(t, "nbdcopy")
	t.Setenv("CGO_ENABLED", "0") // as releases are built
	bin, disk := build(t), qemu.Create(t, "qcow2", "", "64M")
	qemu.IO(t, "qcow2", disk, "write 0 64M")
	for _, command := range []string{"info", "check", "--run 'nbdcopy $uri null:'"} {
		qemu.Run(t, "sh", "-c", "ulimit -v 1048576; exec "+bin+" "+command+" "+disk)
	}
}

func connect(t *testing.T, socket string) (net.Conn, *nbd.Session) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	session, err := nbd.Handshake(ctx, conn, nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(hang))
	return conn, session
}

// peak returns the most memory that a process has had, in bytes.
func peak(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatalf("VmHWM: %v", err)
	}
	return kib << 10
}

// The memory of the program stays below the sum of docs/memory.md, whatever
// clients do: here all want the most and take nothing.
func TestMemory(t *testing.T) {
	const (
		size    = int64(512) << 30
		cluster = int64(64) << 10
		clients = 24
		request = 8 << 20
		mib     = int64(1) << 20
	)
	file := qemu.Create(t, "qcow2", fmt.Sprintf("cluster_size=%d,preallocation=metadata", cluster), fmt.Sprint(size))
	// What has to be decompressed is not sent from the file.
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, compressible(request), 0o644); err != nil {
		t.Fatal(err)
	}
	compressed := plain + ".qcow2"
	qemu.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", plain, compressed)
	bin := build(t)

	socket, pid := serve(t, bin, "--read-only", file)

	l1 := 8 * (size / (cluster * cluster / 8))
	l2 := min(32*mib, 8*size/cluster) * 106 / 100
	image := l1 + l2
	bound := 20*mib + image

	// Every L2 table of the disk is asked for.
	conn, session := connect(t, socket)
	c := nbd.NewClient(conn, session, nbd.Options{})
	before := peak(t, pid)
	p := make([]byte, 512)
	for off := int64(0); off < size; off += 4096 / 8 * cluster {
		if err := c.Read(p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	after := peak(t, pid)
	t.Logf("one client, all of the disk: %d MiB, then %d MiB of %d MiB", before/mib, after/mib, (bound+35*mib)/mib)
	if limit := bound + 35*mib; after > limit {
		t.Errorf("reading everywhere takes %d bytes, more than %d", after, limit)
	}
	if after < before+16*mib {
		t.Errorf("reading everywhere takes only %d bytes: the tables were not kept, so nothing was tested", after-before)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	// Clients ask for far more than is allowed and read no reply.
	socket, pid = serve(t, bin, "--read-only", compressed)
	bound = (20+512+64)*mib + (clients+1)*(26*mib/10)
	for range clients {
		conn, _ := connect(t, socket)
		go flood(conn, request)
	}
	// One that behaves is served all the same.
	conn, session = connect(t, socket)
	c = nbd.NewClient(conn, session, nbd.Options{})
	p = make([]byte, request)
	for range 5 {
		if err := c.Read(p, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "greedy clients get little: nothing is tested", func() bool { return peak(t, pid) >= 256*mib })
	got := peak(t, pid)
	t.Logf("%d clients that take nothing: %d MiB of %d MiB", clients, got/mib, bound/mib)
	if got > bound {
		t.Errorf("%d greedy clients make it take %d bytes, more than %d", clients, got, bound)
	}
}

// compressible returns n bytes of hexadecimal digits.
func compressible(n int) []byte {
	raw := make([]byte, n/2)
	rand.NewChaCha8([32]byte{1}).Read(raw)
	return hex.AppendEncode(nil, raw)
}

// flood sends requests for n bytes until that blocks or fails.
func flood(w io.Writer, n uint64) {
	for i := range uint64(1000) {
		var r []byte
		r = binary.BigEndian.AppendUint32(r, nbd.MagicExtRequest)
		r = binary.BigEndian.AppendUint16(r, 0)
		r = binary.BigEndian.AppendUint16(r, uint16(nbd.CmdRead))
		r = binary.BigEndian.AppendUint64(r, i)
		r = binary.BigEndian.AppendUint64(r, 0)
		r = binary.BigEndian.AppendUint64(r, n)
		if _, err := w.Write(r); err != nil {
			return
		}
	}
}
