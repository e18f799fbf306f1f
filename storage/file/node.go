package file

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// A node is what openNode opened and found out.
type node struct {
	fd    int
	block bool
	info  storage.Info
	try   tryMethod
	raw   bool // a file in memory that is never on a disk

	begins bool // tryNoWait has the kernel fetch what is not in the page cache

	noSeek       bool    // where data lies is not told, or not truly
	noPunch      bool    // the block device cannot
	sector       int64   // of a block device, in bytes
	directBlock  int64   // what direct I/O demands of offsets and lengths
	directMemory uintptr // and of memory
	cached       int     // with direct I/O, a descriptor without, to write to a file; else -1
}

// checkKind says what is wrong with a node of this mode, if anything is.
func checkKind(mode uint32) error {
	kind := "of an unknown kind"
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG, syscall.S_IFBLK:
		return nil
	case syscall.S_IFDIR:
		return fmt.Errorf("is a directory, not a file or a block device: %w", syscall.EISDIR)
	case syscall.S_IFIFO:
		kind = "a FIFO"
	case syscall.S_IFSOCK:
		kind = "a socket"
	case syscall.S_IFCHR:
		kind = "a character device"
	}
	return fmt.Errorf("is %s, not a file or a block device", kind)
}

// cause returns err without the name of the file, which the caller adds.
func cause(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}
