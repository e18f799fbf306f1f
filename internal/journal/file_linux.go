package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// patience is how long somebody may take to let go of a journal whose image we
// have locked: another reader of its header, or the end of a process.
const patience = 10 * time.Second

// A file is a journal that is in use.
type file struct {
	dir    int // -1 once closed
	name   string
	path   string
	fd     int
	mapped []byte
}

func (f *file) Name() string   { return f.path }
func (f *file) Memory() []byte { return f.mapped[headerSize:firstSize] }

// Grow implements [image.Journal].
func (f *file) Grow() error {
	if err := retry(func() error { return unix.Fallocate(f.fd, 0, 0, fileSize) }); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

func (f *file) empty() bool {
	return f.mapped == nil || binary.NativeEndian.Uint64(f.mapped[headerSize:]) == 0
}

func (f *file) Close() error {
	if f.dir < 0 {
		return nil
	}
	var err error
	if f.mapped != nil && f.empty() {
		if err = f.remove(); errors.Is(err, fs.ErrPermission) {
			// The process has become another user: a file with nothing in it is
			// as good as none.
			err = unix.Ftruncate(f.fd, 0)
		}
	}
	return errors.Join(err, f.release())
}

// remove removes the file while its lock is held.
func (f *file) remove() error {
	if err := unix.Unlinkat(f.dir, f.name, 0); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", f.path, err)
	}
	return nil
}

// release lets go of the file, and leaves it where it is.
func (f *file) release() error {
	var err error
	if f.mapped != nil {
		err = unix.Munmap(f.mapped)
		f.mapped = nil
	}
	if f.fd >= 0 {
		err = errors.Join(err, unix.Close(f.fd))
	}
	err = errors.Join(err, unix.Close(f.dir))
	f.dir = -1
	return err
}

// Open implements [image.Journals].
func (j *Files) Open(info storage.Info) (image.Journal, error) {
	now, name, err := j.identify(info)
	if err != nil && j.Continue {
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return nil, j.without(err)
	}
	for _, dir := range j.places() {
		f, err := find(dir, name, now)
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue
		}
		if err := j.take(f, now); err != nil {
			return nil, errors.Join(err, f.release())
		}
		return f, nil
	}
	if j.Continue {
		return nil, ErrGone
	}
	if j.Off {
		return nil, nil
	}
	var causes []string
	for _, dir := range j.Dirs {
		f, err := create(dir, name, now)
		if err == nil {
			return f, nil
		}
		causes = append(causes, err.Error())
	}
	return nil, j.without(errors.New(strings.Join(causes, "; ")))
}

// take makes a journal that was left ours.
func (j *Files) take(f *file, now *header) error {
	var was header
	copy(was[:], f.mapped)
	if j.Continue && !bytes.Equal(was.holder(), now.holder()) {
		return ErrGone
	}
	// In one piece: a process that dies leaves the old header or the new one.
	if _, err := unix.Pwrite(f.fd, now[:], 0); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

// places are the directories where a process may have left a journal.
func (j *Files) places() []string { return slices.Concat(j.Dirs, j.Also) }

func (j *Files) without(cause error) error {
	if j.Off {
		return nil
	}
	if j.Without == nil {
		return cause
	}
	return j.Without(cause)
}

// Left implements [image.Journals].
func (j *Files) Left(info storage.Info) string {
	now, name, err := j.identify(info)
	if err != nil {
		return ""
	}
	for _, dir := range j.places() {
		if left(dir, name, now) {
			return filepath.Join(dir, name)
		}
	}
	return ""
}

// Remove implements [image.Journals].
func (j *Files) Remove(info storage.Info) error {
	now, name, err := j.identify(info)
	if err != nil {
		return nil
	}
	for _, dir := range j.places() {
		f, err := find(dir, name, now)
		if err != nil {
			return err
		}
		if f != nil {
			if err := errors.Join(f.remove(), f.release()); err != nil {
				return err
			}
		}
	}
	return nil
}

// identify returns what the journal of an image has in its header, and its
// name.
func (j *Files) identify(info storage.Info) (*header, string, error) {
	name, err := fileName(info.ID)
	if err != nil {
		return nil, "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, "", err
	}
	h, err := newHeader(strings.TrimSpace(string(boot)), j.Holder, info)
	return &h, name, err
}

// find opens the journal that a process left in dir. One that is past is
// removed. nil: there is none, or nothing in it.
func find(dir, name string, now *header) (*file, error) {
	for {
		f, err := openFile(dir, name)
		if err != nil || f == nil {
			return nil, err
		}
		removed, err := f.lock(unix.LOCK_EX)
		if err == nil && removed {
			err = f.release()
			if err == nil {
				continue
			}
			return nil, err
		}
		if err == nil {
			err = f.check(now)
		}
		if err != nil || f.mapped == nil {
			return nil, errors.Join(err, f.release())
		}
		return f, nil
	}
}

// check maps a file that was found if its contents count, and else removes it.
func (f *file) check(now *header) error {
	what, err := f.compare(now)
	switch {
	case err != nil:
		return err
	case what == same:
		return f.mmap()
	case what == foreign:
		return foreignError(f.path)
	}
	return f.remove()
}

// compare tells what is in a file that was found.
func (f *file) compare(now *header) (standing, error) {
	var st unix.Stat_t
	err := unix.Fstat(f.fd, &st)
	var was header
	var first [8]byte
	if err == nil {
		_, err = unix.Pread(f.fd, was[:], 0)
	}
	if err == nil {
		_, err = unix.Pread(f.fd, first[:], headerSize)
	}
	if err != nil {
		return foreign, fmt.Errorf("%s: %w", f.path, err)
	}
	if binary.NativeEndian.Uint64(first[:]) == 0 {
		return past, nil // nothing is
	}
	what := was.compare(now)
	if what == same && st.Size != fileSize {
		what = foreign
	}
	return what, nil
}

// left reports whether a process that is dead left a journal in dir.
func left(dir, name string, now *header) bool {
	f, err := openFile(dir, name)
	if err != nil || f == nil {
		return false
	}
	defer f.release()
	if unix.Flock(f.fd, unix.LOCK_SH|unix.LOCK_NB) != nil {
		return false
	}
	what, err := f.compare(now)
	return err == nil && what == same
}

// create makes an empty journal. The first of its memory is there, a write to it
// cannot find the file system full; the rest takes the kernel longer to clear
// than anything else at a start. It gets its name when it is complete and locked, so
// that a process which dies meanwhile leaves nothing.
func create(dir, name string, now *header) (*file, error) {
	d, err := openDir(dir, true)
	if err != nil {
		return nil, err
	}
	f := &file{dir: d, name: name, path: filepath.Join(dir, name), fd: -1}
	if err := f.begin(now); err != nil {
		return nil, errors.Join(err, f.release())
	}
	return f, nil
}

func (f *file) begin(now *header) error {
	err := retry(func() (err error) {
		f.fd, err = unix.Openat(f.dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err == nil {
		err = retry(func() error { return unix.Ftruncate(f.fd, fileSize) })
	}
	if err == nil {
		err = retry(func() error { return unix.Fallocate(f.fd, 0, 0, firstSize) })
	}
	if err == nil {
		err = f.mmap()
	}
	if err == nil {
		copy(f.mapped, now[:])
		err = unix.Flock(f.fd, unix.LOCK_EX) // nobody else knows of it
	}
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.fd), f.dir, f.name, unix.AT_SYMLINK_FOLLOW)
	}
	switch err {
	case nil:
		return nil
	case unix.EEXIST: // somebody without a lock on the image
		return inUse(f.path)
	}
	return fmt.Errorf("%s: %w", f.path, err)
}

func (f *file) mmap() (err error) {
	f.mapped, err = unix.Mmap(f.fd, 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return err
}

// lock takes the lock of a user. removed says that the file has no name any
// more: its last user was about to remove it.
func (f *file) lock(how int) (removed bool, err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		err := retry(func() error { return unix.Flock(f.fd, how|unix.LOCK_NB) })
		if err == nil {
			break
		}
		if err != unix.EWOULDBLOCK {
			return false, fmt.Errorf("%s: %w", f.path, err)
		}
		if time.Now().After(deadline) {
			return false, inUse(f.path)
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return false, fmt.Errorf("%s: %w", f.path, err)
	}
	return st.Nlink == 0, nil
}

// openFile opens a file of dir that is ours. It returns nil if there is none, or
// no directory where one could be.
func openFile(dir, name string) (*file, error) {
	d, err := openDir(dir, false)
	if err != nil {
		return nil, nil // nothing of ours can be there
	}
	path := filepath.Join(dir, name)
	var fd int
	err = retry(func() error {
		fd, err = unix.Openat(d, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
		return err
	})
	if err != nil {
		unix.Close(d)
		if err == unix.ENOENT {
			return nil, nil
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f := &file{dir: d, name: name, path: path, fd: fd}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1 || !private(&st)) {
		err = errors.New("is not a file of this user alone")
	}
	if err != nil {
		f.release()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// openDir opens a directory that nobody else can change, on a tmpfs.
func openDir(path string, making bool) (int, error) {
	d, err := unix.Open(path, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT && making {
		return makeDir(path)
	}
	if err != nil {
		return -1, fmt.Errorf("%s: %w", path, err)
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err = unix.Fstat(d, &st); err == nil {
		err = retry(func() error { return unix.Fstatfs(d, &fs) })
	}
	switch {
	case err != nil:
	case !inMemory(&fs):
		err = errNotMemory
	case int(st.Uid) != unix.Geteuid() || st.Mode&0o022 != 0:
		err = errors.New("is not a directory of this user alone")
	}
	if err != nil {
		unix.Close(d)
		return -1, fmt.Errorf("%s %w", path, err)
	}
	return d, nil
}

// makeDir makes a directory, on a tmpfs, and opens it.
func makeDir(path string) (int, error) {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(filepath.Dir(path), &fs) }); err != nil {
		return -1, fmt.Errorf("mkdir %s: %w", path, err)
	}
	if !inMemory(&fs) {
		return -1, fmt.Errorf("%s %w", path, errNotMemory)
	}
	if err := unix.Mkdir(path, 0o700); err != nil && err != unix.EEXIST {
		return -1, fmt.Errorf("mkdir %s: %w", path, err)
	}
	return openDir(path, false)
}

var errNotMemory = errors.New("is not on a tmpfs")

func inMemory(fs *unix.Statfs_t) bool { return uint32(fs.Type) == unix.TMPFS_MAGIC }

// private reports whether a file is ours, and nobody else's.
func private(st *unix.Stat_t) bool {
	return int(st.Uid) == unix.Geteuid() && st.Mode&0o077 == 0
}

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
