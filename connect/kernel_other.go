//go:build !linux

package connect

import (
	"fmt"
	"runtime"
)

func newKernel() (kernel, error) {
	return nil, fmt.Errorf("%w: they are Linux's, this is %s", ErrUnavailable, runtime.GOOS)
}

func peerOf(int) (pid, uid int, err error) { return 0, -1, ErrUnavailable }
