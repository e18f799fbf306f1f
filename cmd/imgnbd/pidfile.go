package main

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// writePIDFile writes the process ID to path and locks the file until it is
// closed. The file stays at the end, as qemu-nbd's does; the lock tells whether
// there is a process behind it.
func writePIDFile(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, says("Could not create '%s': %s", path, strerror(err))
	}
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, &lock); err != nil {
		f.Close()
		return nil, says("Cannot lock pid file: %s", strerror(err))
	}
	err = f.Chmod(0o600)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, says("Failed to write pid file: %s", strerror(err))
	}
	return f, nil
}
