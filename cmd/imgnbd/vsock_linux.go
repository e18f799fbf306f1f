package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// listenVsock listens for the guests of this host, and on its own local
// address, at a port of 32 bits.
func listenVsock(port string) (*place, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("AF_VSOCK port '%s' is not a number of 32 bits", port)
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("AF_VSOCK: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(n)})
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("AF_VSOCK port %d: %w", n, err)
	}
	l := &vsockListener{f: os.NewFile(uintptr(fd), "vsock"), addr: vsockAddr{unix.VMADDR_CID_ANY, uint32(n)}}
	return &place{
		listeners: []net.Listener{l},
		uri:       nbd.URI{Network: "vsock", Address: vsockAddr{unix.VMADDR_CID_LOCAL, uint32(n)}.String()},
	}, nil
}

// dialVsock connects to CID:PORT. The kernel gives up after two seconds.
func dialVsock(address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var numbers [2]uint32
	for i, s := range []string{host, port} {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, err
		}
		numbers[i] = uint32(n)
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("AF_VSOCK: %w", err)
	}
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Connect(fd, &unix.SockaddrVM{CID: numbers[0], Port: numbers[1]})
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, &unreachableError{address, err}
	}
	return &vsockConn{
		File:   os.NewFile(uintptr(fd), "vsock"),
		local:  vsockAddr{unix.VMADDR_CID_ANY, unix.VMADDR_PORT_ANY},
		remote: vsockAddr{numbers[0], numbers[1]},
	}, nil
}

// A vsockListener is what package net would give, if it knew the family.
type vsockListener struct {
	f    *os.File
	addr vsockAddr
}

func (l *vsockListener) Addr() net.Addr { return l.addr }
func (l *vsockListener) Close() error   { return l.f.Close() }

func (l *vsockListener) Accept() (net.Conn, error) {
	raw, err := l.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var peer unix.Sockaddr
	waitErr := raw.Read(func(listening uintptr) bool {
		fd, peer, err = unix.Accept4(int(listening), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if waitErr != nil {
		return nil, waitErr
	}
	if err != nil {
		return nil, os.NewSyscallError("accept4", err)
	}
	c := &vsockConn{File: os.NewFile(uintptr(fd), "vsock"), local: l.addr}
	if p, ok := peer.(*unix.SockaddrVM); ok {
		c.remote = vsockAddr{p.CID, p.Port}
	}
	return c, nil
}

// A vsockConn is a connection; *os.File polls, and has deadlines.
type vsockConn struct {
	*os.File
	local, remote vsockAddr
}

func (c *vsockConn) LocalAddr() net.Addr  { return c.local }
func (c *vsockConn) RemoteAddr() net.Addr { return c.remote }

// CloseWrite ends what the other side reads.
func (c *vsockConn) CloseWrite() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var shutErr error
	err = raw.Control(func(fd uintptr) { shutErr = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return errors.Join(err, os.NewSyscallError("shutdown", shutErr))
}

var _ interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	SetDeadline(time.Time) error
} = (*vsockConn)(nil)

type vsockAddr struct{ cid, port uint32 }

func (vsockAddr) Network() string { return "vsock" }
func (a vsockAddr) String() string {
	return net.JoinHostPort(strconv.FormatUint(uint64(a.cid), 10), strconv.FormatUint(uint64(a.port), 10))
}
