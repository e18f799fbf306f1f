package file

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
)

// A lazyFile is a file of zeros on FUSE, all of it a hole. What is written to it does
// not arrive before arrives is closed.
type lazyFile struct {
	fs.Inode
	size    int64
	arrives chan struct{}

	interrupted atomic.Int32 // so many times it says that a signal came between
}

func (f *lazyFile) interrupt() bool { return f.interrupted.Add(-1) >= 0 }

func (f *lazyFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if f.interrupt() {
		return syscall.EINTR
	}
	out.Size, out.Mode = uint64(f.size), 0o600
	return 0
}

func (f *lazyFile) Setattr(ctx context.Context, h fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return f.Getattr(ctx, h, out)
}

func (f *lazyFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (f *lazyFile) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	clear(p)
	return fuse.ReadResultData(p[:max(min(int64(len(p)), f.size-off), 0)]), 0
}

func (f *lazyFile) Write(_ context.Context, _ fs.FileHandle, p []byte, _ int64) (uint32, syscall.Errno) {
	<-f.arrives
	return uint32(len(p)), 0
}

func (f *lazyFile) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	if f.interrupt() {
		return 0, syscall.EINTR
	}
	if whence == seekData {
		return 0, syscall.ENXIO
	}
	return off, 0
}

func (f *lazyFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

// Where the kernel keeps what is written to a file of FUSE, the file system has not
// seen it yet when it is asked for holes.
func TestExtentsOnFUSE(t *testing.T) {
	qemu.Require(t, "umount")
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	dir := t.TempDir()
	lazy := &lazyFile{size: 4 << 20, arrives: make(chan struct{})}
	root := new(fs.Inode)
	opt := &fs.Options{OnAdd: func(ctx context.Context) {
		root.AddChild("disk", root.NewPersistentInode(ctx, lazy, fs.StableAttr{Mode: syscall.S_IFREG}), false)
	}}
	opt.MountOptions = fuse.MountOptions{FsName: "imgnbd-test", Name: "test", DirectMountStrict: true, ExtraCapabilities: fuse.CAP_WRITEBACK_CACHE}
	server, err := fs.Mount(dir, root, opt)
	pass(t, err)
	t.Cleanup(func() { qemu.Run(t, "umount", "-l", dir); server.Wait() })
	path := filepath.Join(dir, "disk")

	for times := range int32(10) { // wherever opening asks
		lazy.interrupted.Store(times)
		s, err := tryOpen(path, storage.Options{})
		if err != nil {
			t.Fatalf("interrupted %d times: %v", times, err)
		}
		pass(t, s.Close())
	}
	reader := mustOpen(t, path, storage.Options{})
	lazy.interrupted.Store(3)
	if exts, err := reader.AppendExtents(nil, 0, lazy.size); err != nil || len(exts) != 1 || !exts[0].Hole {
		t.Errorf("before anything was written: %v, %v", exts, err)
	}
	pass(t, reader.Close())

	s := mustOpen(t, path, storage.Options{Access: storage.WriteGrow})
	t.Cleanup(func() { close(lazy.arrives) }) // before the store is closed, which waits for it
	const off, n = 1 << 20, 64 << 10
	pass(t, s.WriteAt(bytes.Repeat([]byte{7}, n), off, 0))
	exts, err := s.AppendExtents(nil, 0, lazy.size)
	pass(t, err)
	for _, e := range exts {
		if e.Hole && e.Offset < off+n && off < e.Offset+e.Length {
			t.Errorf("what was written is called a hole: %v", exts)
		}
	}
}
