package main

import (
	"math"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// selfPath starts this very program again, even if its file was replaced.
func selfPath() (string, error) { return "/proc/self/exe", nil }

// setProcessName sets what killall and ps call this process, which after
// selfPath is "exe".
func setProcessName(name string) { os.WriteFile("/proc/self/comm", []byte(name), 0) }

// pin opens what path names to keep it: its number is not given to anything
// else as long as that is open.
func pin(path string) (*os.File, error) { return os.OpenFile(path, unix.O_PATH|unix.O_NOFOLLOW, 0) }

// dependent is for a process that ends with this one, and that signals from a
// terminal do not reach.
func dependent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// redirect makes descriptor to the same as from.
func redirect(from *os.File, to int) error { return unix.Dup3(int(from.Fd()), to, 0) }

// keepFromChildren has programs that are started inherit nothing but what they are
// given. Older kernels cannot; then there is no harm in most cases.
func keepFromChildren() { unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }

// withSocketLabel calls f so that sockets it makes have an SELinux context.
func withSocketLabel(label string, f func() error) error {
	if label == "" {
		return f()
	}
	// The context belongs to the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const attr = "/proc/thread-self/attr/sockcreate"
	if err := os.WriteFile(attr, append([]byte(label), 0), 0); err != nil {
		return says("Cannot set SELinux socket create context to %s: %s", label, strerror(err))
	}
	defer os.WriteFile(attr, nil, 0)
	return f()
}

// limitSilence has a connection end when the other side takes nothing for half
// a minute, where the kernel would go on for a quarter of an hour.
func limitSilence(network, _ string, c syscall.RawConn) (err error) {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	controlErr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 30_000)
	})
	if err == nil {
		err = controlErr
	}
	return err
}
