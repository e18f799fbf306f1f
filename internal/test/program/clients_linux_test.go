package program

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// descriptors returns how many a process has.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// eventually waits for what has to come.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(hang); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// The malice of a client is what it does after connecting. What it cannot send
// any more does not matter; it never reads but for the greeting.
var malice = []struct {
	name string
	do   func(c net.Conn, rng *rand.Rand)
}{
	{"silent", func(net.Conn, *rand.Rand) {}},
	{"half a handshake", func(c net.Conn, _ *rand.Rand) { c.Write([]byte{0, 0, 0}) }},
	{"half an option", func(c net.Conn, _ *rand.Rand) {
		c.Write(append([]byte{0, 0, 0, 3}, option(99, 128<<10)...))
		c.Write(make([]byte, 100<<10))
	}},
	{"a long option", func(c net.Conn, _ *rand.Rand) { c.Write(append([]byte{0, 0, 0, 3}, option(99, 1<<32-1)...)) }},
	{"a flood of options", func(c net.Conn, _ *rand.Rand) {
		c.Write(append([]byte{0, 0, 0, 3}, bytes.Repeat(option(uint32(nbd.OptList), 0), 2000)...))
	}},
	{"noise", func(c net.Conn, rng *rand.Rand) {
		b := make([]byte, 4096)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		c.Write(b)
	}},
	{"noise for requests", func(c net.Conn, rng *rand.Rand) {
		agree(c)
		b := make([]byte, 4096)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		c.Write(b)
	}},
	{"large reads", func(c net.Conn, _ *rand.Rand) {
		agree(c)
		c.Write(bytes.Repeat(request(nbd.CmdRead, 8<<20), 64))
	}},
	{"small reads", func(c net.Conn, _ *rand.Rand) {
		agree(c)
		c.Write(bytes.Repeat(request(nbd.CmdRead, 4<<10), 4096))
	}},
	{"half a payload", func(c net.Conn, _ *rand.Rand) {
		agree(c)
		c.Write(append(request(nbd.CmdWrite, 16<<20), make([]byte, 100<<10)...))
	}},
	{"a payload for nothing", func(c net.Conn, _ *rand.Rand) {
		agree(c)
		c.Write(request(nbd.CmdWrite, 1<<32-1))
	}},
}

func option(id, size uint32) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, id), size)
}

func agree(c net.Conn) { c.Write(append([]byte{0, 0, 0, 3}, option(uint32(nbd.OptExportName), 0)...)) }

func request(cmd nbd.Command, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbd.MagicRequest)
	b = binary.BigEndian.AppendUint32(b, uint32(cmd))
	b = append(b, make([]byte, 16)...)
	return binary.BigEndian.AppendUint32(b, n)
}

// Whatever a thousand clients do at once, those who mean well are served,
// memory stays where it was said to, and nothing is left of them.
func TestHostileClients(t *testing.T) {
	const (
		mib    = int64(1) << 20
		memory = 96 * mib
		large  = 8 << 20
	)
	clients := 1000
	if testing.Short() {
		clients = 200
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, compressible(large), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := plain + ".qcow2"
	qemu.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", plain, disk) // what is decompressed is not sent from the file
	qemu.Img(t, "resize", "-q", "-f", "qcow2", disk, "32M")
	socket := filepath.Join(t.TempDir(), "s")
	p := &patient{t: t, bin: release(t), socket: socket, args: []string{fmt.Sprintf("--memory=%d", memory), "--untrusted",
		"--handshake-limit=60", "-f", "qcow2", disk}}
	p.start()
	t.Cleanup(func() { p.cmd.Process.Kill() })
	good := p.connect()
	pid := p.cmd.Process.Pid
	work := func() {
		t.Helper()
		b := make([]byte, large)
		err := good.Read(b, 0, 0)
		if err == nil {
			err = good.Write(b[:64<<10], 16<<20, 0)
		}
		if err == nil {
			err = good.Flush()
		}
		if err != nil {
			t.Errorf("who means well: %v", err)
		}
	}
	work()
	before := descriptors(t, pid)

	rng := rand.New(rand.NewPCG(1, 2))
	var conns []net.Conn
	for i := range clients {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		// A write may wait for a server that does not read any more, which is
		// in order.
		go malice[i%len(malice)].do(c, rand.New(rand.NewPCG(uint64(i), 3)))
		if i%100 == 0 {
			work()
		}
	}
	eventually(t, "the clients do not all get in", func() bool { return descriptors(t, pid) > before+clients/3 })
	work()
	late := p.connect() // and one who comes last
	if err := late.Read(make([]byte, 4096), 0, 0); err != nil {
		t.Error(err)
	}
	late.Close()

	eventually(t, "it takes too little: nothing is tested", func() bool { return peak(t, pid) >= memory/2 })
	got := peak(t, pid)
	// By docs/memory.md, for those who get as far as to move data: 5 of 11.
	bound := 32*mib + memory + memory/8 + int64(clients)*5/11*26*mib/10
	t.Logf("%d clients: %d MiB of %d MiB", clients, got/mib, bound/mib)
	if got > bound {
		t.Errorf("it takes %d MiB, more than %d MiB", got/mib, bound/mib)
	}

	// Some leave in order, some in the middle of it all, some by a reset.
	for _, i := range rng.Perm(len(conns)) {
		c := conns[i].(*net.UnixConn)
		if rng.IntN(2) == 0 {
			c.CloseWrite()
		}
		c.Close()
	}
	eventually(t, "descriptors are left behind", func() bool { return descriptors(t, pid) <= before })
	work()
	good.Close()
	p.end()
	if n := strings.Count(p.stderr.String(), "too many or too long options"); n != 1 {
		t.Errorf("long options: told %d times:\n%s", n, &p.stderr)
	}
	qemu.CheckLeaks(t, disk)
}

// CVE-2024-7409: clients that never negotiate take all the descriptors there
// are. Those who are served go on, and when the time for a handshake is over,
// others are.
func TestNoDescriptors(t *testing.T) {
	dir := t.TempDir()
	disk, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	bin := release(t)
	cmd := exec.Command("sh", "-c", `ulimit -n 40; exec "$0" "$@"`, bin, "-t", "-e0", "--handshake-limit=3", "-f", "raw", "-k", socket, disk)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	p := &patient{t: t, socket: socket, cmd: cmd, hurried: true}
	good := p.connect()
	var idle []net.Conn
	for range 50 {
		c, err := net.Dial("unix", socket) // those beyond wait in the queue
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	for range 10 {
		if err := good.Write(make([]byte, 4096), 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	p.connect().Close() // behind all of them
	for _, c := range idle {
		c.SetReadDeadline(time.Now().Add(hang))
		if _, err := io.Copy(io.Discard, c); os.IsTimeout(err) {
			t.Fatal("an idle client is still there")
		}
	}
	good.Close()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for _, what := range []string{"connections that could not be accepted", "handshakes that took too long"} {
		if n := strings.Count(stderr.String(), what); n != 1 {
			t.Errorf("%s: told %d times:\n%s", what, n, &stderr)
		}
	}
}
