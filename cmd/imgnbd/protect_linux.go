package main

import (
	"log/slog"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// protectServer keeps a process that serves a device of this machine from
// waiting for that device: when memory is short, what is to be written to it
// needs the process, which then must get memory without waiting for writes,
// be in memory itself, and not be the one that is killed. Not all of that is
// allowed everywhere.
func protectServer(log *slog.Logger) {
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0); errno != 0 {
		log.Debug("not marked as an I/O flusher", "err", errno)
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		log.Debug("memory is not locked", "err", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		log.Debug("not kept from the OOM killer", "err", err)
	}
}
