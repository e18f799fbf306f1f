package export

import (
	"errors"
	"io/fs"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/storage"
)

// errnoOf is the one map from errors of a Device to those of the protocol.
// fast is set for requests that carry FAST_ZERO, the only ones that may be
// answered by ENOTSUP.
func errnoOf(err error, fast bool) nbd.Errno {
	switch {
	case errors.Is(err, image.ErrReadOnly), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return nbd.EPERM
	case storage.NoSpace(err):
		return nbd.ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return nbd.ENOMEM
	case errors.Is(err, image.ErrOutOfRange):
		return nbd.EINVAL
	case errors.Is(err, errors.ErrUnsupported):
		if fast {
			return nbd.ENOTSUP
		}
		return nbd.EINVAL
	case errors.Is(err, fs.ErrClosed), errors.Is(err, syscall.ESHUTDOWN):
		return nbd.ESHUTDOWN
	}
	return nbd.EIO
}
