package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// --stdio serves a socket that is standard input, as inetd starts servers, and
// a pair of pipes, as ssh does.
func TestStdio(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	start := func(t *testing.T) *exec.Cmd {
		cmd := exec.Command("imgnbd", "--stdio", "-r", "-f", "raw", disk)
		cmd.Stderr = os.Stderr
		timer := time.AfterFunc(deadline, func() { cmd.Process.Kill() })
		t.Cleanup(func() { timer.Stop() })
		return cmd
	}
	// talk is a client that comes, looks and leaves; the server has to follow.
	talk := func(t *testing.T, cmd *exec.Cmd, conn net.Conn) {
		s, err := nbd.Handshake(context.Background(), conn, nbd.Options{})
		if err != nil || s.Size != 1<<20 {
			t.Errorf("%v, %v", s, err)
		}
		conn.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	t.Run("socket", func(t *testing.T) {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
		theirs, ours := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
		defer ours.Close()
		conn, err := net.FileConn(ours)
		if err != nil {
			t.Fatal(err)
		}
		cmd := start(t)
		cmd.Stdin = theirs
		err = cmd.Start()
		theirs.Close()
		ours.Close()
		if err != nil {
			t.Fatal(err)
		}
		talk(t, cmd, conn)
	})
	t.Run("pipes", func(t *testing.T) {
		cmd := start(t)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		talk(t, cmd, &pipeConn{in: out, out: in})
	})
	t.Run("pipes that do not block", func(t *testing.T) {
		cmd := start(t)
		var fds [2]int
		syscall.ForkLock.RLock() // no other child gets them
		err := syscall.Pipe(fds[:])
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
		}
		syscall.ForkLock.RUnlock()
		for _, fd := range fds {
			err = errors.Join(err, syscall.SetNonblock(fd, true))
		}
		if err != nil {
			t.Fatal(err)
		}
		theirs, in := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdin = theirs
		err = cmd.Start()
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		talk(t, cmd, &pipeConn{in: out, out: in})
	})
}
