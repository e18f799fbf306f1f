//go:build !linux

package main

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

func selfPath() (string, error) { return os.Executable() }

func setProcessName(string) {}

func pin(string) (*os.File, error) { return nil, nil }

func dependent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func redirect(from *os.File, to int) error { return unix.Dup2(int(from.Fd()), to) }

func keepFromChildren() {}

func withSocketLabel(label string, f func() error) error {
	if label != "" {
		return errors.New("SELinux labels are for Linux")
	}
	return f()
}

func dialVsock(string) (net.Conn, error) { return nil, errors.New("AF_VSOCK is for Linux") }

func listenVsock(string) (*place, error) { return nil, errors.New("AF_VSOCK is for Linux") }

func limitSilence(string, string, syscall.RawConn) error { return nil }
