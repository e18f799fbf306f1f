package connect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// poller is lines by poll(2): a descriptor for each, -1 where it has ended,
// and at last one that ends the waiting.
type poller []unix.PollFd

// Data that arrives is the kernel's, and wakes nobody here. When the kernel
// has given up a socket it has shut it down, which shows as what the other end
// does.
const lineEnded = unix.POLLRDHUP

func (linux) watch(conns []net.Conn) (lines, error) {
	p := make(poller, len(conns)+1)
	for i := range p {
		p[i].Fd = -1
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	p[len(conns)] = unix.PollFd{Fd: int32(stop), Events: unix.POLLIN}
	for i, conn := range conns {
		if err := p.set(i, conn); err != nil {
			p.close()
			return nil, err
		}
	}
	return p, nil
}

func (p poller) set(place int, conn net.Conn) error {
	if end, ok := conn.(*kernelEnd); ok {
		conn = end.other // which also sees when the kernel drops its end unused
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T is not a socket", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(of uintptr) { fd, dupErr = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) })
	if errors.Is(err, net.ErrClosed) { // it has ended already
		fd, dupErr = ended()
	} else if err != nil {
		return err
	}
	if dupErr != nil {
		return dupErr
	}
	p[place] = unix.PollFd{Fd: int32(fd), Events: lineEnded}
	return nil
}

// ended returns a connection that has ended.
func ended() (int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socketpair", err)
	}
	unix.Close(fds[1])
	return fds[0], nil
}

func (p poller) wait(ctx context.Context) ([]int, error) {
	stop := &p[len(p)-1]
	told := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(told)
		unix.Write(int(stop.Fd), binary.NativeEndian.AppendUint64(nil, 1))
	})
	defer func() {
		if !cancel() {
			<-told
			unix.Read(int(stop.Fd), make([]byte, 8)) // for the next wait
		}
	}()
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if _, err := unix.Poll(p, -1); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("poll: %w", err)
		}
		var ended []int
		for i := range p[:len(p)-1] {
			if p[i].Fd >= 0 && p[i].Revents != 0 {
				unix.Close(int(p[i].Fd))
				p[i] = unix.PollFd{Fd: -1}
				ended = append(ended, i)
			}
		}
		if ended != nil {
			return ended, nil
		}
	}
}

// kept looks at the other ends, which the kernel's dropping them has hung up
// before its answer came.
func (linux) kept(conns []net.Conn) (kept []net.Conn, err error) {
	for _, conn := range conns {
		end, ok := conn.(*kernelEnd)
		if !ok {
			return kept, fmt.Errorf("%T is not an end of a socket pair", conn)
		}
		if hung, err := hungUp(end.other); err != nil {
			return kept, err
		} else if !hung {
			kept = append(kept, conn)
		}
	}
	return kept, nil
}

// hungUp reports whether the other end of a connection is closed, also where
// something is left to be read.
func hungUp(conn *net.UnixConn) (bool, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	p := []unix.PollFd{{}}
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		for {
			if _, pollErr = unix.Poll(p, 0); pollErr != unix.EINTR {
				return
			}
		}
	})
	switch {
	case errors.Is(err, net.ErrClosed): // who serves it has seen the end
		return true, nil
	case err != nil:
		return false, err
	case pollErr != nil:
		return false, fmt.Errorf("poll: %w", pollErr)
	}
	return p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0, nil
}

func (p poller) close() {
	for i := range p {
		if p[i].Fd >= 0 {
			unix.Close(int(p[i].Fd))
			p[i].Fd = -1
		}
	}
}
