// Package file keeps bytes in a file or on a block device of this host.
//
// It owns what makes that safe and fast: the kinds of node that it refuses to
// open, QEMU's image locks, alignment for direct I/O, the ways to zero and to
// give back space that a file system or a device may or may not have, and the
// rule that a failed sync is never followed by one that succeeds. It knows
// nothing of what the bytes mean.
package file

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/storage"
)

// Protocol returns the row of the table of protocols.
func Protocol() storage.Protocol {
	return storage.Protocol{Name: "file", Open: Open, Remove: remove}
}

// remove removes a file. Stores that are open stay as they are.
func remove(_ context.Context, u *url.URL) error {
	path, err := pathOf(u)
	if err != nil {
		return err
	}
	return cause(os.Remove(path))
}

// Open opens the regular file or the block device that u names. The path may
// be relative, and is then also accepted as the opaque part (file:disk.img).
// Nothing else is opened, not even for a moment: a FIFO, a socket, a character
// device and a directory are refused.
//
// With storage.Write the size is that of opening, rounded up to whole sectors
// of 512 bytes; a regular file grows further only with storage.WriteGrow.
//
// The error of a lock that another process holds wraps storage.ErrInUse and a
// storage.Hint. A file system without locks of this kind is used without.
func Open(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
	path, err := pathOf(u)
	if err != nil {
		return nil, err
	}
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		s, err := openStore(path, opt)
		if err != nil {
			return nil, err
		}
		if !opt.Create {
			return s, nil
		}
		// Who made it and failed may have removed it before we had its lock.
		named, err := s.named(path)
		if err == nil && named {
			return s, nil
		}
		if err := errors.Join(err, s.Close()); err != nil {
			return nil, err
		}
	}
}

// named reports whether s is what path names.
func (s *store) named(path string) (bool, error) {
	opened, err := s.file.Stat()
	if err != nil {
		return false, cause(err)
	}
	now, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(opened, now), cause(err)
}

func openStore(path string, opt storage.Options) (*store, error) {
	n, err := openNode(path, opt)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(n.fd), path)
	s, err := newStore(f, n, opt)
	if err != nil {
		f.Close()
		if n.cached >= 0 {
			syscall.Close(n.cached)
		}
		return nil, err
	}
	return s, nil
}

func pathOf(u *url.URL) (string, error) {
	path := u.Path
	switch {
	case u.Scheme != "" && u.Scheme != "file":
		return "", fmt.Errorf("%s is not a file URL", u.Redacted())
	case u.Host != "" && u.Host != "localhost":
		return "", fmt.Errorf("a file URL names no host but localhost, not %q", u.Host)
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return "", errors.New("a file URL has no query and no fragment (write ? as %3F and # as %23)")
	case u.Opaque != "":
		var err error
		if path, err = url.PathUnescape(u.Opaque); err != nil {
			return "", err
		}
	}
	if path == "" {
		return "", errors.New("the file name is empty")
	}
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			return "", err
		}
		path = dir + "/" + path
	}
	if strings.Contains(path, "..") || strings.HasSuffix(path, "/") {
		return path, nil // "link/../x" lies where the link leads, and "x/" is no file
	}
	return filepath.Clean(path), nil
}

// A store is a regular file or a block device.
type store struct {
	file   *os.File // owns fd
	fd     int
	block  bool  // a block device, not a regular file
	sector int64 // of a block device, in bytes
	info   storage.Info
	gate   storage.Gate
	access storage.Access
	share  storage.Sharing

	limit   atomic.Int64 // with info.FixedSize: what may be written
	barrier barrier
	direct  *direct // nil: through the page cache
	raw     bool    // short calls are raw
	writers writers

	try    tryMethod
	begins bool                      // tryNoWait has the kernel fetch what is not in the page cache
	there  atomic.Pointer[residence] // where noTry
	// What the medium answered EOPNOTSUPP to; it is not asked again.
	noTry, noPunch, noZero, noSeek, noDiscard atomic.Bool
	punches                                   atomic.Bool // the block device can
}

// A tryMethod is a way to read without waiting.
type tryMethod uint8

const (
	tryNever  tryMethod = iota
	tryNoWait           // the kernel says whether it would wait
	tryMemory           // the file system is memory: it does not wait
)

func newStore(f *os.File, n *node, opt storage.Options) (*store, error) {
	s := &store{file: f, fd: n.fd, block: n.block, sector: n.sector, try: n.try, access: opt.Access, share: opt.Share}
	s.barrier.failed = opt.SyncFailed
	if err := lockImage(n, &opt); err != nil {
		unlockImage(n.fd)
		return nil, err
	}
	s.begins, s.raw = n.begins, n.raw && !opt.Direct
	s.noPunch.Store(n.noPunch)
	s.noSeek.Store(n.noSeek)
	s.info = n.info
	s.info.URL = &url.URL{Scheme: "file", Path: f.Name()}
	s.info.ReadOnly = opt.Access == storage.Read
	s.info.FixedSize = n.block || opt.Access == storage.Write
	s.info.NewReadsZero = !n.block
	if opt.Direct {
		s.direct = newDirect(n)
		s.try = tryNever
	}
	if s.info.FixedSize {
		if err := s.setLimit(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *store) Info() storage.Info { return s.info }

func (s *store) File() *os.File {
	if s.direct != nil {
		return nil
	}
	return s.file
}

func (s *store) ReadAt(p []byte, off int64) (int, error) {
	if err := s.enter(off, int64(len(p))); err != nil {
		return 0, err
	}
	defer s.gate.Leave()
	if s.direct != nil {
		return s.direct.read(s.fd, p, off)
	}
	return readFull(s.fd, p, off, 1)
}

func (s *store) TryReadAt(p []byte, off int64) error {
	if err := s.enter(off, int64(len(p))); err != nil {
		return err
	}
	defer s.gate.Leave()
	switch s.try {
	case tryNoWait:
		if !s.noTry.Load() {
			return s.readNoWait(p, off)
		}
		return s.readThere(p, off)
	case tryMemory:
		if s.raw && len(p) <= rawMost && preadMemory(s.fd, p, off) == len(p) {
			return nil
		}
		_, err := readFull(s.fd, p, off, 1)
		return err
	}
	return storage.ErrWouldBlock
}

// fetched is how many bytes a read that must not wait has the kernel fetch at
// least, if they are not in the page cache. By default it is 128 KiB; where it is
// less, or the file system had no time to begin, only time is lost.
const fetched = 64 << 10

func (s *store) readNoWait(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := preadNoWait(s.fd, p, off)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN && s.begins && len(p) <= fetched:
			return storage.ErrUnderWay
		case err == syscall.EAGAIN:
			return storage.ErrWouldBlock
		case unsupported(err) || err == syscall.EINVAL:
			s.learnThere()
			s.noTry.Store(true)
			return s.readThere(p, off)
		case err != nil:
			return err
		case n == 0:
			return io.EOF
		default:
			p, off = p[n:], off+int64(n)
		}
	}
	return nil
}

// learnThere asks for the residence, once.
func (s *store) learnThere() {
	size, err := s.size()
	if err != nil {
		return
	}
	if r := newResidence(s.fd, size, !s.info.FixedSize && !s.info.ReadOnly); r != nil && !s.there.CompareAndSwap(nil, r) {
		r.close()
	}
}

// readThere reads what is in the page cache. The read may wait all the same: where it
// was taken from there meanwhile, or the file system asks a server about the file.
func (s *store) readThere(p []byte, off int64) error {
	r := s.there.Load()
	if r == nil || !r.has(off, int64(len(p))) {
		return storage.ErrWouldBlock
	}
	start := time.Now()
	_, err := readFull(s.fd, p, off, 1)
	r.took(time.Since(start))
	return err
}

func (s *store) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if err := s.enterToWrite(off, int64(len(p))); err != nil {
		return err
	}
	defer s.gate.Leave()
	if err := s.write(p, off); err != nil {
		return err
	}
	return s.finish(flags)
}

func (s *store) write(p []byte, off int64) error {
	if s.direct != nil {
		return s.direct.write(s, p, off)
	}
	if s.raw && len(p) <= rawMost && s.writers.short() {
		n := pwriteMemory(s.fd, p, off)
		s.writers.shortDone()
		if n == len(p) {
			return nil
		}
	}
	s.writers.long()
	defer s.writers.longDone()
	return writeFull(s.fd, p, off)
}

// finish ends a write. A write with RWF_DSYNC would be one call less, but
// where it fails nobody could tell the data from a sync that failed for all.
func (s *store) finish(flags storage.WriteFlags) error {
	if flags&storage.FUA == 0 {
		return nil
	}
	return s.barrier.sync(s.datasync)
}

func (s *store) Sync() error {
	if !s.gate.Enter() {
		return fs.ErrClosed
	}
	defer s.gate.Leave()
	if s.info.ReadOnly {
		return nil
	}
	return s.barrier.sync(s.datasync)
}

func (s *store) datasync() error { return datasync(s.file, s.fd) }

func (s *store) Size() (int64, error) {
	if !s.gate.Enter() {
		return 0, fs.ErrClosed
	}
	defer s.gate.Leave()
	return s.size()
}

func (s *store) size() (int64, error) { return sizeOf(s.fd, s.block) }

func (s *store) Truncate(size int64) error {
	if err := s.enterToWrite(size, 0); err != nil {
		return err
	}
	defer s.gate.Leave()
	if s.info.FixedSize {
		if now, err := s.size(); err != nil || now == size {
			return err
		}
		return errors.ErrUnsupported
	}
	defer s.lockAll()()
	s.writers.long()
	defer s.writers.longDone()
	return retry(func() error { return syscall.Ftruncate(s.fd, size) })
}

func (s *store) Close() error {
	if !s.gate.Close() {
		return fs.ErrClosed
	}
	unlockImage(s.fd)
	if r := s.there.Load(); r != nil {
		r.close()
	}
	err := cause(s.file.Close())
	if s.direct != nil {
		err = cmp.Or(err, s.direct.close())
	}
	return err
}

// enter begins a call about [off, off+n).
func (s *store) enter(off, n int64) error {
	if err := storage.CheckRange(off, n); err != nil {
		return err
	}
	if !s.gate.Enter() {
		return fs.ErrClosed
	}
	return nil
}

// enterToWrite begins a call that writes [off, off+n).
func (s *store) enterToWrite(off, n int64) error {
	if s.info.ReadOnly {
		return storage.ErrReadOnly
	}
	if err := s.enter(off, n); err != nil {
		return err
	}
	if !s.info.FixedSize || off+n <= s.limit.Load() || n == 0 {
		return nil
	}
	// A device may have been made larger since.
	err := s.setLimit()
	if err == nil && off+n > s.limit.Load() {
		err = syscall.ENOSPC
	}
	if err != nil {
		s.gate.Leave()
	}
	return err
}

func (s *store) setLimit() error {
	size, err := s.size()
	if err == nil {
		s.limit.Store(roundUp(size, 512))
	}
	return err
}

// readFull is io.ReaderAt by pread. Where align is more than 1, it is what
// offsets must be a multiple of.
func readFull(fd int, p []byte, off, align int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := syscall.Pread(fd, p[done:], off+int64(done))
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
		// Direct I/O ends within a block only at the end of the file.
		if n == 0 || done < len(p) && (off+int64(done))%align != 0 {
			return done, io.EOF
		}
	}
	return done, nil
}

// writeFull writes all of p. A short write is carried on: if there is a
// reason for it, the rest tells.
func writeFull(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := syscall.Pwrite(fd, p, off)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// retry calls f until it is not interrupted by a signal.
func retry(f func() error) error {
	for {
		if err := f(); err != syscall.EINTR {
			return err
		}
	}
}

// unsupported reports whether err says that a file system or a device does not
// know an operation at all.
func unsupported(err error) bool {
	switch err {
	case syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.ENODEV, syscall.ENOTTY:
		return true
	}
	return false
}

func roundUp(n, to int64) int64   { return (n + to - 1) / to * to }
func roundDown(n, to int64) int64 { return n / to * to }
