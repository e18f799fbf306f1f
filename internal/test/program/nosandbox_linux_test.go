package program

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// withoutVariable has the test become another program, on a kernel that seems
// to know neither seccomp nor Landlock.
const withoutVariable = "IMGNBD_TEST_WITHOUT"

func TestMain(m *testing.M) {
	if os.Getenv(withoutVariable) != "" {
		becomeWithout(os.Args[1:])
	}
	os.Exit(m.Run())
}

func becomeWithout(args []string) {
	runtime.LockOSThread()
	load := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: k}
	}
	answer := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	is := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: skip}
	}
	filter := []unix.SockFilter{
		load(0),
		is(unix.SYS_SECCOMP, 2),
		is(unix.SYS_LANDLOCK_CREATE_RULESET, 1),
		answer(unix.SECCOMP_RET_ALLOW),
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)),
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
	}
	if err == nil {
		os.Unsetenv(withoutVariable)
		err = unix.Exec(args[0], args, os.Environ())
	}
	os.Stderr.WriteString("no filter: " + err.Error() + "\n")
	os.Exit(99)
}

// Where the kernel has no sandbox, the server serves without, unless one was
// asked for.
func TestWithoutSandbox(t *testing.T) {
	qemu.Require(t, "nbdinfo")
	bin := release(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args    []string
		serves  bool
		message string
	}{
		{nil, true, ""},
		{[]string{"--sandbox=auto", "-v"}, true, "imgnbd: no sandbox, err seccomp: function not implemented\n"},
		{[]string{"--sandbox=on"}, false, "imgnbd: no sandbox: seccomp: function not implemented\nimgnbd: hint: --sandbox=off does without\n"},
		{[]string{"--untrusted"}, false, "imgnbd: no sandbox: seccomp: function not implemented\nimgnbd: hint: --sandbox=off does without\n"},
		{[]string{"--untrusted", "--sandbox=off"}, true, ""},
	} {
		args := append([]string{bin, "-r", "-f", "raw", "--run", `nbdinfo --size "$uri"`}, append(tt.args, disk)...)
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), withoutVariable+"=1")
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		if (err == nil) != tt.serves || (stdout.String() == "4096\n") != tt.serves || !strings.Contains(stderr.String(), tt.message) {
			t.Errorf("%q: %v, %s%s", tt.args, err, &stdout, &stderr)
		}
		if tt.message == "" && stderr.Len() > 0 {
			t.Errorf("%q: %s", tt.args, &stderr)
		}
	}
}
