package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probeVariable tells the test program that it is to be confined: what it may
// do, as flags. It works in a directory that was made for it.
const probeVariable = "SANDBOX_PROBE"

func TestMain(m *testing.M) {
	if flags, ok := os.LookupEnv(probeVariable); ok {
		probe(flags)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// probe confines the process, tries what it could not be stopped from, and
// prints what came of it.
func probe(flags string) {
	dir, err := os.Getwd()
	check(err)
	var p Policy
	unfiltered := false
	for flag := range strings.FieldsSeq(flags) {
		switch flag {
		case "unfiltered":
			unfiltered = true
			refuseFilters()
		case "read":
			p.Read = []string{filepath.Join(dir, "in/list")}
		case "remove":
			p.RemoveIn = []string{filepath.Join(dir, "in")}
		case "signal":
			p.Signal = true
		case "nobody":
			u, err := LookupUser("65534:65534")
			check(err)
			check(Become(u))
		}
	}
	child := exec.Command("/bin/cat") // ends when its input does
	input, err := child.StdinPipe()
	check(err)
	check(child.Start())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: "in/socket", Net: "unix"})
	check(err)
	file, err := os.OpenFile("in/open", os.O_RDWR|os.O_CREATE, 0o600)
	check(err)

	// What is listened on, elsewhere, and two ends of a connection.
	listener, other := tcpSocket(), tcpSocket()
	elsewhere, err := unix.Getsockname(other)
	check(err)
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	check(err)

	// Threads that are there before the filter, and busy, have it too.
	const threads = 8
	var there, over sync.WaitGroup
	release := make(chan struct{})
	tried := make(chan error, threads)
	there.Add(threads)
	for range threads {
		over.Go(func() {
			runtime.LockOSThread()
			there.Done()
			<-release
			_, err := unix.Open("/etc/hostname", unix.O_WRONLY|unix.O_CREAT, 0)
			tried <- err
		})
	}
	there.Wait()
	r := Enter(p)
	close(release)
	over.Wait()
	for range threads {
		say("thread", <-tried)
	}
	say("calls", r.Calls)
	say("files", r.Files)
	if unfiltered {
		return
	}

	try := func(name string, nr, a, b, c, d uintptr) {
		_, _, errno := unix.Syscall6(nr, a, b, c, d, 0, 0)
		if errno != 0 {
			say(name, errno)
			return
		}
		say(name, nil)
	}
	say("exec", exec.Command("/bin/true").Run())
	say("exec in place", unix.Exec("/bin/true", []string{"true"}, nil))
	_, err = os.ReadFile("/etc/passwd")
	say("read another", err)
	_, err = os.ReadFile("in/list")
	say("read", err)
	say("write", os.WriteFile("in/list", nil, 0o600))
	say("make", os.WriteFile("in/new", nil, 0o600))
	say("mkdir", os.Mkdir("in/dir", 0o700))
	say("rename", os.Rename("in/list", "in/else"))
	say("link", os.Link("in/list", "in/else"))
	say("symlink", os.Symlink("list", "in/else"))
	say("chmod", os.Chmod("in/list", 0o777))
	say("chown", os.Chown("in/list", 0, 0))
	say("truncate", os.Truncate("in/list", 0))
	say("remove", os.Remove("in/socket"))
	say("remove another", os.Remove("out/file"))
	_, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	say("socket", err)
	// A listener that is shut down is a socket that may connect.
	say("use: shut down", unix.Shutdown(listener, unix.SHUT_RDWR))
	say("fast open", unix.Sendto(listener, []byte("x"), unix.MSG_FASTOPEN, elsewhere))
	_, err = unix.SendmsgN(listener, []byte("x"), nil, elsewhere, unix.MSG_FASTOPEN)
	say("fast open by a message", err)
	try("fast open by messages", unix.SYS_SENDMMSG, uintptr(listener), 0, 0, unix.MSG_FASTOPEN)
	say("signal a stranger", unix.Kill(os.Getppid(), 0))
	say("signal a child", unix.Kill(child.Process.Pid, 0))
	say("signal itself", unix.Kill(os.Getpid(), 0))
	try("owner", unix.SYS_FCNTL, uintptr(ends[0]), unix.F_SETOWN, uintptr(child.Process.Pid), 0)
	owner := [2]int32{1, int32(child.Process.Pid)} // F_OWNER_PID
	try("owner by kind", unix.SYS_FCNTL, uintptr(ends[0]), unix.F_SETOWN_EX, uintptr(unsafe.Pointer(&owner)), 0)
	try("owner's signal", unix.SYS_FCNTL, uintptr(ends[0]), unix.F_SETSIG, uintptr(unix.SIGKILL), 0)
	for _, request := range []uintptr{fioSetOwn, unix.SIOCSPGRP} {
		try(fmt.Sprintf("owner by ioctl %#x", request), unix.SYS_IOCTL, uintptr(ends[0]), request, uintptr(unsafe.Pointer(&owner[1])), 0)
	}
	var limit unix.Rlimit
	try("limit a child", unix.SYS_PRLIMIT64, uintptr(child.Process.Pid), unix.RLIMIT_CPU, 0, uintptr(unsafe.Pointer(&limit)))
	idle, mask := [1]int32{}, [16]uint64{1}
	try("priority of a child", unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, uintptr(child.Process.Pid), 19, 0)
	try("its scheduler", unix.SYS_SCHED_SETSCHEDULER, uintptr(child.Process.Pid), unix.SCHED_IDLE, uintptr(unsafe.Pointer(&idle)), 0)
	try("its processors", unix.SYS_SCHED_SETAFFINITY, uintptr(child.Process.Pid), unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask)), 0)
	try("its I/O", unix.SYS_IOPRIO_SET, 1, uintptr(child.Process.Pid), 3<<13, 0)
	try("real time", unix.SYS_SCHED_SETPARAM, 0, uintptr(unsafe.Pointer(&idle)), 0, 0)
	try("ptrace", unix.SYS_PTRACE, unix.PTRACE_ATTACH, uintptr(child.Process.Pid), 0, 0)
	try("unshare", unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0, 0)
	try("mount", unix.SYS_MOUNT, 0, 0, 0, 0)
	try("io_uring", unix.SYS_IO_URING_SETUP, 1, 0, 0, 0)
	try("fork", unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0)
	try("clone3", unix.SYS_CLONE3, 0, 0, 0, 0)
	try("from the future", newest+1, 0, 0, 0, 0)
	try("become root", unix.SYS_SETUID, 0, 0, 0, 0)
	_, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	say("code", err)
	try("shared memory", unix.SYS_SHMGET, unix.IPC_PRIVATE, 4096, 0o700, 0)
	try("a queue", unix.SYS_MSGGET, unix.IPC_PRIVATE, 0o700, 0, 0)
	try("a semaphore", unix.SYS_SEMGET, unix.IPC_PRIVATE, 1, 0o700, 0)
	try("shared memory of others", unix.SYS_SHMAT, 0, 0, 0, 0)
	say("type", unix.IoctlSetPointerInt(0, unix.TIOCSTI, 'x'))

	// What a server does.
	_, err = file.WriteAt(make([]byte, 8192), 0)
	say("use: write", err)
	say("use: sync", unix.Fdatasync(int(file.Fd())))
	say("use: punch", unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096))
	say("use: grow", file.Truncate(1<<20))
	say("use: memory", func() error {
		_, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	}())
	say("use: send", unix.Sendto(ends[0], []byte("x"), unix.MSG_NOSIGNAL, nil))
	_, err = unix.SendmsgN(ends[0], []byte("x"), nil, nil, unix.MSG_NOSIGNAL)
	say("use: send a message", err)
	_, err = unix.FcntlInt(uintptr(ends[0]), unix.F_DUPFD_CLOEXEC, 0)
	say("use: duplicate", err)
	try("use: limit", unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, 0, uintptr(unsafe.Pointer(&limit)))
	try("use: limit by number", unix.SYS_PRLIMIT64, uintptr(os.Getpid()), unix.RLIMIT_NOFILE, 0, uintptr(unsafe.Pointer(&limit)))
	say("use: close", errors.Join(file.Close(), l.Close()))
	var more sync.WaitGroup
	for range threads { // new threads
		more.Go(func() { runtime.LockOSThread(); runtime.GC() })
	}
	more.Wait()
	say("use: end of a child", errors.Join(input.Close(), child.Wait()))
}

// tcpSocket returns one that is listened on.
func tcpSocket() int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	check(err)
	check(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(unix.Listen(fd, 1))
	return fd
}

// refuseFilters makes this a kernel without filters, for all threads.
func refuseFilters() {
	var f program
	f.load(numberAt)
	f.when(unix.SYS_SECCOMP, answer(absent))
	f.add(unix.BPF_RET|unix.BPF_K, allowed)
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		check(errno)
	}
}

func say(name string, err error) {
	var errno syscall.Errno
	switch {
	case err == nil:
		fmt.Printf("%s: yes\n", name)
	case errors.As(err, &errno) && errno == unix.EPERM || errno == unix.EACCES:
		fmt.Printf("%s: no\n", name)
	default:
		fmt.Printf("%s: %v\n", name, err)
	}
}

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// build returns this test as a program without C, as the product is.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "test", "-c", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// run runs the probe and returns what it printed.
func run(t *testing.T, program, flags string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sandbox") // t.TempDir lets in this user alone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{dir, filepath.Join(dir, "in"), filepath.Join(dir, "out")} {
		os.Mkdir(d, 0o777)
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"in/list", "out/file"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("text"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), probeVariable+"="+flags)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// result runs the probe and returns what it said, by name.
func result(t *testing.T, program, flags string) map[string]string {
	t.Helper()
	said := map[string]string{}
	for lines := bufio.NewScanner(strings.NewReader(run(t, program, flags))); lines.Scan(); {
		name, what, _ := strings.Cut(lines.Text(), ": ")
		if strings.HasPrefix(name, "use") {
			name, what, _ = strings.Cut(what, ": ")
			name = "use: " + name
		}
		if old, ok := said[name]; ok && old != what {
			t.Errorf("%s: %s and %s", name, old, what)
		}
		said[name] = what
	}
	if said["calls"] != "yes" {
		t.Skipf("this kernel cannot filter system calls: %s", said["calls"])
	}
	return said
}

func TestEnter(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to whom the system itself would refuse nothing")
	}
	bare := build(t)
	for _, tt := range []struct{ name, program, flags string }{
		{"alone", bare, ""},
		{"with C", os.Args[0], ""},
		{"reading", bare, "read"},
		{"reading, with C", os.Args[0], "read"},
		{"removing", bare, "remove"},
		{"signalling", bare, "signal"},
		{"all of it, as nobody", bare, "read remove signal nobody"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			has := func(flag string) bool { return strings.Contains(tt.flags, flag) }
			said := result(t, tt.program, tt.flags)
			confined := said["files"] == "yes"
			if !confined {
				t.Logf("paths are not confined: %s", said["files"])
			}
			may := map[string]bool{
				"calls": true, "files": confined, "signal itself": true,
				"read":         has("read"),
				"read another": has("read") && !confined,
				"remove":       has("remove"), "remove another": has("remove") && !confined,
				"signal a child":    has("signal"),
				"signal a stranger": has("signal") && !has("nobody"),
			}
			for name, what := range said {
				want := "no"
				switch {
				case name == "files" && !confined:
					continue
				case strings.HasPrefix(name, "use") || may[name]:
					want = "yes"
				case name == "clone3" || name == "from the future":
					want = unix.ENOSYS.Error()
				}
				if what != want {
					t.Errorf("%s: %s, want %s", name, what, want)
				}
			}
			if len(said) < 35 {
				t.Errorf("only %d lines", len(said))
			}
		})
	}
}

// Where calls cannot be filtered, paths are confined all the same, for
// users without privileges.
func TestEnterWithoutFilter(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	out := run(t, build(t), "unfiltered nobody")
	if strings.Contains(out, "files: landlock: ") {
		t.Skipf("this kernel cannot confine paths: %s", out)
	}
	if !strings.Contains(out, "calls: seccomp: function not implemented\n") || !strings.Contains(out, "files: yes\n") {
		t.Errorf("%s", out)
	}
}

func TestLookupUser(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(me.Uid)
	gid, _ := strconv.Atoi(me.Gid)
	for _, name := range []string{me.Username, me.Uid, me.Username + ":" + me.Gid, me.Uid + ":" + me.Gid} {
		u, err := LookupUser(name)
		if err != nil || u.UID != uid || u.GID != gid {
			t.Errorf("%s: %+v, %v", name, u, err)
		}
		if strings.Contains(name, ":") && len(u.Groups) > 0 {
			t.Errorf("%s: more groups than were asked for: %v", name, u.Groups)
		}
	}
	for _, name := range []string{"", "no such user", "1234567", "-1:0", "0:no such group", "4294967295:0", "0:-1", ":0"} {
		if u, err := LookupUser(name); err == nil {
			t.Errorf("%q: %+v", name, u)
		}
	}
}
