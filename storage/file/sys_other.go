//go:build unix && !linux

package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// Elsewhere than on Linux a file is used as any Unix can: regular files only,
// through the page cache, without holes and without locks.

func openNode(path string, opt storage.Options) (*node, error) {
	if opt.Direct {
		return nil, fmt.Errorf("direct I/O: %w here", errors.ErrUnsupported)
	}
	flags := syscall.O_CLOEXEC | syscall.O_NOCTTY | syscall.O_NONBLOCK
	if opt.Access == storage.Read {
		flags |= syscall.O_RDONLY
	} else {
		flags |= syscall.O_RDWR
	}
	var before syscall.Stat_t
	err := retry(func() error { return syscall.Stat(path, &before) })
	if errors.Is(err, fs.ErrNotExist) && opt.Create && opt.Access != storage.Read {
		flags |= syscall.O_CREAT | syscall.O_EXCL
	} else if err != nil {
		return nil, err
	} else if err := checkKind(uint32(before.Mode)); err != nil {
		return nil, err
	}
	n := &node{cached: -1, sector: 512}
	err = retry(func() error {
		n.fd, err = syscall.Open(path, flags, 0o644)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := n.examine(); err != nil {
		syscall.Close(n.fd)
		return nil, err
	}
	n.info.New = flags&syscall.O_CREAT != 0
	return n, nil
}

func (n *node) examine() error {
	var st syscall.Stat_t
	if err := syscall.Fstat(n.fd, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fmt.Errorf("is not a regular file: %w here", errors.ErrUnsupported)
	}
	if err := syscall.SetNonblock(n.fd, false); err != nil {
		return err
	}
	n.info = storage.Info{
		ID:          fmt.Sprintf("file %d %d", st.Dev, st.Ino),
		Alignment:   os.Getpagesize(),
		PreferredIO: os.Getpagesize(),
		QueueDepth:  32,
	}
	return nil
}

func lockImage(*node, *storage.Options) error { return nil }

func unlockImage(int) {}

func sizeOf(fd int, _ bool) (int64, error) {
	var st syscall.Stat_t
	err := syscall.Fstat(fd, &st)
	return st.Size, err
}

// datasync leaves it to os, which knows how to reach the medium.
func datasync(f *os.File, _ int) error { return cause(f.Sync()) }

func preadNoWait(int, []byte, int64) (int, error) { return 0, syscall.ENOSYS }

func preadMemory(int, []byte, int64) int  { return 0 }
func pwriteMemory(int, []byte, int64) int { return 0 }

func punchHole(_ int, _, _ int64) error     { return syscall.ENOSYS }
func zeroRange(_ int, _, _ int64) error     { return syscall.ENOSYS }
func discardBlocks(_ int, _, _ int64) error { return syscall.ENOSYS }

const seekData, seekHole = 0, 0

func seek(int, int64, int) (int64, error) { return 0, syscall.ENOSYS }
