package main

import (
	"fmt"
	"os"
	"syscall"
)

// A pidFile tells others the process ID. It stays at the end, as qemu-nbd's does;
// the lock, which lasts until it is closed, tells whether there is a process
// behind it.
type pidFile struct{ *os.File }

func openPIDFile(path string) (*pidFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, says("Could not create '%s': %s", path, strerror(err))
	}
	return &pidFile{f}, nil
}

// lock makes it this process's, and says so in it.
func (f *pidFile) lock() error {
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, &lock); err != nil {
		return says("Cannot lock pid file: %s", strerror(err))
	}
	err := f.Chmod(0o600)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		return says("Failed to write pid file: %s", strerror(err))
	}
	return nil
}

// openPID opens the file that was asked for, if any, to be locked later.
func (s *service) openPID() (err error) {
	if s.opt.pidFile != "" && s.pid == nil {
		s.pid, err = openPIDFile(s.opt.pidFile)
	}
	return err
}

func (s *service) lockPID() error {
	if err := s.openPID(); s.pid == nil || err != nil {
		return err
	}
	return s.pid.lock()
}

func (s *service) closePID() {
	if s.pid != nil {
		s.pid.Close()
		s.pid = nil
	}
}
