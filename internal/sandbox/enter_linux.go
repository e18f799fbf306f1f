//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Enter confines the process to p. It is called once.
//
// No thread or child gains privileges by execve any more; no program is
// started; other processes, mounts, the kernel's keys, modules and clocks are
// out of reach; no socket is made or bound; no memory becomes code; and files
// are opened, made and changed by name only as p says.
func Enter(p Policy) Result {
	// What is done to one thread after the other takes long on a machine that
	// has other work. The filter takes from all at once what could be gained,
	// too; but it forbids to look at paths, so that comes before it.
	ruleset, files := newRuleset(p)
	if files != nil {
		return Result{Calls: filterCalls(p), Files: files}
	}
	defer unix.Close(ruleset)
	calls := filterCalls(p)
	if calls != nil {
		files = forgoPrivileges()
	}
	if files == nil {
		files = confine(ruleset)
	}
	return Result{Calls: calls, Files: files}
}

// filterCalls gives all threads the filter.
func filterCalls(p Policy) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	program := filter(p, unix.Getpid())
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Threads that are filtered are slower on old kernels, unless they forgo
	// the protection of their memory from their own other parts.
	for _, flags := range []uintptr{unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, unix.SECCOMP_FILTER_FLAG_TSYNC} {
		thread, _, errno := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
		runtime.KeepAlive(program)
		switch {
		case errno == unix.EINVAL:
			continue
		case errno != 0:
			return fmt.Errorf("seccomp: %w", errno)
		case thread != 0:
			return fmt.Errorf("seccomp: thread %d has a filter of its own", thread)
		}
		return nil
	}
	return fmt.Errorf("seccomp: %w", unix.EINVAL)
}

// forgoPrivileges has no thread gain privileges by execve.
func forgoPrivileges() error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	return allThreads(errno)
}

// confine gives all threads a ruleset, once they can gain no privileges.
func confine(ruleset int) error {
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(ruleset), 0, 0)
	return allThreads(errno)
}

func allThreads(errno syscall.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.ENOTSUP:
		return errors.New("landlock: a program that is linked with C cannot confine all its threads")
	}
	return fmt.Errorf("landlock: %w", errno)
}
