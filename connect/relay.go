package connect

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// relays carry connections that the kernel cannot use by itself, of which TLS
// is one, to sockets that it can use.
type relays struct {
	used    bool
	running sync.WaitGroup
}

// socket returns conn, or what stands for it with the kernel. It takes conn
// over, but for an error.
func (r *relays) socket(conn net.Conn) (net.Conn, error) {
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn, *kernelEnd:
		return conn, nil
	}
	ours, theirs, err := SocketPair()
	if err != nil {
		return nil, err
	}
	r.used = true
	r.running.Go(func() { relay(ours, conn) })
	return theirs, nil
}

func (r *relays) wait() { r.running.Wait() }

// farewell is about how long a server has to take what the kernel left for it.
const farewell = 5 * time.Second

// relay copies both ways until either side ends, which ends the other.
func relay(a *net.UnixConn, b net.Conn) {
	var back sync.WaitGroup
	back.Go(func() {
		io.Copy(a, b)
		// Somebody may watch it, and hold it open.
		a.CloseWrite()
		a.CloseRead()
		a.Close()
	})
	over := make(chan struct{})
	back.Go(func() { abandon(a, b, over) })
	io.Copy(b, a)
	close(over)
	b.Close()
	back.Wait()
}

// abandon closes b, which may take nothing, when the other side of a is gone.
func abandon(a *net.UnixConn, b net.Conn, over <-chan struct{}) {
	for gone := false; ; {
		select {
		case <-over:
			return
		case <-time.After(farewell):
		}
		if gone {
			b.Close()
			return
		}
		hung, err := hungUp(a)
		gone = hung || err != nil
	}
}

// A kernelEnd is the end of a connection that the kernel is to have.
type kernelEnd struct {
	*net.UnixConn
	other *net.UnixConn
}

// SocketPair returns the two ends of a connection that nobody else can reach:
// ours, and the one for the kernel.
func SocketPair() (ours *net.UnixConn, kernels net.Conn, err error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, e := net.FileConn(f)
		if f.Close(); e != nil {
			err = e
			continue
		}
		ends[i] = c.(*net.UnixConn)
	}
	if err != nil {
		for _, c := range ends {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, err
	}
	return ends[0], &kernelEnd{ends[1], ends[0]}, nil
}
