//go:build linux

// slowfs is a file system for measurements, on a medium that is far away:
//
//	slowfs DELAY FILE FOLDER
//
// mounts FOLDER, in which there is one file, disk, with the bytes of FILE. Each read
// that the page cache does not serve takes DELAY; how many are on their way at a time
// does not matter. It ends when the folder is unmounted, and needs root.
package main

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "slowfs: %v\n", err)
		os.Exit(1)
	}
}

// most is how many reads may be on their way.
const most = 256

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("usage: slowfs DELAY FILE FOLDER")
	}
	delay, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	f, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	root, forever := new(fs.Inode), time.Hour
	opt := &fs.Options{AttrTimeout: &forever, EntryTimeout: &forever}
	opt.MountOptions = fuse.MountOptions{FsName: "slowfs", Name: "slowfs", DirectMountStrict: true, MaxBackground: most}
	opt.OnAdd = func(ctx context.Context) {
		file := root.NewPersistentInode(ctx, &file{from: f, size: st.Size(), delay: delay}, fs.StableAttr{Mode: syscall.S_IFREG})
		root.AddChild("disk", file, false)
	}
	server, err := fs.Mount(args[2], root, opt)
	if err != nil {
		return err
	}
	server.Wait()
	return nil
}

// A file is that of the file system.
type file struct {
	fs.Inode
	from  *os.File
	size  int64
	delay time.Duration
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Size, out.Mode = uint64(f.size), 0o600
	return 0
}

func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

// Fsync has nothing to do: nothing is written.
func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	time.Sleep(f.delay)
	n, err := f.from.ReadAt(p, off)
	if n == 0 && err != nil && off < f.size {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}
