package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// protectServer keeps a process that serves a device of this machine from
// waiting for that device: when memory is short, what is to be written to it
// needs the process, which then must get memory without waiting for writes,
// be in memory itself, and not be the one that is killed. The error is what of
// that is not allowed here.
func protectServer() error {
	var errs []error
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0); errno != 0 {
		errs = append(errs, fmt.Errorf("marking this process as an I/O flusher: %w", errno))
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		errs = append(errs, fmt.Errorf("locking its memory: %w", err))
	}
	if err := lockFiles(); err != nil {
		errs = append(errs, fmt.Errorf("keeping the program in memory: %w", err))
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		errs = append(errs, fmt.Errorf("keeping it from the OOM killer: %w", err))
	}
	return errors.Join(errs...)
}

// lockFiles reads and locks what this process has mapped of files, which is its
// program: that may be on the device itself, and is not to be had from there while
// this process does not serve it yet. (All of its memory would be too much: the
// runtime maps more than it uses.)
func lockFiles() error {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		var access string
		var inode uint64
		if _, err := fmt.Sscanf(line, "%x-%x %s %s %s %d", &from, &to, &access, new(string), new(string), &inode); err != nil {
			return fmt.Errorf("/proc/self/maps: %w: %s", err, line)
		}
		if inode == 0 || strings.HasPrefix(access, "---") { // an image, of which only the addresses are wanted
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, from, to-from, 0); errno != 0 {
			return errno
		}
	}
	return nil
}
