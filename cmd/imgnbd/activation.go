package main

import (
	"errors"
	"net"
	"os"
	"strconv"
	"syscall"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// firstActivated is the descriptor that systemd and its kin pass first.
const firstActivated = 3

// activated returns how many listening sockets whoever started the process has
// passed to it. It takes the variables that say so out of the environment: what
// this process starts is not meant.
func activated() (int, error) {
	pid, err := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return 0, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil {
		return 0, nil
	}
	os.Unsetenv("LISTEN_PID")
	os.Unsetenv("LISTEN_FDS")
	os.Unsetenv("LISTEN_FDNAMES")
	for fd := firstActivated; fd < firstActivated+n; fd++ {
		if err := closeOnExec(fd); err != nil {
			return 0, says("Socket activation failed: invalid file descriptor fd = %d: %s", fd, strerror(err))
		}
	}
	return max(n, 0), nil
}

func closeOnExec(fd int) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	syscall.CloseOnExec(fd)
	return nil
}

// checkActivation refuses what contradicts n sockets that are there already.
func (o *serveOptions) checkActivation(u *ui, n int) error {
	for _, f := range []struct{ flag, what string }{
		{"connect", "NBD device"},
		{"socket", "Unix socket"},
		{"bind", "The interface"},
		{"port", "TCP port number"},
		{"selinux-label", "SELinux label"},
		{"vsock", "AF_VSOCK"},
		{"stdio", "Standard input"},
	} {
		if o.flags.Changed(f.flag) {
			return says("%s can't be set when using socket activation", f.what)
		}
	}
	if o.list {
		return says("List mode is incompatible with socket activation")
	}
	if n > 1 {
		return says("%s does not support socket activation with LISTEN_FDS > 1", u.name)
	}
	return nil
}

// listenOn listens on a socket that was passed to the process.
func listenOn(f *os.File) (*place, error) {
	l, err := net.FileListener(f)
	f.Close()
	if errors.Is(err, syscall.ENOTSOCK) {
		return nil, says("Failed to use socket activation: Unable to query remote socket address: %s", strerror(err))
	} else if err != nil {
		return nil, says("Failed to use socket activation: %s", strerror(err))
	}
	p := &place{listeners: []net.Listener{l}, uri: nbd.URI{Network: "tcp", Address: l.Addr().String()}}
	if a, ok := l.Addr().(*net.UnixAddr); ok {
		p.uri = nbd.URI{Network: "unix", Address: a.Name}
		l.(*net.UnixListener).SetUnlinkOnClose(false) // not ours
	}
	return p, nil
}
