package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/imgnbd/imgnbd/connect"
)

// The server of a device has a guardian: a process that outlives it, and sees to
// it that nobody waits for ever for what the server had not answered. It holds
// one end of a pipe and nothing else of the server's; the end of the pipe is the
// end of the server.
//
// guardianVariable tells a process that it is one, and which descriptor the pipe
// is.
const guardianVariable = "IMGNBD_GUARDIAN"

// guardianName is what ps calls it: who kills all that is called as the program
// shall not mean its guardian.
const guardianName = "nbd-guardian"

// A guardian is the server's end of the pipe.
type guardian struct{ pipe *os.File }

// startGuardian starts one, which waits to be told of a device.
func startGuardian(u *ui) (*guardian, error) {
	self, err := selfPath()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(self)
	cmd.Args = []string{u.called, "(guardian)"}
	if u.marked {
		cmd.Args[0] = "@" + u.called
	}
	cmd.Dir = "/" // it keeps no file system busy
	cmd.Env = append(os.Environ(), guardianVariable+"=3")
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	keepFromChildren() // what whoever started this process has left open
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, fmt.Errorf("a guardian of the device: %w", err)
	}
	go cmd.Wait() // it may be killed
	return &guardian{w}, nil
}

// watch tells it what to look after.
func (g *guardian) watch(w connect.Ward) error {
	if err := json.NewEncoder(g.pipe).Encode(w); err != nil {
		return fmt.Errorf("the guardian of the device: %w", err)
	}
	return nil
}

// Close lets it go, if the device has gone or is another server's.
func (g *guardian) Close() error { return g.pipe.Close() }

// asGuardian returns the guardian's end of the pipe, nil if this process is
// none.
func asGuardian() *os.File {
	fd, err := strconv.Atoi(os.Getenv(guardianVariable))
	os.Unsetenv(guardianVariable)
	if err != nil || fd < 3 {
		return nil
	}
	return os.NewFile(uintptr(fd), "guardian")
}

// guard is the whole life of a guardian.
func guard(pipe *os.File) error {
	setProcessName(guardianName)
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP) // it ends after the server
	protection := protectServer()                                  // as far as it is allowed
	var w connect.Ward
	if err := json.NewDecoder(pipe).Decode(&w); errors.Is(err, io.EOF) {
		return nil // there was no device
	} else if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, pipe); err != nil {
		return err
	}
	signal.Reset()
	if err := w.Release(context.Background()); err != nil {
		return errors.Join(fmt.Errorf("%s: what its server had not answered may wait for ever: %w", w.Device, err), protection)
	}
	return nil
}

// report has the kernel's log keep an error that nobody else would see.
func report(err error) int {
	if err == nil {
		return 0
	}
	if log, e := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); e == nil {
		fmt.Fprintf(log, "<3>imgnbd: %v\n", err)
		log.Close()
	}
	return 1
}
