package program

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/hostile"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// Images that claim to be huge take no more memory than others, and come to an
// end: of info and check, and of the server with a client that reads and writes.
func TestHostile(t *testing.T) {
	const limit = 256 << 20
	bin := build(t)
	for _, img := range hostile.Huge() {
		t.Run(img.Name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk.qcow2")
			if err := img.WriteFile(file); err != nil {
				t.Fatal(err)
			}
			checked := func(name string, used int64) {
				if used > limit {
					t.Errorf("%s takes %d MiB", name, used>>20)
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), hang)
			defer cancel()
			for _, args := range [][]string{{"info", file}, {"check", file}, {"check", "-r", "all", file}} {
				if args[0] == "check" && (testing.Short() || img.Slow && os.Getenv("IMGNBD_CRASH") == "") {
					continue
				}
				var stderr bytes.Buffer
				cmd := exec.CommandContext(ctx, bin, args...)
				cmd.Stdout, cmd.Stderr = io.Discard, &head{&stderr}
				peak := qemu.Measure(t, cmd)
				_ = cmd.Run() // it may well find fault
				if code := cmd.ProcessState.ExitCode(); code < 0 || code > 3 {
					t.Errorf("%q: status %d: %s", args, code, &stderr)
				}
				checked(args[0], peak())
				if err := img.WriteFile(file); err != nil { // as it was
					t.Fatal(err)
				}
			}

			p := &patient{t: t, bin: bin, socket: filepath.Join(t.TempDir(), "s"),
				args: []string{"--journal=off", "--discard=unmap", "--format=qcow2", file}}
			var stderr bytes.Buffer
			conn, ended := p.tryStart(&head{&stderr})
			var session *nbd.Session
			if conn != nil {
				var err error
				if session, err = nbd.Handshake(ctx, conn, nbd.Options{}); err != nil {
					<-ended // it listens, and then looks at the image
				}
			}
			if session == nil {
				if code := p.cmd.ProcessState.ExitCode(); code != 1 {
					t.Errorf("refused with status %d: %s", code, &stderr)
				}
				again := exec.CommandContext(ctx, bin, p.cmd.Args[1:]...)
				peak := qemu.Measure(t, again)
				_ = again.Run() // as before
				checked("refusing it", peak())
				return
			}
			c := nbd.NewClient(conn, session, nbd.Options{})
			b := make([]byte, min(1<<20, session.Size))
			for i := range int64(20) { // whatever the answers
				off := (session.Size - int64(len(b))) / 20 * i
				_ = c.Read(b, off, 0)
				_ = c.Write(b[:min(3000, len(b))], off, 0)
			}
			_ = c.Flush()
			_ = c.Close()
			checked("the server", peak(t, p.cmd.Process.Pid))
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
			<-ended
			if code := p.cmd.ProcessState.ExitCode(); code < 0 || code > 1 {
				t.Errorf("the server ends with status %d: %s", code, &stderr)
			}
		})
	}
}

// A head keeps the first of what is written to it, to show.
type head struct{ b *bytes.Buffer }

func (t *head) Write(p []byte) (int, error) {
	if t.b.Len() < 4096 {
		t.b.Write(p)
	}
	return len(p), nil
}

// tryStart starts the program and connects. It returns no connection if the
// program ends instead. done is closed when it has ended.
func (p *patient) tryStart(stderr io.Writer) (conn net.Conn, done <-chan struct{}) {
	p.t.Helper()
	p.cmd = exec.Command(p.bin, append([]string{"--persistent", "--shared=0", "--socket=" + p.socket}, p.args...)...)
	p.cmd.Stderr = stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = p.cmd.Wait()
		close(ended)
	}()
	for {
		if conn, err := net.Dial("unix", p.socket); err == nil {
			return conn, ended
		}
		select {
		case <-ended:
			return nil, ended
		case <-time.After(5 * time.Millisecond):
		}
	}
}
