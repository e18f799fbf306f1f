package main

import (
	"errors"
	"fmt"
	"os"
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
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		errs = append(errs, fmt.Errorf("keeping it from the OOM killer: %w", err))
	}
	return errors.Join(errs...)
}
