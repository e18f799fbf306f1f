//go:build amd64 || arm64

package sandbox

import (
	"slices"

	"golang.org/x/sys/unix"
)

// The filter is a list of what is forbidden, not of what is allowed: which
// calls the Go runtime, the C library and the kernel's own helpers make differs
// between versions, and a server that fails because one of them is not on a
// list would be the worse for it. Calls that are newer than this list do not
// exist for the process; programs are used to that.

// Answers of the filter.
const (
	allowed   = unix.SECCOMP_RET_ALLOW
	forbidden = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	absent    = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// Places in what a filter is shown: struct seccomp_data.
const (
	numberAt = 0
	archAt   = 4
	argsAt   = 16
)

// fioSetOwn is the old form of SIOCSPGRP; package unix lacks it.
const fioSetOwn = 0x8901

// newest is the last call that the lists here were made with.
const newest = unix.SYS_RSEQ_SLICE_YIELD

// never are calls that no server makes.
var never = slices.Concat([]uint32{
	// Other programs and processes.
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_MRELEASE,
	unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES, unix.SYS_SETNS, unix.SYS_UNSHARE,
	unix.SYS_SETPRIORITY, unix.SYS_IOPRIO_SET, unix.SYS_SCHED_SETPARAM, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETATTR,
	unix.SYS_SHMGET, unix.SYS_SHMAT, // which also makes memory executable
	unix.SYS_SHMCTL, unix.SYS_SEMGET, unix.SYS_SEMCTL, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP, unix.SYS_MSGGET, unix.SYS_MSGCTL, unix.SYS_MSGSND, unix.SYS_MSGRCV,
	// Mounts.
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_OPEN_TREE_ATTR,
	unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	// The kernel and the machine.
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_BPF, unix.SYS_USERFAULTFD, unix.SYS_PERF_EVENT_OPEN, unix.SYS_ACCT,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_NFSSERVCTL,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_SYSLOG,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_PERSONALITY, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_VHANGUP,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_FANOTIFY_INIT,
	// Who the process is.
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
	unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET,
	// The network, beyond the sockets that are there and who connects to them.
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN,
	// Files by name or handle, and their rights.
	unix.SYS_OPENAT2, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT,
	unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT,
	unix.SYS_TRUNCATE, unix.SYS_UTIMENSAT, unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK, unix.SYS_FILE_SETATTR,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_SETXATTRAT,
	unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_REMOVEXATTRAT,
}, neverHere)

// Calls that only some policies need.
var (
	removing   = append([]uint32{unix.SYS_UNLINKAT}, removingHere...)
	signalling = []uint32{unix.SYS_KILL, unix.SYS_TKILL, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO}
)

// filter returns the program that decides about the calls of process pid.
func filter(p Policy, pid int) []unix.SockFilter {
	var f program
	f.load(archAt)
	f.unless(arch, forbidden) // another one has other numbers
	f.load(numberAt)
	f.from(newest+1, absent) // x32 is there too

	f.forbid(never)
	if len(p.RemoveIn) == 0 {
		f.forbid(removing)
	}
	// Children are asked for with clone, of which threads need one form.
	// clone3, which hides what it is asked for, has a substitute.
	f.when(unix.SYS_CLONE3, answer(absent))
	f.when(unix.SYS_CLONE, argument(0), set(unix.CLONE_THREAD, allowed), answer(forbidden))
	f.when(unix.SYS_TGKILL, argument(0), equal(uint32(pid), allowed), answer(forbidden))
	if !p.Signal {
		f.when(unix.SYS_KILL, argument(0), equal(uint32(pid), allowed), answer(forbidden))
		f.forbid(signalling)
	}
	f.when(unix.SYS_PRLIMIT64, argument(0), equal(0, allowed), equal(uint32(pid), allowed), answer(forbidden))
	// The owner of a file is signalled when something happens to it.
	f.when(unix.SYS_FCNTL, argument(1), equal(unix.F_SETOWN, forbidden), equal(unix.F_SETOWN_EX, forbidden), equal(unix.F_SETSIG, forbidden), answer(allowed))
	// What is typed on a terminal is typed by people.
	f.when(unix.SYS_IOCTL, argument(1), equal(unix.TIOCSTI, forbidden), equal(unix.TIOCLINUX, forbidden),
		equal(fioSetOwn, forbidden), equal(unix.SIOCSPGRP, forbidden), answer(allowed))
	// To send can be to connect.
	f.when(unix.SYS_SENDTO, argument(3), set(unix.MSG_FASTOPEN, forbidden), answer(allowed))
	f.when(unix.SYS_SENDMSG, argument(2), set(unix.MSG_FASTOPEN, forbidden), answer(allowed))
	f.when(unix.SYS_SENDMMSG, argument(3), set(unix.MSG_FASTOPEN, forbidden), answer(allowed))
	for _, call := range []uint32{unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_PKEY_MPROTECT} {
		f.when(call, argument(2), set(unix.PROT_EXEC, forbidden), answer(allowed))
	}
	const changes = unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC | unix.O_APPEND
	f.forbid(opening)
	if len(p.Read) == 0 {
		f.when(unix.SYS_OPENAT, answer(forbidden))
	} else {
		f.when(unix.SYS_OPENAT, argument(2), set(changes, forbidden), answer(allowed))
	}
	f.add(unix.BPF_RET|unix.BPF_K, allowed)
	return f
}

// A program is one of the classic BPF. Its parts leave the number of the call
// in the accumulator.
type program []unix.SockFilter

func (f *program) add(code uint16, k uint32) { *f = append(*f, unix.SockFilter{Code: code, K: k}) }

func (f *program) load(at uint32) { f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, at) }

// jump goes on with the next instruction, or skips as many as are said.
func jump(test uint16, k uint32, skipIf, skipElse int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: uint8(skipIf), Jf: uint8(skipElse), K: k}
}

func answer(with uint32) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: with}}
}

// equal answers if the accumulator is k, set if it has any of the bits.
func equal(k, with uint32) []unix.SockFilter {
	return append([]unix.SockFilter{jump(unix.BPF_JEQ, k, 0, 1)}, answer(with)...)
}

func set(bits, with uint32) []unix.SockFilter {
	return append([]unix.SockFilter{jump(unix.BPF_JSET, bits, 0, 1)}, answer(with)...)
}

// argument loads the low half of an argument of the call.
func argument(i uint32) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: argsAt + 8*i}}
}

func (f *program) unless(k, with uint32) {
	*f = append(*f, jump(unix.BPF_JEQ, k, 1, 0))
	*f = append(*f, answer(with)...)
}

func (f *program) from(k, with uint32) {
	*f = append(*f, jump(unix.BPF_JGE, k, 0, 1))
	*f = append(*f, answer(with)...)
}

func (f *program) forbid(calls []uint32) {
	for _, c := range calls {
		*f = append(*f, equal(c, forbidden)...)
	}
}

// when runs parts, of which the last answers whatever comes, for one call.
func (f *program) when(call uint32, parts ...[]unix.SockFilter) {
	body := slices.Concat(parts...)
	*f = append(*f, jump(unix.BPF_JEQ, call, 0, len(body)))
	*f = append(*f, body...)
}
