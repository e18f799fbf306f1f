//go:build !linux

package connect

import (
	"fmt"
	"net"
	"runtime"
)

func newKernel() (kernel, error) {
	return nil, fmt.Errorf("%w: they are Linux's, this is %s", ErrUnavailable, runtime.GOOS)
}

func hungUp(*net.UnixConn) (bool, error) { return false, ErrUnavailable }

func peerOf(int) (pid, uid int, err error) { return 0, -1, ErrUnavailable }
