package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// --fork starts the program a second time with the same arguments: a Go process
// cannot fork. The first one, the parent, copies the messages of the second,
// the daemon, until that is ready, and exits as qemu-nbd does: 0 if there were
// none, 1 if there was any.
//
// daemonVariable tells the daemon that it is one, and which descriptors it got:
// "ready,stderr,listen" as numbers, 0 for one that it did not get.
const daemonVariable = "IMGNBD_DAEMON"

// A daemon is the side of --fork that stays.
type daemon struct {
	readiness *os.File // when it is ready, its result and a zero go there
	stderr    *os.File // where messages go from then on
	listen    *os.File // the socket that was passed to the parent, or nil
}

// errSilent is the error of a daemon that ended without a word.
var errSilent = errors.New("the server ended before it was ready")

// errTalkative is the error of a daemon that is ready, and has warned.
var errTalkative error = &exit{code: 1}

// startDaemon runs the program again with args and returns when the daemon is
// ready or has ended. If ctx ends before, the daemon is told to, and has closeTime
// until nobody waits for it any more.
func startDaemon(ctx context.Context, u *ui, args []string, listen *os.File, keepStderr bool) error {
	self, err := selfPath()
	if err != nil {
		return err
	}
	messages, messagesW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer messages.Close()
	readiness, readyW, err := os.Pipe()
	if err != nil {
		messagesW.Close()
		return err
	}
	defer readiness.Close()

	cmd := exec.Command(self)
	cmd.Args = append([]string{u.called}, args...)
	if u.marked {
		cmd.Args[0] = "@" + u.called
	}
	cmd.Stderr = messagesW // standard input and output become /dev/null
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pass := func(f *os.File) int {
		if f == nil {
			return 0
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		return 2 + len(cmd.ExtraFiles)
	}
	stderr, _ := u.stderr.(*os.File)
	if !keepStderr || stderr == nil {
		if stderr, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
			return err
		}
		defer stderr.Close()
	}
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d,%d,%d", daemonVariable, pass(readyW), pass(stderr), pass(listen)))
	err = cmd.Start()
	messagesW.Close()
	readyW.Close()
	if err != nil {
		return err
	}
	var n int64
	var result []byte
	said := make(chan error, 1)
	go func() {
		var err error
		if n, err = io.Copy(u.stderr, messages); err == nil {
			result, err = io.ReadAll(readiness)
		}
		said <- err
	}()
	select {
	case err := <-said:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		if !endDaemon(cmd, said) {
			return fmt.Errorf("%w; its server, process %d, has yet to end", context.Cause(ctx), cmd.Process.Pid)
		}
		if n > 0 {
			return &exit{code: 1}
		}
		return context.Cause(ctx)
	}
	ready := len(result) > 0
	if ready {
		u.printf("%s", result[:len(result)-1])
	}
	switch {
	case ready && n > 0:
		return errTalkative
	case n > 0:
		return &exit{code: 1}
	case !ready:
		return errSilent
	}
	return nil
}

// endDaemon tells a daemon to end, and reports whether it has done so soon.
func endDaemon(cmd *exec.Cmd, said <-chan error) bool {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return false
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-said
		cmd.Wait()
	}()
	select {
	case <-ended:
		return true
	case <-time.After(closeTime):
		return false
	}
}

// asDaemon returns what startDaemon has passed to this process, nil if it was
// not started so.
func asDaemon() *daemon {
	fds := strings.Split(os.Getenv(daemonVariable), ",")
	os.Unsetenv(daemonVariable)
	if len(fds) != 3 {
		return nil
	}
	var files [3]*os.File
	for i, s := range fds {
		if fd, err := strconv.Atoi(s); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
			files[i] = os.NewFile(uintptr(fd), "")
		}
	}
	return &daemon{readiness: files[0], stderr: files[1], listen: files[2]}
}

// ready lets the parent go. Later messages reach nobody but whom --verbose
// kept.
func (d *daemon) ready() error { return d.readyWith("") }

// readyWith also has the parent print a result.
func (d *daemon) readyWith(result string) error {
	defer d.stderr.Close()
	_, err := d.readiness.Write(append([]byte(result), 0))
	if err != nil {
		err = fmt.Errorf("nobody waits for this server: %w", err)
	}
	return errors.Join(err, d.readiness.Close(), redirect(d.stderr, 2))
}
