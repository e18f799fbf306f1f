//go:build !linux

package connect

import (
	"fmt"
	"runtime"
)

func newKernel() (kernel, error) {
	return nil, fmt.Errorf("%w: they are Linux's, this is %s", ErrUnavailable, runtime.GOOS)
}
