//go:build amd64 || arm64

package sandbox

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestHotCalls: for the calls that serving is made of, the filter looks at
// nothing but the number. Since Linux 5.11 the kernel remembers what that comes
// to, and does not run the filter for them. What is sent is written.
func TestHotCalls(t *testing.T) {
	for _, p := range []Policy{{}, {Read: []string{"/"}, RemoveIn: []string{"/"}, Signal: true}} {
		program := filter(p, 1)
		for _, call := range []uint32{
			unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_RECVFROM, unix.SYS_RECVMSG,
			unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_SENDFILE, unix.SYS_FDATASYNC, unix.SYS_FALLOCATE, unix.SYS_LSEEK,
			unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP, unix.SYS_MADVISE, unix.SYS_MINCORE,
		} {
			if answer := byNumber(t, program, call); answer != allowed {
				t.Errorf("call %d: %#x", call, answer)
			}
		}
		if answer := byNumber(t, program, unix.SYS_PTRACE); answer != forbidden {
			t.Errorf("ptrace: %#x", answer)
		}
	}
}

// byNumber runs a filter that may look at the number of the call only.
func byNumber(t *testing.T, program []unix.SockFilter, call uint32) uint32 {
	t.Helper()
	var acc uint32
	for pc := 0; pc < len(program); pc++ {
		in := program[pc]
		var jump bool
		switch in.Code {
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			switch in.K {
			case numberAt:
				acc = call
			case archAt:
				acc = arch
			default:
				t.Fatalf("for call %d the filter looks at an argument", call)
			}
			continue
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump = acc == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump = acc >= in.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump = acc&in.K != 0
		default:
			t.Fatalf("instruction %#x", in.Code)
		}
		if jump {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
	t.Fatal("the filter does not end")
	return 0
}
