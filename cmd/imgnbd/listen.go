package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A place is where clients connect.
type place struct {
	listeners []net.Listener
	uri       nbd.URI  // of the first listener, without the export's name
	remove    func()   // what Close of the listeners leaves behind
	dirs      []string // in which that is
}

func (p *place) close() {
	for _, l := range p.listeners {
		l.Close()
	}
	if p.remove != nil {
		p.remove()
	}
}

// listen opens what the options ask for. The kernel queues clients from then
// on, as many as it allows: to be queued beyond --shared is to wait, not to be
// refused.
func (o *serveOptions) listen(ctx context.Context) (*place, error) {
	var p *place
	err := withSocketLabel(o.selinuxLabel, func() (err error) {
		switch {
		case o.vsock:
			p, err = listenVsock(o.port)
		case o.socket != "":
			p, err = listenUnix(o.socket, o.socketMode)
		case o.runCommand != "" && !o.flags.Changed("port") && !o.flags.Changed("bind"):
			p, err = listenTemporary()
		default:
			if p, err = listenTCP(ctx, o.bind, o.port); err == nil {
				for _, l := range p.listeners {
					export.PrepareListener(l, o.shared)
				}
			}
		}
		return err
	})
	if err != nil && p != nil {
		p.close()
	}
	return p, err
}

// The longest path that fits into the kernel's socket address, with its zero.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path)

// listenUnix makes a socket. Its mode is that which the umask leaves, as with
// qemu-nbd, but never open to others unless that is asked for.
func listenUnix(path string, mode *uint64) (*place, error) {
	if len(path) >= maxSocketPath {
		return nil, says("UNIX socket path '%s' is too long\nPath must be less than %d bytes", path, maxSocketPath)
	}
	// To see whose socket it is and to remove it are two steps. Without this
	// directory's lock a server that ends could remove that of its successor.
	dir, _ := os.Open(filepath.Dir(path)) // if it cannot be read, without
	var l *net.UnixListener
	var made fs.FileInfo
	var pinned *os.File // another cannot have its number
	err := inTurn(dir, func() (err error) {
		if err = removeSocket(path); err != nil {
			return err
		}
		if l, err = bindSocket(path, mode); err != nil {
			return err
		}
		if made, err = os.Lstat(path); err == nil {
			pinned, err = pin(path)
		}
		return err
	})
	if l == nil {
		dir.Close()
		return nil, err
	}
	return &place{
		listeners: []net.Listener{l},
		uri:       nbd.URI{Network: "unix", Address: path},
		dirs:      []string{filepath.Dir(path)},
		remove: func() {
			inTurn(dir, func() error {
				// By now it may be the socket of a server that came after this one.
				if now, err := os.Lstat(path); err == nil && os.SameFile(made, now) {
					os.Remove(path)
				}
				return nil
			})
			dir.Close()
			pinned.Close()
		},
	}, err
}

// inTurn calls f while no other server makes or removes a socket in a
// directory. Who has the lock for longer than that takes is none.
func inTurn(dir *os.File, f func() error) error {
	for end := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			defer syscall.Flock(int(dir.Fd()), syscall.LOCK_UN)
			break
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR || time.Now().After(end) {
			break
		}
	}
	return f()
}

// bindSocket makes a socket with a mode.
func bindSocket(path string, mode *uint64) (*net.UnixListener, error) {
	// By the umask, since a file that is changed later was open for a moment.
	umask := syscall.Umask(0o077)
	hidden := umask | 0o007
	if mode != nil {
		hidden = 0o777 &^ int(*mode)
	}
	syscall.Umask(hidden)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(umask)
	if err != nil {
		return nil, says("Failed to bind socket to %s: %s", path, strerror(err))
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// removeSocket makes way for a new socket. What is not a socket stays.
func removeSocket(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil && fi.IsDir():
		err = syscall.EISDIR
	case err == nil && fi.Mode().Type() != fs.ModeSocket:
		return says("Failed to unlink socket %s: it is not a socket", path)
	case err == nil:
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return says("Failed to unlink socket %s: %s", path, strerror(err))
	}
	return nil
}

// listenTemporary makes a socket that only this user can reach.
func listenTemporary() (*place, error) {
	failed := func(err error) (*place, error) {
		return nil, hinted(fmt.Errorf("temporary socket: %w", err), "TMPDIR says where it is made")
	}
	dir, err := os.MkdirTemp("", "imgnbd-")
	if err != nil {
		return failed(err)
	}
	p, err := listenUnix(filepath.Join(dir, "socket"), nil)
	if err != nil {
		os.Remove(dir)
		return failed(err)
	}
	inner := p.remove
	p.remove = func() {
		inner()
		os.Remove(dir)
	}
	p.dirs = append(p.dirs, filepath.Dir(dir))
	return p, nil
}

// listenTCP binds every address that the host resolves to. That some cannot
// be bound is no failure if others can.
func listenTCP(ctx context.Context, host, port string) (*place, error) {
	addrs, err := resolve(ctx, host, port)
	if err != nil {
		return nil, err
	}
	p := &place{}
	var first error
	for _, a := range addrs {
		network := "tcp" // of which :: takes both families
		if a.IP.To4() != nil {
			network = "tcp4"
		}
		l, err := net.ListenTCP(network, a)
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		p.listeners = append(p.listeners, l)
	}
	if len(p.listeners) == 0 {
		if errors.Is(first, syscall.EADDRINUSE) {
			return nil, says("Failed to find an available port: %s", strerror(first))
		}
		return nil, says("Failed to bind socket: %s", strerror(first))
	}
	bound := p.listeners[0].Addr().(*net.TCPAddr)
	name := host
	if bound.IP.IsUnspecified() {
		name = "localhost"
	}
	p.uri = nbd.URI{Network: "tcp", Address: net.JoinHostPort(name, strconv.Itoa(bound.Port))}
	return p, nil
}

// resolve finds the addresses of a host and a port as getaddrinfo does, and
// complains in its words.
func resolve(ctx context.Context, host, port string) ([]*net.TCPAddr, error) {
	failed := func(why string) ([]*net.TCPAddr, error) {
		return nil, says("address resolution failed for %s:%s: %s", host, port, why)
	}
	number, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return failed("Servname not supported for ai_socktype")
	}
	if host == "" { // every address of both families
		return []*net.TCPAddr{{Port: number}}, nil
	}
	ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsTimeout {
			return failed("Temporary failure in name resolution")
		}
		return failed("Name or service not known")
	}
	var addrs []*net.TCPAddr
	for _, ip := range ips {
		addrs = append(addrs, &net.TCPAddr{IP: ip.IP, Port: number, Zone: ip.Zone})
	}
	return addrs, nil
}
