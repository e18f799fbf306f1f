//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	xunix "golang.org/x/sys/unix"
)

// farDelay is how long a far medium takes for a read.
const farDelay = 2 * time.Millisecond

// A farAway is a file system, of slowfs, with one image.
type farAway struct {
	file   string // whose bytes it has
	folder string
	server *exec.Cmd
}

// canBeFar reports whether there can be such a file system.
func canBeFar() bool {
	_, err := os.Stat("/dev/fuse")
	return err == nil && os.Geteuid() == 0
}

// getFar is get for an image that is far away.
func (i *images) getFar(w workload) (string, error) {
	w.place = disk
	file, err := i.get(w)
	if err != nil {
		return "", err
	}
	for _, f := range i.far {
		if f.file == file {
			return f.image(), nil
		}
	}
	program := filepath.Join(i.disk, "slowfs")
	build := exec.Command("go", "build", "-o", program, "github.com/imgnbd/imgnbd/internal/test/slowfs")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	f := &farAway{file: file, folder: file + "-far"}
	if err := os.Mkdir(f.folder, 0o700); err != nil {
		return "", err
	}
	f.server = exec.Command(program, farDelay.String(), file, f.folder)
	output := new(bytes.Buffer)
	f.server.Stdout, f.server.Stderr = output, output
	if err := f.server.Start(); err != nil {
		return "", err
	}
	for end := time.Now().Add(ready); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(f.image()); err == nil {
			i.far = append(i.far, f)
			return f.image(), nil
		}
		if exited(f.server.Process.Pid) || time.Now().After(end) {
			return "", errors.Join(errors.New("slowfs does not serve: "+output.String()), f.close(), os.Remove(f.folder))
		}
	}
}

func (f *farAway) image() string { return filepath.Join(f.folder, "disk") }

// close ends the file system.
func (f *farAway) close() error {
	err := xunix.Unmount(f.folder, xunix.MNT_DETACH)
	if err != nil {
		f.server.Process.Kill()
	}
	f.server.Wait()
	return err
}
