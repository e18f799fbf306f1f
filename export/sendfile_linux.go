package export

import (
	"math"
	"os"

	"golang.org/x/sys/unix"
)

const canSendFile = true

var pageSize = int64(os.Getpagesize())

// sendFile sends from a place of its own in src: the file position belongs to
// nobody, so that connections can share the file.
func sendFile(dst, src int, off int64, n int) (int, error) {
	return unix.Sendfile(dst, src, &off, n)
}

// queued returns how many bytes of a Unix socket's replies were not received;
// more than there can be if the kernel does not tell.
func queued(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if err != nil {
		return math.MaxInt
	}
	return n
}

func forceSendBuffer(fd, size int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size)
}

// resident reports whether the n bytes at off of f are in the page cache;
// unknown is the answer where the kernel (before 6.5) cannot tell.
func resident(f *os.File, off, n int64, unknown bool) bool {
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var (
		in    = unix.CachestatRange{Off: uint64(off), Len: uint64(n)}
		stat  unix.Cachestat_t
		pages = uint64((off+n-1)/pageSize-off/pageSize) + 1
	)
	if err := rc.Control(func(fd uintptr) { err = unix.Cachestat(uint(fd), &in, &stat, 0) }); err != nil {
		return false
	}
	if err != nil {
		return unknown
	}
	return stat.Cache >= pages
}
