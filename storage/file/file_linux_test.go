package file

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

func tryOpen(path string, opt storage.Options) (*store, error) {
	s, err := Open(context.Background(), &url.URL{Scheme: "file", Path: path}, opt)
	if err != nil {
		return nil, err
	}
	return s.(*store), nil
}

func mustOpen(t testing.TB, path string, opt storage.Options) *store {
	t.Helper()
	s, err := tryOpen(path, opt)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func pass(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

// onDisk returns a directory that is not on tmpfs, as the one for temporary files may be.
func onDisk(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	var st unix.Statfs_t
	pass(t, unix.Statfs(dir, &st))
	if st.Type == unix.TMPFS_MAGIC {
		var err error
		dir, err = os.MkdirTemp("/var/tmp", "imgnbd-test-")
		pass(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	return dir
}

// memoryDir returns a directory on tmpfs.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "imgnbd-test-")
	pass(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	var st unix.Statfs_t
	pass(t, unix.Statfs(dir, &st))
	if st.Type != unix.TMPFS_MAGIC {
		t.Skip("/dev/shm is no tmpfs")
	}
	return dir
}

// requireRoot skips; internal/test/strict decides whether it may.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	t.Skip("block devices need root")
}

// loopDevice attaches a file of size bytes as a block device.
func loopDevice(t testing.TB, size int64, sector string) string {
	t.Helper()
	return loopDeviceIn(t, t.TempDir(), size, sector)
}

func loopDeviceIn(t testing.TB, dir string, size int64, sector string) string {
	t.Helper()
	qemu.Require(t, "losetup")
	requireRoot(t)
	path := filepath.Join(dir, "device")
	pass(t, os.WriteFile(path, bytes.Repeat([]byte{0xdb}, int(size)), 0o600))
	device := strings.TrimSpace(qemu.Run(t, "losetup", "--show", "--find", "--sector-size", sector, path))
	t.Cleanup(func() { qemu.Run(t, "losetup", "--detach", device) })
	return device
}

// fileTarget tests files in the directory.
func fileTarget(dir func(testing.TB) string, opt storage.Options) storagetest.Target {
	reopen := func(t testing.TB, s storage.Store) storage.Store {
		return mustOpen(t, s.Info().URL.Path, opt)
	}
	return storagetest.Target{
		New: func(t testing.TB, size int64) storage.Store {
			f, err := os.CreateTemp(dir(t), "store-")
			pass(t, err)
			pass(t, f.Truncate(size))
			pass(t, f.Close())
			return mustOpen(t, f.Name(), opt)
		},
		NewReadOnly: func(t testing.TB, content []byte) storage.Store {
			path := filepath.Join(dir(t), "readonly")
			pass(t, os.WriteFile(path, content, 0o600))
			opt := opt
			opt.Access = storage.Read
			return mustOpen(t, path, opt)
		},
		Reopen: reopen,
	}
}

func TestSuiteOnFiles(t *testing.T) {
	for name, dir := range map[string]func(testing.TB) string{"Disk": onDisk, "Memory": memoryDir} {
		t.Run(name, func(t *testing.T) {
			for name, opt := range map[string]storage.Options{
				"Buffered":  {Access: storage.WriteGrow},
				"Direct":    {Access: storage.WriteGrow, Direct: true},
				"FixedSize": {Access: storage.Write},
			} {
				t.Run(name, func(t *testing.T) {
					skipWithoutDirect(t, dir, opt)
					storagetest.Run(t, fileTarget(dir, opt))
				})
			}
		})
	}
}

// Other file systems lack other things: ext2 can neither zero in place nor
// preallocate.
func TestSuiteOnFileSystems(t *testing.T) {
	for name, mkfs := range map[string][]string{
		"Ext2": {"mkfs.ext2", "-q", "-b", "1024"},
		"XFS":  {"mkfs.xfs", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			qemu.Require(t, mkfs[0], "mount", "umount")
			requireRoot(t)
			image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
			pass(t, os.WriteFile(image, nil, 0o600))
			pass(t, os.Truncate(image, 320<<20))
			qemu.Run(t, mkfs[0], append(mkfs[1:], image)...)
			if r := qemu.Try(t, "mount", "-o", "loop", image, dir); r.Code != 0 {
				t.Skipf("this kernel does not mount it: %s", r.Stderr)
			}
			t.Cleanup(func() { qemu.Run(t, "umount", dir) })
			for _, direct := range []bool{false, true} {
				opt := storage.Options{Access: storage.WriteGrow, Direct: direct}
				storagetest.Run(t, fileTarget(func(testing.TB) string { return dir }, opt))
			}
		})
	}
}

// What is written to the block in which a file ends never lengthens the file, not
// even for a moment, in which a process could be killed.
func TestDirectTail(t *testing.T) {
	const size = 5*4096 + 700
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, make([]byte, size), 0o600))
	skipWithoutDirect(t, onDisk, storage.Options{Access: storage.WriteGrow, Direct: true})
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Direct: true})
	want := make([]byte, size)
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := range 300 {
			p := bytes.Repeat([]byte{byte(i)}, 100+i)
			copy(want[size-len(p):], p)
			if err := s.WriteAt(p, size-int64(len(p)), 0); err != nil {
				t.Error(err)
			}
		}
	}()
	for wait := true; wait; {
		select {
		case <-written:
			wait = false
		default:
			if now, err := s.Size(); err != nil || now != size {
				t.Errorf("the file has %d bytes, %v, not %d", now, err, size)
				<-written
			}
		}
	}
	got := make([]byte, size)
	_, err := s.ReadAt(got, 0)
	pass(t, err)
	if !bytes.Equal(got, want) {
		t.Error("what was written does not read back")
	}
}

// Who waits for a buffer holds no lock, or all could wait for each other.
func TestDirectWithOneBuffer(t *testing.T) {
	skipWithoutDirect(t, onDisk, storage.Options{Access: storage.WriteGrow, Direct: true})
	s := mustOpen(t, filepath.Join(t.TempDir(), "file"), storage.Options{Access: storage.WriteGrow, Create: true, Direct: true})
	s.direct.buffers = newBufferPool(s.direct.buffers.size, s.direct.buffers.align, 1)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			p := bytes.Repeat([]byte{1}, 10001)[1:]
			for range 50 {
				// Always at the end, and with whole blocks and parts of blocks.
				if err := s.WriteAt(p, next.Add(1)*int64(len(p)), 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// skipWithoutDirect skips where the file system has no direct I/O.
func skipWithoutDirect(t *testing.T, dir func(testing.TB) string, opt storage.Options) {
	t.Helper()
	opt.Create = true
	s, err := tryOpen(filepath.Join(dir(t), "probe"), opt)
	if opt.Direct && errors.Is(err, syscall.EINVAL) {
		t.Skip(err)
	}
	pass(t, err)
	s.Close()
}

func TestSuiteOnBlockDevices(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		for name, direct := range map[string]bool{"Buffered": false, "Direct": true} {
			t.Run(sector+name, func(t *testing.T) {
				opt := storage.Options{Access: storage.WriteGrow, Direct: direct}
				target := fileTarget(nil, opt)
				target.New = func(t testing.TB, size int64) storage.Store {
					return mustOpen(t, loopDevice(t, size, sector), opt)
				}
				target.NewReadOnly = nil // its content need not be whole sectors
				storagetest.Run(t, target)
			})
		}
	}
}

// Memory for direct I/O is aligned as large sectors are, though the kernel asks for
// less: drivers take it, and some err.
func TestDirectMemory(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		s := mustOpen(t, loopDevice(t, 1<<20, sector), storage.Options{Access: storage.Write, Direct: true})
		if d := s.direct; d.block > 512 && d.memory < uintptr(d.block) || fmt.Sprint(d.block) != sector {
			t.Errorf("with sectors of %s bytes, blocks of %d and memory of %d", sector, d.block, d.memory)
		}
		pass(t, s.Close())
	}
}

func TestBlockDevice(t *testing.T) {
	device := loopDevice(t, 1<<20, "512")
	s := mustOpen(t, device, storage.Options{Access: storage.Write})
	i := s.Info()
	if !i.FixedSize || i.NewReadsZero || !strings.HasPrefix(i.ID, "device 7:") {
		t.Errorf("Info of a loop device: %+v", i)
	}
	if i.FastZero != i.Discard {
		t.Errorf("a loop device zeroes and discards by the same means, but Info says %+v", i)
	}
	pass(t, s.Close())

	ro := strings.TrimSpace(qemu.Run(t, "losetup", "--show", "--find", "--read-only", device))
	defer qemu.Run(t, "losetup", "--detach", ro)
	if _, err := tryOpen(ro, storage.Options{Access: storage.Write}); !errors.Is(err, storage.ErrReadOnly) && !errors.Is(err, fs.ErrPermission) {
		t.Errorf("opening a read-only device to write: %v", err)
	}
	s = mustOpen(t, ro, storage.Options{Access: storage.Read, Direct: true})
	p := make([]byte, 7)
	if _, err := s.ReadAt(p, 1<<20-7); err != nil || p[6] != 0xdb {
		t.Errorf("reading a read-only device: %x, %v", p, err)
	}
}

// A device that cannot zero fast does not lose what was written when it is asked to,
// and neither does one of which that was not known.
func TestBlockDeviceWithoutFastZero(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	pass(t, unix.Mount("none", dir, "ramfs", 0, ""))
	t.Cleanup(func() { pass(t, unix.Unmount(dir, 0)) })
	device := loopDeviceIn(t, dir, 1<<20, "512")
	for name, call := range map[string]func(*store) error{
		"fast zero": func(s *store) error {
			err := s.WriteZeroes(0, 1<<20, storage.FastOnly|storage.MayUnmap)
			wantErr(t, err, errors.ErrUnsupported)
			return nil
		},
		"discard": func(s *store) error { return s.Discard(0, 1<<20) },
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprint(name, ", known ", known), func(t *testing.T) {
				s := mustOpen(t, device, storage.Options{Access: storage.Write})
				if s.Info().FastZero {
					t.Fatal("a loop device on ramfs zeroes fast")
				}
				if !known {
					s.noPunch.Store(false)
				}
				old, new := bytes.Repeat([]byte{1}, 1<<20), bytes.Repeat([]byte{2}, 1<<20)
				pass(t, s.WriteAt(old, 0, 0))
				pass(t, s.Sync())
				pass(t, s.WriteAt(new, 0, 0))
				pass(t, call(s))
				got := make([]byte, 1<<20)
				_, err := s.ReadAt(got, 0)
				pass(t, err)
				if !bytes.Equal(got, new) {
					t.Errorf("reads %d where 2 was written last", got[0])
				}
			})
		}
	}
}

// A device that is made larger while it is open can be written as far.
func TestBlockDeviceGrows(t *testing.T) {
	device := loopDevice(t, 64<<10, "512")
	s := mustOpen(t, device, storage.Options{Access: storage.Write})
	backing := strings.TrimSpace(qemu.Run(t, "losetup", "--noheadings", "--output", "BACK-FILE", device))
	pass(t, os.Truncate(backing, 128<<10))
	qemu.Run(t, "losetup", "--set-capacity", device)
	pass(t, s.WriteAt([]byte{1}, 128<<10-1, 0))
	wantErr(t, s.WriteAt([]byte{1}, 128<<10, 0), syscall.ENOSPC)
}

func TestRefusesOtherNodes(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	pass(t, unix.Mkfifo(fifo, 0o600))
	sock := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", sock)
	pass(t, err)
	defer l.Close()
	link := filepath.Join(dir, "link")
	pass(t, os.Symlink(fifo, link))
	for path, word := range map[string]string{
		dir: "is a directory", fifo: "is a FIFO", link: "is a FIFO", sock: "is a socket", "/dev/zero": "is a character device",
	} {
		for _, access := range []storage.Access{storage.Read, storage.WriteGrow} {
			// Create makes no difference to what exists.
			_, err := tryOpen(path, storage.Options{Access: access, Create: true})
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("open %s: error %v, want %q in it", path, err, word)
			}
		}
	}
	// A reader in the FIFO's other end would have noticed.
	if _, err := unix.Open(fifo, unix.O_WRONLY|unix.O_NONBLOCK, 0); err != unix.ENXIO {
		t.Errorf("the FIFO has a reader: %v", err)
	}
}

// Who holds a lease, as an NFS or SMB server does for its clients, is asked to
// give it up, and has the time for it.
func TestOpenBreaksLease(t *testing.T) {
	for _, access := range []storage.Access{storage.Read, storage.Write} {
		path := filepath.Join(t.TempDir(), "leased")
		pass(t, os.WriteFile(path, make([]byte, 512), 0o600))
		holder, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(holder)
		asked := make(chan os.Signal, 1)
		signal.Notify(asked, unix.SIGIO)
		defer signal.Stop(asked)
		if _, err := unix.FcntlInt(uintptr(holder), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			t.Fatal(err)
		}
		gaveUp := make(chan error, 1)
		go func() {
			<-asked
			_, err := unix.FcntlInt(uintptr(holder), unix.F_SETLEASE, unix.F_UNLCK)
			gaveUp <- err
		}()
		mustOpen(t, path, storage.Options{Access: access})
		pass(t, <-gaveUp)
	}
}

func TestNames(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	pass(t, os.WriteFile("a b?c#d", []byte("x"), 0o600))
	abs := filepath.Join(dir, "a b?c#d")
	for _, name := range []string{"a b?c#d", abs, "./a b?c#d"} {
		s := mustOpen(t, name, storage.Options{})
		if got := s.Info().URL.Path; got != abs {
			t.Errorf("%s: the URL has the path %s, want %s", name, got, abs)
		}
	}
	// A name with .. leads where the kernel says, not where the text does.
	pass(t, os.MkdirAll("one/two", 0o700))
	pass(t, os.Symlink("one/two", "link"))
	pass(t, os.WriteFile("one/inner", nil, 0o600))
	for _, name := range []string{"link/../inner", filepath.Join(dir, "link") + "/../inner"} {
		if path := mustOpen(t, name, storage.Options{}).Info().URL.Path; path != dir+"/link/../inner" {
			t.Errorf("%s: the URL has the path %s", name, path)
		}
	}
	for text, ok := range map[string]bool{
		"file:a%20b%3Fc%23d": true, "file://localhost" + url.PathEscape(abs): false,
		"file:///" + strings.ReplaceAll(url.PathEscape(abs[1:]), "%2F", "/"): true,
		"file://elsewhere/a": false, "http://localhost/a": false, "file:": false, "file:a?b": false,
	} {
		u, err := url.Parse(text)
		if err != nil {
			continue
		}
		s, err := Open(t.Context(), u, storage.Options{})
		if (err == nil) != ok {
			t.Errorf("open %s: %v", text, err)
		}
		if err == nil {
			s.Close()
		}
	}
}

// Two names of one file have one identity, which says when an image would be
// its own backing.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	id := func(name string) string {
		return mustOpen(t, filepath.Join(dir, name), storage.Options{Share: storage.ShareWrite}).Info().ID
	}
	pass(t, os.WriteFile(filepath.Join(dir, "a"), nil, 0o600))
	pass(t, os.WriteFile(filepath.Join(dir, "b"), nil, 0o600))
	pass(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "hard")))
	pass(t, os.Symlink("a", filepath.Join(dir, "soft")))
	if a := id("a"); a == id("b") || a != id("hard") || a != id("soft") {
		t.Errorf("identities: %q, %q, %q, %q", a, id("b"), id("hard"), id("soft"))
	}
}

func TestDirectRefused(t *testing.T) {
	_, err := tryOpen("/proc/version", storage.Options{Direct: true})
	wantErr(t, err, syscall.EINVAL)
	wantNoDirect(t, err)
}

func wantNoDirect(t *testing.T, err error) {
	t.Helper()
	if hint, ok := errors.AsType[*storage.Hint](err); !ok || !strings.Contains(err.Error(), "direct I/O") {
		t.Errorf("direct I/O where there is none: %v, hint %v", err, hint)
	}
}

// Where the kernel lets a file be opened for direct I/O, and then goes through the
// page cache all the same, that is no direct I/O.
func TestDirectRefusedForFile(t *testing.T) {
	qemu.Require(t, "mkfs.ext4", "mount", "umount")
	requireRoot(t)
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	pass(t, os.WriteFile(image, nil, 0o600))
	pass(t, os.Truncate(image, 64<<20))
	qemu.Run(t, "mkfs.ext4", "-q", image)
	qemu.Run(t, "mount", "-o", "loop,data=journal", image, dir)
	t.Cleanup(func() { qemu.Run(t, "umount", dir) })
	path := filepath.Join(dir, "file")
	pass(t, os.WriteFile(path, make([]byte, 4096), 0o600))
	s, err := tryOpen(path, storage.Options{Direct: true})
	if err == nil {
		pass(t, s.Close())
		if !since(6, 1) {
			t.Skip("this kernel does not tell")
		}
	}
	wantNoDirect(t, err)
}

func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	_, err := tryOpen(path, storage.Options{Access: storage.WriteGrow})
	wantErr(t, err, fs.ErrNotExist)
	_, err = tryOpen(path, storage.Options{Access: storage.Read, Create: true})
	wantErr(t, err, fs.ErrNotExist)
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	pass(t, s.WriteAt([]byte("kept"), 0, 0))
	pass(t, s.Close())
	s = mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	if size, err := s.Size(); err != nil || size != 4 {
		t.Errorf("Create of what exists: size %d, error %v", size, err)
	}
	dangling := path + "-link"
	pass(t, os.Symlink("/nowhere/at/all", dangling))
	if _, err := tryOpen(dangling, storage.Options{Access: storage.WriteGrow, Create: true}); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("behind a link to nowhere: %v", err)
	}
	for name, want := range map[string]error{path + "/": syscall.ENOTDIR, path + "-2/": syscall.EISDIR} {
		_, err := tryOpen(name, storage.Options{Access: storage.WriteGrow, Create: true})
		wantErr(t, err, want)
	}
}

// Info says whether it was this opening that made the file.
func TestCreatedIsNew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	create := storage.Options{Access: storage.WriteGrow, Create: true}
	for _, isNew := range []bool{true, false} {
		s := mustOpen(t, path, create)
		if s.Info().New != isNew {
			t.Errorf("new: %t", s.Info().New)
		}
		pass(t, s.Close())
	}
}

// Who made a file and failed removes it, perhaps after somebody else has opened
// it: what that one gets has the name.
func TestCreateWhileRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, []byte("old"), 0o600))
	removals := 0
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true, Taken: func(storage.Info) {
		if removals++; removals == 1 {
			pass(t, os.Remove(path))
		}
	}})
	named, err := os.Stat(path)
	pass(t, err)
	opened, err := s.file.Stat()
	pass(t, err)
	if !os.SameFile(named, opened) || !s.Info().New {
		t.Errorf("the store is not the file of that name; new: %t", s.Info().New)
	}
}

// Of a file that was made, but could not be opened, nothing remains.
func TestCreateFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	open := func(files uint64, direct bool) (err error) {
		free, err := os.Open(".") // has the lowest number that is free
		pass(t, err)
		lowest := uint64(free.Fd())
		pass(t, free.Close())
		var limit unix.Rlimit
		pass(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		pass(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: lowest + files, Max: limit.Max}))
		defer func() { pass(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
		s, err := tryOpen(path, storage.Options{Access: storage.WriteGrow, Create: true, Direct: direct})
		if err == nil {
			s.Close()
		}
		return err
	}
	for name, test := range map[string]struct {
		files  uint64 // that can be opened
		direct bool
	}{
		"the directory is not synced":    {1, false},
		"the page cache is not bypassed": {2, true},
	} {
		before := openFiles(t)
		if err := open(test.files, test.direct); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the file is there, %v", name, err)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d files are open, and were %d", name, after, before)
		}
	}
}

func TestUnmakeSparesWhatIsUsed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	held, made, err := hold(path, storage.Options{Access: storage.WriteGrow, Create: true})
	pass(t, err)
	defer unix.Close(held)
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow})
	pass(t, unmake(held, path))
	if _, err := os.Stat(path); err != nil || !made {
		t.Errorf("made: %t; %v", made, err)
	}
	pass(t, s.Close())
	pass(t, unmake(held, path))
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func openFiles(t *testing.T) int {
	fds, err := os.ReadDir("/proc/self/fd")
	pass(t, err)
	return len(fds)
}

// With Write the size stays, but for the rest of the last sector.
func TestWriteWithinSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, make([]byte, 1000), 0o600))
	for _, direct := range []bool{false, true} {
		s := mustOpen(t, path, storage.Options{Access: storage.Write, Direct: direct})
		wantErr(t, s.WriteAt([]byte{1, 2}, 1023, 0), syscall.ENOSPC)
		wantErr(t, s.WriteZeroes(1000, 25, 0), syscall.ENOSPC)
		pass(t, s.WriteAt([]byte{1}, 1023, 0))
		if size, err := s.Size(); err != nil || size != 1024 {
			t.Errorf("size %d, error %v", size, err)
		}
		pass(t, s.Close())
		pass(t, os.Truncate(path, 1000))
	}
}

// A failed sync is final. The kernel would report it once.
func TestSyncFailureIsFinal(t *testing.T) {
	full := filepath.Join(t.TempDir(), "file")
	s := mustOpen(t, full, storage.Options{Access: storage.WriteGrow, Create: true})
	s.barrier.err = syscall.EIO
	wantErr(t, s.Sync(), syscall.EIO)
	wantErr(t, s.WriteAt([]byte{1}, 0, storage.FUA), syscall.EIO)
	wantErr(t, s.WriteZeroes(0, 1, storage.FUA), syscall.EIO)
	pass(t, s.WriteAt([]byte{1}, 0, 0))
	wantErr(t, s.Sync(), syscall.EIO)
}

// A device whose medium runs out tells so when it is synced, and the kernel
// tells it to one sync only.
func TestSyncFailureOfTheMedium(t *testing.T) {
	qemu.Require(t, "losetup", "mount", "umount")
	requireRoot(t)
	small := t.TempDir()
	qemu.Run(t, "mount", "-t", "tmpfs", "-o", "size=1m", "imgnbd-test", small)
	t.Cleanup(func() { qemu.Run(t, "umount", small) })
	backing := filepath.Join(small, "device")
	pass(t, os.WriteFile(backing, nil, 0o600))
	pass(t, os.Truncate(backing, 16<<20))
	device := strings.TrimSpace(qemu.Run(t, "losetup", "--show", "--find", backing))
	t.Cleanup(func() { qemu.Run(t, "losetup", "--detach", device) })

	s := mustOpen(t, device, storage.Options{Access: storage.Write})
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			if err := s.WriteAt(bytes.Repeat([]byte{1}, 1<<20), i<<20, 0); err != nil {
				t.Errorf("a write to the page cache: %v", err)
			}
		})
	}
	wg.Wait()
	for range 16 {
		wg.Go(func() {
			if err := s.Sync(); err == nil {
				t.Error("Sync succeeded, but what was written is lost")
			}
		})
	}
	wg.Wait()
	t.Logf("the kernel says after it said so: %v", unix.Fdatasync(s.fd))
	if err := s.Sync(); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "until the image is opened again") {
		t.Errorf("Sync, much later: %v", err)
	}
}

func TestBarrier(t *testing.T) {
	// Each caller must see a sync that began after its call.
	var b barrier
	var wg sync.WaitGroup
	good := func() error { runtime.Gosched(); return nil }
	bad := func() error { return syscall.EIO }
	for range 50 {
		wg.Go(func() {
			before := b.begun.Load()
			if err := b.sync(good); err != nil {
				t.Error(err)
			}
			if b.begun.Load() == before {
				t.Error("returned without a sync that began after the call")
			}
		})
	}
	wg.Wait()
	b.mu.Lock()
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- b.sync(bad) }()
	}
	b.mu.Unlock()
	for range 2 {
		wantErr(t, <-done, syscall.EIO)
	}
	wantErr(t, b.sync(good), syscall.EIO)

	// Who wants to know of a failure knows before anybody else does, once.
	calls := 0
	b = barrier{failed: func() { calls++ }}
	pass(t, b.sync(good))
	if calls != 0 {
		t.Error("what has not failed is told")
	}
	for range 2 {
		wantErr(t, b.sync(bad), syscall.EIO)
		if calls != 1 {
			t.Errorf("told %d times", calls)
		}
	}
}

// Extents of a file that others shorten or fill with holes end and stay within
// bounds.
func TestExtentsUnderForeignChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	data := bytes.Repeat([]byte{1}, 1<<20)
	pass(t, s.WriteAt(data, 0, 0))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(stop)
		for i := range int64(500) {
			os.Truncate(path, i%16*65536)
			unix.Fallocate(s.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, i%32*32768, 32768)
			unix.Pwrite(s.fd, data[:65536], i%13*70000)
		}
	})
	for running := true; running; {
		select {
		case <-stop:
			running = false
		default:
		}
		off := int64(0)
		exts, err := s.AppendExtents(nil, 0, 1<<30)
		pass(t, err)
		for _, e := range exts {
			if e.Offset != off || e.Length <= 0 || e.Offset+e.Length > 2<<20 {
				t.Fatalf("extent %+v does not follow at %d", e, off)
			}
			off += e.Length
		}
	}
	wg.Wait()
}

// Where a file system lacks an operation it is asked once, and then done by
// other means, or refused if that is not fast.
func TestWithoutHoles(t *testing.T) {
	path := filepath.Join(onDisk(t), "file")
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	pass(t, s.WriteAt(bytes.Repeat([]byte{1}, 10000), 0, 0))
	s.noPunch.Store(true)
	s.noZero.Store(true)
	s.noSeek.Store(true)
	wantErr(t, s.WriteZeroes(0, 20000, storage.FastOnly), errors.ErrUnsupported)
	wantErr(t, s.WriteZeroes(0, 20000, storage.FastOnly|storage.MayUnmap), errors.ErrUnsupported)
	pass(t, s.Discard(0, 5000))
	if size, _ := s.Size(); size != 10000 {
		t.Errorf("what was refused changed the size to %d", size)
	}
	pass(t, s.WriteZeroes(10, 700000, storage.MayUnmap))
	got, err := os.ReadFile(path)
	pass(t, err)
	if want := append(bytes.Repeat([]byte{1}, 10), make([]byte, 700000)...); !bytes.Equal(got, want) {
		t.Error("zeroing by writing left other bytes")
	}
	exts, err := s.AppendExtents(nil, 0, 1<<20)
	if err != nil || len(exts) != 1 || exts[0].Hole || exts[0].Length != 700010 {
		t.Errorf("without SEEK_HOLE all is data, but: %v, %v", exts, err)
	}
	s.noTry.Store(true)
	wantErr(t, s.TryReadAt(got[:10], 0), storage.ErrWouldBlock)
}

// A range that a file system finds invalid is dealt with by other means, and the
// next one is asked about again.
func TestInvalidRange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	var no atomic.Bool
	for _, tt := range []struct{ says, want error }{
		{syscall.EINVAL, errors.ErrUnsupported}, {syscall.EIO, syscall.EIO}, {nil, nil},
	} {
		if err := s.ask(&no, 0, 1, func(int, int64, int64) error { return tt.says }); err != tt.want || no.Load() {
			t.Errorf("%v is answered by %v, remembered: %v", tt.says, err, no.Load())
		}
	}
}

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	pass(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

// What is zeroed keeps its space, with MayUnmap and Discard it is given back.
func TestSpace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow, Create: true})
	const size = 1 << 20
	fill := func() {
		pass(t, s.WriteAt(bytes.Repeat([]byte{1}, size), 0, 0))
		pass(t, s.Sync())
	}
	fill()
	pass(t, s.WriteZeroes(0, size, 0))
	if n := blocks(t, path); n < size {
		t.Errorf("zeroing left %d bytes allocated of %d", n, size)
	}
	if s.noZero.Load() {
		t.Skip("the file system here cannot zero in place")
	}
	fill()
	pass(t, s.WriteZeroes(0, size, storage.MayUnmap))
	if n := blocks(t, path); n != 0 {
		t.Errorf("zeroing with MayUnmap left %d bytes allocated", n)
	}
	fill()
	pass(t, s.Discard(0, size))
	if n := blocks(t, path); n != 0 {
		t.Errorf("Discard left %d bytes allocated", n)
	}
	pass(t, s.WriteZeroes(size, 100*size, storage.MayUnmap))
	if n := blocks(t, path); n > 65536 {
		t.Errorf("growing by zeroes with MayUnmap takes %d bytes", n)
	}
	pass(t, s.WriteZeroes(200*size, size, 0))
	if n := blocks(t, path); n < size {
		t.Errorf("growing by zeroes allocates %d bytes of %d", n, size)
	}
}

// Who ends an opening has said why.
func TestOpenCanceled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("no more")
	cancel(why)
	_, err := Open(ctx, &url.URL{Scheme: "file", Path: filepath.Join(t.TempDir(), "file")}, storage.Options{Access: storage.WriteGrow, Create: true})
	wantErr(t, err, why)
}

// Where the file system cannot read without waiting, what is in the page cache is
// read all the same, and nothing else.
func TestTryReadOfResident(t *testing.T) {
	path := filepath.Join(onDisk(t), "file")
	const size = 8<<20 + 100
	pass(t, os.WriteFile(path, bytes.Repeat([]byte{7}, size), 0o600))
	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow})
	pass(t, unix.Fdatasync(s.fd))
	pass(t, unix.Fadvise(s.fd, 0, 0, unix.FADV_DONTNEED))
	pass(t, unix.Fadvise(s.fd, 0, 0, unix.FADV_RANDOM)) // nothing is fetched that is not asked for
	s.learnThere()
	s.noTry.Store(true)
	p := make([]byte, 1<<20)
	try := func(off, n int64, want error) {
		t.Helper()
		clear(p)
		err := s.TryReadAt(p[:n], off)
		if err != want {
			t.Fatalf("TryReadAt of %d at %d: %v, want %v", n, off, err, want)
		}
		if err == nil && !bytes.Equal(p[:n], bytes.Repeat([]byte{7}, int(n))) {
			t.Fatalf("TryReadAt of %d at %d: other bytes", n, off)
		}
	}
	try(4<<20, 4096, storage.ErrWouldBlock)
	read(t, s, 4<<20, 1<<20)
	try(4<<20, 4096, nil)
	try(4<<20+1, 4095, nil)
	try(4<<20, 1<<20, nil)
	try(5<<20-1, 2, storage.ErrWouldBlock)
	try(4<<20-1, 2, storage.ErrWouldBlock)
	read(t, s, size-100, 100)
	try(size-100, 100, nil)
	try(size, 1, io.EOF)
	pass(t, s.WriteAt(bytes.Repeat([]byte{7}, 8192), 100<<20, 0))
	try(100<<20, 8192, nil)
	try(residenceMore+16<<20, 1, storage.ErrWouldBlock) // behind what is mapped
	try(math.MaxInt64-10, 10, storage.ErrWouldBlock)
}

func read(t *testing.T, s *store, off, n int64) {
	t.Helper()
	_, err := s.ReadAt(make([]byte, n), off)
	pass(t, err)
}

// Only the owner of a file, and who may act as it, is told what is in the page cache.
func TestResidenceUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	path := filepath.Join(onDisk(t), "file")
	pass(t, os.WriteFile(path, make([]byte, 1<<20), 0o666))
	s := mustOpen(t, path, storage.Options{})
	s.learnThere()
	s.noTry.Store(true)
	read(t, s, 0, 4096)
	p := make([]byte, 4096)
	pass(t, s.TryReadAt(p, 0))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) {
		// Of this thread only.
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		if errno != 0 {
			t.Fatal(errno)
		}
	}
	become(65534)
	defer become(0)
	err := s.TryReadAt(p, 0)
	become(0)
	wantErr(t, err, storage.ErrWouldBlock)
	pass(t, s.TryReadAt(p, 0))
	pass(t, os.Chown(path, 65534, -1))
	become(65534)
	err = s.TryReadAt(p, 0)
	become(0)
	pass(t, err)
}

// Where what is in the page cache is not read at once, it is tried less and less.
func TestResidenceSlow(t *testing.T) {
	path := filepath.Join(onDisk(t), "file")
	pass(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	s := mustOpen(t, path, storage.Options{})
	s.learnThere()
	read(t, s, 0, 4096)
	r := s.there.Load()
	for skips := 1; skips <= 8; skips *= 2 {
		r.took(atOnce + 1)
		for range skips {
			if r.has(0, 4096) {
				t.Fatalf("of %d tries one is made", skips)
			}
		}
		if !r.has(0, 4096) {
			t.Fatalf("after %d no try is made", skips)
		}
	}
	r.took(atOnce)
	r.took(atOnce + 1)
	if r.has(0, 4096) || !r.has(0, 4096) {
		t.Error("a fast read does not count")
	}
}

// TestTryReadOnFUSE: a file system that cannot read without waiting.
func TestTryReadOnFUSE(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	dir := t.TempDir()
	qemu.Start(t, "nbdfuse", filepath.Join(dir, "disk"), "[", qemu.Require(t, "nbdkit"), "-f", "--exit-with-parent", "pattern", "4M", "]")
	t.Cleanup(func() { pass(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	path := filepath.Join(dir, "disk")
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		} else if time.Since(began) > time.Minute {
			t.Fatal(err)
		}
	}
	s := mustOpen(t, path, storage.Options{})
	p := make([]byte, 64<<10)
	err := s.TryReadAt(p, 1<<20)
	if !s.noTry.Load() {
		t.Skip("FUSE can read without waiting here")
	}
	if err != storage.ErrWouldBlock {
		t.Fatalf("TryReadAt: %v", err)
	}
	read(t, s, 1<<20, 64<<10)
	pass(t, s.TryReadAt(p, 1<<20))
	for i := 0; i < len(p); i += 8 {
		if got := binary.BigEndian.Uint64(p[i:]); got != uint64(1<<20+i) {
			t.Fatalf("at %d: %#x", 1<<20+i, got)
		}
	}
}

// Bytes that were not read yet from the medium are not waited for.
func TestTryReadOfColdFile(t *testing.T) {
	path := filepath.Join(onDisk(t), "file")
	pass(t, os.WriteFile(path, bytes.Repeat([]byte{7}, 8<<20), 0o600))
	s := mustOpen(t, path, storage.Options{})
	pass(t, unix.Fdatasync(s.fd))
	pass(t, unix.Fadvise(s.fd, 0, 0, unix.FADV_DONTNEED))
	p := make([]byte, 4096)
	err := s.TryReadAt(p, 4<<20)
	if s.noTry.Load() {
		t.Skip("the file system here cannot read without waiting")
	}
	wantErr(t, err, storage.ErrWouldBlock)
	if err == storage.ErrUnderWay {
		// It comes by itself.
		for began := time.Now(); err != nil; err = s.TryReadAt(p, 4<<20) {
			if !errors.Is(err, storage.ErrWouldBlock) || time.Since(began) > time.Minute {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
	} else if s.begins {
		t.Errorf("TryReadAt of 4 KiB: %v", err)
	}
	if _, err := s.ReadAt(p, 4<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.TryReadAt(p, 4<<20); err != nil || p[4095] != 7 {
		t.Errorf("TryReadAt of what was just read: %v", err)
	}
}
