package file

import (
	"bufio"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/storage"
)

// QEMU says what it does with an image by read locks on single bytes: byte
// 100+i for each permission i that it uses, byte 200+i for each that it lets
// nobody else use. Locks are on the open file (OFD), so two openings exclude
// each other within one process too. Read locks never exclude one another;
// who has taken theirs looks for those of others that contradict.
const (
	lockUsed     = 100
	lockUnshared = 200
)

// permission is a set of what QEMU distinguishes (docs/devel/blkdev-permissions).
type permission uint8

const (
	permRead permission = 1 << iota
	permWrite
	permWriteUnchanged
	permResize
)

var permissionNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

// permissions translates: what we use, and what others must not.
func permissions(access storage.Access, share storage.Sharing) (used, unshared permission) {
	switch used = permRead; access {
	case storage.Write:
		used |= permWrite
	case storage.WriteGrow:
		used |= permWrite | permResize
	}
	if share == storage.ShareRead {
		unshared = permWrite | permResize
	}
	return used, unshared
}

// lockImage takes the locks. Where the file system has none, it succeeds
// without, as QEMU does.
func lockImage(n *node, opt *storage.Options) error {
	if !canLock(n.fd, opt.Share) {
		return nil
	}
	used, unshared := permissions(opt.Access, opt.Share)
	if err := takeLocks(n.fd, used, unshared); err != nil {
		return err
	}
	if opt.Taken != nil {
		opt.Taken(n.info)
	}
	for i, name := range permissionNames {
		if used>>i&1 != 0 {
			if err := checkByte(n.fd, lockUnshared+i, fmt.Sprintf("%q lock", name)); err != nil {
				return err
			}
		}
		if unshared>>i&1 != 0 {
			if err := checkByte(n.fd, lockUsed+i, fmt.Sprintf("shared %q lock", name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func canLock(fd int, share storage.Sharing) bool {
	if share == storage.ShareNoLock {
		return false
	}
	_, err := otherLock(fd, lockUsed)
	return err == nil
}

func takeLocks(fd int, used, unshared permission) error {
	for i := range permissionNames {
		if used>>i&1 != 0 {
			if err := lockByte(fd, lockUsed+i); err != nil {
				return err
			}
		}
		if unshared>>i&1 != 0 {
			if err := lockByte(fd, lockUnshared+i); err != nil {
				return err
			}
		}
	}
	return nil
}

// HoldLocks implements storage.LockHolder.
func (s *store) HoldLocks() (*os.File, error) {
	if !s.gate.Enter() {
		return nil, fs.ErrClosed
	}
	defer s.gate.Leave()
	if !canLock(s.fd, s.share) {
		return nil, nil
	}
	// Not a duplicate, which would lose its locks with the store.
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(s.fd))
	if err != nil {
		return nil, err
	}
	used, unshared := permissions(s.access, s.share)
	if err := takeLocks(int(f.Fd()), used, unshared); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// unlockImage gives the locks back, which closing does only when no child that
// is being started still has the file. What has no locks refuses, and no matter.
func unlockImage(fd int) {
	l := unix.Flock_t{Type: unix.F_UNLCK, Start: lockUsed, Len: lockUnshared - lockUsed + int64(len(permissionNames))}
	_ = retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
}

func lockByte(fd, at int) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: int64(at), Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
	if err == unix.EAGAIN || err == unix.EACCES {
		return inUse(fd, at, fmt.Sprintf("lock on byte %d", at))
	}
	return err
}

func checkByte(fd, at int, what string) error {
	other, err := otherLock(fd, at)
	if err != nil || !other {
		return err
	}
	return inUse(fd, at, what)
}

func inUse(fd, at int, what string) error {
	return &storage.Hint{
		Err:    &lockError{what: what, holder: lockHolder(fd, at)},
		Advice: "end that process first, or wait until it is done with the image",
	}
}

// otherLock reports whether somebody else has a lock on the byte.
func otherLock(fd, at int) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: int64(at), Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l) })
	return l.Type != unix.F_UNLCK, err
}

// A lockError speaks as QEMU does, as scripts read that.
type lockError struct {
	what   string
	holder string // "" if nobody knows
}

const thisProcess = "this process"

func (e *lockError) Error() string {
	text := "Failed to get " + e.what + ": "
	switch e.holder {
	case "":
		return text + storage.ErrInUse.Error()
	case thisProcess:
		return text + "in use by this process already"
	}
	return text + storage.ErrInUse.Error() + " (" + e.holder + ")"
}

func (e *lockError) Unwrap() error { return storage.ErrInUse }

// lockHolder finds a process that has a lock on the byte, among those that we
// may look at. The kernel names none for locks of this kind, but shows them
// with each open file.
func lockHolder(fd, at int) string {
	inode := lockedInode(fd)
	infos, _ := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	self := strconv.Itoa(os.Getpid())
	for _, info := range infos[:min(len(infos), 20000)] {
		process := strings.Split(info, "/")[2]
		if process == self && filepath.Base(info) == strconv.Itoa(fd) || !hasLock(info, inode, at) {
			continue
		}
		if process == self {
			return thisProcess
		}
		name, err := os.ReadFile("/proc/" + process + "/comm")
		if err != nil {
			continue
		}
		return strings.TrimSpace(string(name)) + ", process " + process
	}
	return ""
}

// lockedInode names the inode of an open file as the lines of locks do. The file has
// some, as a rule. Its device need not be the one that Fstat tells: btrfs and overlayfs
// have several.
func lockedInode(fd int) string {
	for words := range locks(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) {
		return words[6]
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return ""
	}
	return fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
}

// hasLock reports whether an open file has a lock on the byte of inode.
func hasLock(info, inode string, at int) bool {
	for words := range locks(info) {
		if words[6] != inode {
			continue
		}
		first, err := strconv.Atoi(words[7])
		if err != nil || first > at {
			continue
		}
		if last, err := strconv.Atoi(words[8]); words[8] == "EOF" || err == nil && at <= last {
			return true
		}
	}
	return false
}

// locks yields the words of each lock of an open file:
//
//	lock:	1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101
func locks(info string) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		f, err := os.Open(info)
		if err != nil {
			return
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if words := strings.Fields(lines.Text()); len(words) == 9 && words[0] == "lock:" && !yield(words) {
				return
			}
		}
	}
}
