//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fileAccess is all that a version of landlock knows to forbid.
func fileAccess(abi int) uint64 {
	access := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1) // of the first
	for _, a := range []struct {
		abi    int
		access uint64
	}{
		{2, unix.LANDLOCK_ACCESS_FS_REFER},
		{3, unix.LANDLOCK_ACCESS_FS_TRUNCATE},
		{5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	} {
		if abi >= a.abi {
			access |= a.access
		}
	}
	return access
}

// newRuleset returns the descriptor of what p allows.
func newRuleset(p Policy) (fd int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("landlock: %w", err)
		}
	}()
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return -1, errno
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: fileAccess(int(abi))}
	r, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Handled_access_fs), 0)
	if errno != 0 {
		return -1, errno
	}
	for _, path := range p.Read {
		for _, dir := range dirsOf(path) {
			if err == nil {
				err = allowBelow(int(r), dir, unix.LANDLOCK_ACCESS_FS_READ_FILE)
			}
		}
	}
	for _, dir := range p.RemoveIn {
		if err == nil {
			err = allowBelow(int(r), dir, unix.LANDLOCK_ACCESS_FS_REMOVE_FILE|unix.LANDLOCK_ACCESS_FS_REMOVE_DIR)
		}
	}
	if err != nil {
		unix.Close(int(r))
		return -1, err
	}
	return int(r), nil
}

// dirsOf are the directories that path leads to: a file that is replaced is
// another one, in the same place.
func dirsOf(path string) []string {
	dirs := []string{filepath.Dir(path)}
	if real, err := filepath.EvalSymlinks(path); err == nil && filepath.Dir(real) != dirs[0] {
		dirs = append(dirs, filepath.Dir(real))
	}
	return dirs
}

// allowBelow adds a directory, if the process can get there.
func allowBelow(ruleset int, dir string, access uint64) error {
	failed := func(err error) error { return &fs.PathError{Op: "allow", Path: dir, Err: err} }
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil // nothing is there for this user
	} else if err != nil {
		return failed(err)
	}
	defer unix.Close(fd)
	// The structure of the kernel has no padding.
	attr := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if errno != 0 {
		return failed(errno)
	}
	return nil
}
