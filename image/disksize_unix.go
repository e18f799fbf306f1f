//go:build unix

package image

import (
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// diskSize returns the bytes that a local file takes on its file system, -1
// if there is no such thing.
func diskSize(s storage.Store) int64 {
	f := s.File()
	if f == nil {
		return -1
	}
	fi, err := f.Stat()
	if err != nil {
		return -1
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return int64(st.Blocks) * 512
}
