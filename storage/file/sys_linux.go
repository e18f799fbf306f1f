package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/storage"
)

// openNode opens a regular file or a block device. It first takes hold of the
// node without opening it, looks at it, and then opens what it holds, so that
// neither a driver nor the other end of a FIFO ever notices, and nobody can
// exchange the node in between.
func openNode(path string, opt storage.Options) (*node, error) {
	held, made, err := hold(path, opt)
	if err != nil {
		return nil, err
	}
	defer unix.Close(held)
	var n *node
	if made {
		dir, _ := filepath.Split(path) // not Dir, which would take "link/../x" by its text
		err = syncDir(dir)
	}
	if err == nil {
		n, err = openFound(held, path, opt)
	}
	if err != nil {
		if made {
			err = errors.Join(err, unmake(held, path))
		}
		return nil, err
	}
	n.info.New = made
	return n, nil
}

// openFound opens what hold has found or made.
func openFound(held int, path string, opt storage.Options) (*node, error) {
	var before unix.Stat_t
	if err := fstat(held, &before); err != nil {
		return nil, err
	}
	if err := checkKind(before.Mode); err != nil {
		return nil, err
	}

	flags := unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK
	if opt.Access == storage.Read {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if opt.Direct {
		flags |= unix.O_DIRECT
	}
	fd, err := openHeld(held, path, flags)
	if err == unix.EAGAIN {
		// A lease, of an NFS or SMB server for instance: whoever has it was asked, and
		// loses it after lease-break-time, 45 s.
		fd, err = openHeld(held, path, flags&^unix.O_NONBLOCK)
	}
	switch {
	case err == unix.EINVAL && opt.Direct:
		return nil, noDirect(fmt.Errorf("the file system has no direct I/O: %w", err))
	case err != nil:
		return nil, err
	}
	n, err := examine(fd, &before, opt)
	if err == nil && opt.Direct && !n.block && opt.Access != storage.Read {
		if n.cached, err = openHeld(held, path, flags&^unix.O_DIRECT); err == nil {
			if err = checkSame(n.cached, &before); err != nil {
				unix.Close(n.cached)
			}
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return n, nil
}

// noDirect is an error of direct I/O, with what to do instead.
func noDirect(err error) error {
	return &storage.Hint{Err: err, Advice: "Choose a cache mode that uses the page cache (writeback or writethrough)."}
}

// openHeld opens the node that held refers to and path named.
func openHeld(held int, path string, flags int) (int, error) {
	fd, err := open("/proc/self/fd/"+strconv.Itoa(held), flags, 0)
	if err == unix.ENOENT { // no /proc
		fd, err = open(path, flags, 0)
	}
	return fd, err
}

// checkSame says whether fd is of the node that was held.
func checkSame(fd int, held *unix.Stat_t) error {
	var st unix.Stat_t
	if err := fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev != held.Dev || st.Ino != held.Ino || st.Mode&unix.S_IFMT != held.Mode&unix.S_IFMT {
		return errors.New("was replaced while it was opened")
	}
	return nil
}

// hold returns a descriptor that refers to the node without opening it, or of a
// file that was made.
func hold(path string, opt storage.Options) (fd int, made bool, err error) {
	for try := 0; ; try++ {
		fd, err := open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != unix.ENOENT || !opt.Create || opt.Access == storage.Read {
			return fd, false, err
		}
		fd, err = open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
		if err == nil {
			return fd, true, nil
		}
		// Somebody else made it first, or it is a link to nowhere.
		if err != unix.EEXIST {
			return -1, false, err
		}
		if try == 2 {
			return -1, false, errors.New("is a symbolic link to what is not there")
		}
	}
}

// unmake removes a file that hold has made, unless somebody has taken it into
// use since: who has its lock may rely on its name.
func unmake(held int, path string) error {
	if err := lockImage(&node{fd: held}, &storage.Options{Access: storage.WriteGrow}); err != nil {
		if errors.Is(err, storage.ErrInUse) {
			err = nil
		}
		return err
	}
	return unix.Unlink(path)
}

// syncDir makes the name of a new file durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrPermission) {
		return nil // a directory that may be written but not read
	}
	if err == nil {
		err = f.Sync()
		f.Close()
	}
	err = cause(err)
	if err == unix.EINVAL || unsupported(err) {
		return nil // a file system whose directories cannot be synced
	}
	return err
}

// examine says what fd is, which has to be of the node that st tells of.
func examine(fd int, st *unix.Stat_t, opt storage.Options) (*node, error) {
	if err := checkSame(fd, st); err != nil {
		return nil, err
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags&^unix.O_NONBLOCK)
	}
	if err != nil {
		return nil, err
	}

	page := int64(os.Getpagesize())
	kind := fileSystem(fd)
	n := &node{fd: fd, cached: -1, block: st.Mode&unix.S_IFMT == unix.S_IFBLK, try: tryNoWait, sector: 512}
	disk := st.Dev
	n.info.ID = fmt.Sprintf("file %d:%d %d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	n.info.Generation = born(fd)
	preferred := int64(st.Blksize)
	if n.block {
		disk = st.Rdev
		n.info.ID = fmt.Sprintf("device %d:%d", unix.Major(disk), unix.Minor(disk))
		n.info.Generation = diskSequence(fd)
		if ro, err := unix.IoctlGetUint32(fd, unix.BLKROGET); err == nil && ro != 0 && opt.Access != storage.Read {
			return nil, fmt.Errorf("the block device is %w", storage.ErrReadOnly)
		}
		sector, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET)
		if err != nil {
			return nil, err
		}
		n.sector = int64(sector)
		if best, err := unix.IoctlGetUint32(fd, unix.BLKIOOPT); err == nil {
			preferred = int64(best)
		}
	} else if kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC {
		n.try = tryMemory
		var si unix.Sysinfo_t
		n.raw = unix.Sysinfo(&si) == nil && si.Totalswap == 0
	}
	n.begins = n.try == tryNoWait && !opt.Direct && since(5, 9)

	writable := opt.Access != storage.Read
	// FUSE does not know of what the kernel has not written to it yet.
	n.noSeek = writable && kind == unix.FUSE_SUPER_MAGIC
	n.noPunch = n.block && queueAttr(disk, "write_zeroes_max_bytes") <= 0
	n.info.FastZero = writable && !n.noPunch
	n.info.Discard = writable && (!n.block || queueAttr(disk, "discard_max_bytes") > 0)
	n.info.Rotational = queueAttr(disk, "rotational") > 0
	n.info.QueueDepth = 32
	n.info.Alignment = int(max(page, n.sector))
	if opt.Direct {
		if err := n.findAlignment(); err != nil {
			return nil, err
		}
		n.info.Alignment = int(n.directBlock)
	}
	n.info.PreferredIO = int(min(max(preferred, int64(n.info.Alignment), page), 1<<20))
	n.info.PreferredIO = int(roundUp(int64(n.info.PreferredIO), int64(n.info.Alignment)))
	return n, nil
}

// born returns when a file was made, "" where the file system does not keep it.
func born(fd int) string {
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &st) })
	if err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return ""
	}
	return fmt.Sprintf("born %d.%09d", st.Btime.Sec, st.Btime.Nsec)
}

// diskSequence returns the number of a medium that was put into a device, ""
// before Linux 5.15: a loop device gets another file, and with it a number that
// no device had before.
func diskSequence(fd int) string {
	const blkGetDiskSeq = 0x80081280
	var seq uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), blkGetDiskSeq, uintptr(unsafe.Pointer(&seq)))
	if errno != 0 {
		return ""
	}
	return fmt.Sprintf("disk %d", seq)
}

// findAlignment asks what direct I/O demands. Before Linux 6.1 only a block
// device tells; for a file a page is then enough, or the open has failed.
func (n *node) findAlignment() error {
	n.directBlock = max(n.sector, 512)
	if !n.block {
		n.directBlock = max(int64(os.Getpagesize()), 4096)
	}
	n.directMemory = uintptr(n.directBlock)
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(n.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) })
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 {
		return nil
	}
	if st.Dio_offset_align == 0 {
		return noDirect(errors.New("the file system has no direct I/O for this file"))
	}
	n.directBlock = max(int64(st.Dio_offset_align), 512)
	n.directMemory = max(uintptr(st.Dio_mem_align), 1)
	if n.directBlock > 512 {
		// As before Linux 6.0: not every driver for large sectors can with less, and
		// zram then writes the wrong bytes without a word.
		n.directMemory = max(n.directMemory, uintptr(n.directBlock))
	}
	return nil
}

// fileSystem returns the number of the kind of file system, 0 if it is not known.
func fileSystem(fd int) uint32 {
	var st unix.Statfs_t
	if retry(func() error { return unix.Fstatfs(fd, &st) }) != nil {
		return 0
	}
	return uint32(st.Type)
}

// queueAttr returns a number that the kernel tells of a disk or of the disk
// that a partition lies on, 0 if it does not.
func queueAttr(dev uint64, name string) int64 {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(dev), unix.Minor(dev))
	for _, queue := range []string{"queue/", "../queue/"} {
		if text, err := os.ReadFile(dir + queue + name); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			return n
		}
	}
	return 0
}

// since reports whether the kernel is not older than that.
func since(major, minor int) bool {
	var u unix.Utsname
	var has [2]int
	if unix.Uname(&u) != nil {
		return false
	}
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &has[0], &has[1]); n != 2 {
		return false
	}
	return has[0] > major || has[0] == major && has[1] >= minor
}

func open(path string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Open(path, flags, mode)
		return err
	})
	return fd, err
}

func sizeOf(fd int, block bool) (int64, error) {
	if block {
		var size uint64
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
		if errno != 0 {
			return 0, errno
		}
		return int64(size), nil
	}
	var st unix.Stat_t
	err := fstat(fd, &st)
	return st.Size, err
}

// fstat asks again where a signal came between: FUSE passes on what its server says.
func fstat(fd int, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(fd, st) })
}

// preadNoWait reads what is there without waiting for a medium; EAGAIN says
// that nothing is.
func preadNoWait(fd int, p []byte, off int64) (int, error) {
	v := unix.Iovec{Base: unsafe.SliceData(p)}
	v.SetLen(len(p))
	// Not raw: it may wait for a place in the queue of the disk that it asks to fetch.
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), 1, uintptr(off), uintptr(uint64(off)>>32), unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// preadMemory is a raw pread of a file in memory. It need not be whole.
func preadMemory(fd int, p []byte, off int64) int {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		return 0
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(off), 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// pwriteMemory is a raw pwrite to a file in memory. It need not be whole.
func pwriteMemory(fd int, p []byte, off int64) int {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		return 0
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(off), 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

func datasync(f *os.File, fd int) error { return unix.Fdatasync(fd) }

func punchHole(fd int, off, n int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// zeroRange zeroes and keeps allocated; a file grows.
func zeroRange(fd int, off, n int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
}

func discardBlocks(fd int, off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}

const (
	seekData = unix.SEEK_DATA
	seekHole = unix.SEEK_HOLE
)

func seek(fd int, off int64, whence int) (int64, error) {
	for {
		if at, err := syscall.Seek(fd, off, whence); err != syscall.EINTR {
			return at, err
		}
	}
}
