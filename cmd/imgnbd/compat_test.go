package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// An outcome is what a script sees of a program that ends by itself.
type outcome struct {
	Stdout, Stderr string
	Code           int
}

func ours(args ...string) outcome {
	var stdout, stderr bytes.Buffer
	code := run(args, strings.NewReader(""), &stdout, &stderr)
	return outcome{stdout.String(), stderr.String(), code}
}

// theirs runs the real program under the same name.
func theirs(t *testing.T, args ...string) outcome {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if args[0] == "qemu-nbd" {
		if realQEMUNBD == "" {
			qemu.Require(t, "the real qemu-nbd")
		}
		cmd.Path, cmd.Err = realQEMUNBD, nil
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(deadline, func() { cmd.Process.Kill() })
	defer timer.Stop()
	cmd.Wait()
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// workplace makes a folder of images and goes there.
func workplace(t *testing.T) {
	t.Helper()
	qemu.Require(t, "qemu-img")
	t.Chdir(t.TempDir())
	if err := os.WriteFile("disk.raw", make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	qemu.Img(t, "create", "-q", "-f", "qcow2", "disk.qcow2", "64M")
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
}

// What ends before anything is served ends as with qemu-nbd: the same words in
// the same place, the same status, and of several mistakes the same one first.
func TestSameAsQEMUNBD(t *testing.T) {
	workplace(t)
	long := strings.Repeat("x", 4097)
	for _, args := range [][]string{
		{},
		{"disk.raw", "other"},
		{"--foo", "disk.raw"},
		{"--foo=bar"},
		{"-Z"},
		{"--s"},
		{"--dis"},
		{"--s=3"},
		{"--port"},
		{"-p"},
		{"--fork=3"},
		{"--version=3"},
		{"--", "a", "b"},
		{"-e", "abc", "disk.raw"},
		{"-e", "-1", "disk.raw"},
		{"-e", "1x", "disk.raw"},
		{"-e", "", "disk.raw"},
		{"-e", "4294967296", "disk.raw"},
		{"-e", "abc", "--foo"},
		{"--foo", "-e", "abc"},
		{"-o", "1M", "disk.raw"},
		{"-o", "", "disk.raw"},
		{"-k", "relative", "disk.raw"},
		{"-k", "", "disk.raw"},
		{"-k", "/" + strings.Repeat("x", 120), "disk.raw"},
		{"-k", "/nonexistent/s", "disk.raw"},
		{"-k", "/", "disk.raw"},
		{"-x", long, "disk.raw"},
		{"-D", long, "disk.raw"},
		{"-l", "snapshot.foo=1", "disk.qcow2"},
		{"--cache=foo", "disk.raw"},
		{"--cache", "none", "-n", "disk.raw"},
		{"-n", "-n", "disk.raw"},
		{"--cache=none", "--cache=none", "disk.raw"},
		{"--aio=foo", "disk.raw"},
		{"--aio=native", "--aio=native", "disk.raw"},
		{"--discard=foo", "disk.raw"},
		{"--discard=unmap", "--discard=ignore", "disk.raw"},
		{"--detect-zeroes=foo", "disk.raw"},
		{"--detect-zeroes=unmap", "disk.raw"},
		{"--detect-zeroes=unmap", "--discard=unmap", "disk.raw"},
		{"--image-opts", "-f", "raw", "disk.raw"},
		{"-L", "disk.raw"},
		{"-L", "--fork"},
		{"-L", "-x", "name"},
		{"-L", "-x", ""},
		{"-L", "-D", "text"},
		{"-L", "-B", "bitmap"},
		{"-L", "-A"},
		{"-L", "-o", "1"},
		{"-L", "-f", "raw"},
		{"-L", "-l", "1"},
		{"-L", "-n"},
		{"-L", "--cache=none"},
		{"-L", "--aio=threads"},
		{"-L", "--discard=ignore"},
		{"-L", "--fork", "-x", "name"},
		{"-L", "-k", "relative"},
		{"-L", "-k", "/nonexistent/s"},
		{"-L", "-b", "127.0.0.1", "-p", "1"},
		{"-L", "-b", "localhost", "-p", "1"},
		{"-L", "-p", "abc"},
		{"-p", "abc", "disk.raw"},
		{"-p", "10809x", "disk.raw"},
		{"-p=1", "disk.raw"},
		{"-b", "nohost.invalid", "disk.raw"},
		{"-b", "192.0.2.1", "-p", "0", "disk.raw"},
		{"--selinux-label", "x", "disk.raw"},
	} {
		compareOutcome(t, append([]string{"qemu-nbd"}, args...))
	}
	// The rest listens first.
	for i, args := range [][]string{
		{"nonexistent"},
		{"./info"},
		{"dir"},
		{"--image-opts", "a=b"},
		{"--image-opts", ""},
		{"--image-opts", "driver=foo,file.filename=disk.raw"},
		{"--image-opts", "driver=qcow2,file.filename=disk.raw"},
		{"--image-opts", "driver=raw,file.filename=a,,b"},
		{"--image-opts", "filename=disk.raw"},
		{"--image-opts", "driver=raw"},
		{"--image-opts", "driver=qcow2"},
		{"--image-opts", "driver"},
		{"--image-opts", "disk.raw"},
		{"--image-opts", "file=disk.raw,driver=raw"},
		{"--image-opts", "driver=qcow2,file.filename="},
		{"--image-opts", "driver=qcow2,file.filename=nonexistent"},
		{"--image-opts", "driver=qcow2,file.filename=disk.qcow2,foo=bar"},
		{"--image-opts", "driver=qcow2,file.filename=disk.qcow2,file.foo=bar"},
		{"--image-opts", "driver=qcow2,file.filename=disk.qcow2,l2-cache-size=abc"},
		{"--image-opts", "driver=raw,size=3G,file.filename=disk.raw"},
		{"--image-opts", "driver=raw,offset=abc,file.filename=disk.raw"},
		{"--image-opts", "driver=raw,read-only=maybe,file.filename=disk.raw"},
		{"--image-opts", "driver=raw,cache.direct=maybe,file.filename=disk.raw"},
		{"--image-opts", "file.filename=disk.raw,file.locking=maybe"},
		{"json:{}"},
		{"json:3"},
		{`json:{"driver":"raw"}`},
		{`json:{"driver":"nope"}`},
		{`json:{"driver":"nope","file":{"driver":"file","filename":"disk.raw"}}`},
		{`json:{"driver":"qcow2","file":{"driver":"file"}}`},
		{`json:{"driver":"qcow2","file":"disk.qcow2"}`},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"disk.raw"},"x":1}`},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"disk.raw","y":"z"}}`},
		{`json:{"driver":"raw","offset":-1,"file":{"driver":"file","filename":"disk.raw"}}`},
		{`json:{"driver":"raw","offset":2097152,"file":{"driver":"file","filename":"disk.raw"}}`},
		{`json:{"driver":"raw","size":2097152,"file":{"driver":"file","filename":"disk.raw"}}`},
		{""},
		{"-f", "raw", ""},
		{"file:"},
		{"foo:bar"},
		{"-f", "foo", "disk.raw"},
		{"-f", "foo", "nonexistent"},
		{"-f", "", "disk.raw"},
		{"-f", "qcow2", "disk.raw"},
		{"-r", "-f", "qcow2", "disk.raw"},
		{"-f", "raw", "-o", "1048577", "disk.raw"},
		{"-r", "-f", "raw", "-B", "none", "disk.raw"},
		{"-r", "-B", "none", "disk.qcow2"},
		{"-r", "-l", "none", "disk.qcow2"},
		{"-r", "-l", "", "disk.qcow2"},
		{"-r", "-l", "snapshot.id=1,snapshot.name=s", "disk.qcow2"},
		{"-r", "-f", "raw", "-l", "none", "disk.raw"},
		{"-f", "raw", "--aio=native", "disk.raw"},
		{"-f", "raw", "--pid-file", "/nonexistent/p", "disk.raw"},
	} {
		socket := fmt.Sprintf("%s%d-%d", testSocket, os.Getpid(), i)
		compareOutcome(t, append([]string{"qemu-nbd", "-k", socket}, args...))
	}
}

const testSocket = "/tmp/imgnbd-test-"

// compareOutcome allows for hints, which are lines more.
func compareOutcome(t *testing.T, args []string) {
	t.Helper()
	want := theirs(t, args...)
	if len(args) > 2 && args[1] == "-k" && strings.HasPrefix(args[2], testSocket) {
		os.Remove(args[2]) // which qemu-nbd leaves behind
		defer func() {
			if _, err := os.Lstat(args[2]); err == nil {
				t.Errorf("%q left its socket", args)
			}
		}()
	}
	got := ours(args...)
	got.Stderr = hintLine.ReplaceAllString(got.Stderr, "")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%.200q, - real, + ours:\n%s", args, diff)
	}
}

var hintLine = regexp.MustCompile(`(?m)^[\w-]+: hint: .*\n`)

// What an option is refused with says what to do instead.
func TestRefusals(t *testing.T) {
	for words, advice := range map[string]string{
		"-T x disk":                                            "--verbose",
		"--object secret,id=a,data=x disk":                     "without a passphrase",
		"--object tls-creds-psk,id=a disk":                     "tls-creds-x509",
		"--object tls-creds-anon,id=a disk":                    "tls-creds-x509",
		"--object authz-pam,id=a disk":                         "authz-list",
		"--object throttle-group,id=a disk":                    "systemd-run",
		"--object tls-creds-x509,id=a,priority=SECURE256 disk": "TLS 1.2",
		"--aio io_uring disk":                                  "--aio=threads",
		"--image-opts discard=unmap,file.filename=disk":        "--discard=unmap",
		"--image-opts detect-zeroes=on,file.filename=disk":     "--detect-zeroes=on",
		"--image-opts cache.no-flush=on,file.filename=disk":    "--cache=unsafe",
	} {
		o := ours(append([]string{"imgnbd", "-k", t.TempDir() + "/s"}, strings.Fields(words)...)...)
		error, hint, _ := strings.Cut(o.Stderr, "\n")
		if o.Code != 1 || !strings.Contains(error, "is not supported") || !strings.HasPrefix(hint, "imgnbd: hint: ") || !strings.Contains(hint, advice) {
			t.Errorf("%s: %d, %s", words, o.Code, o.Stderr)
		}
	}
}

// Where qemu-nbd does something worse, or something else.
func TestDifferences(t *testing.T) {
	workplace(t)
	for _, test := range []struct{ args, want string }{
		// It listens on port 99999-65536.
		{"-p 99999 disk.raw", "address resolution failed for 0.0.0.0:99999: Servname not supported for ai_socktype\n"},
		{"-p -1 disk.raw", "address resolution failed for 0.0.0.0:-1: Servname not supported for ai_socktype\n"},
		// Its message is that of a layer below.
		{"-o -1 disk.raw", "Invalid offset '-1'\n"},
	} {
		o := ours(append([]string{"qemu-nbd"}, strings.Fields(test.args)...)...)
		if want := (outcome{"", "qemu-nbd: " + test.want, 1}); o != want {
			t.Errorf("%s: %s", test.args, cmp.Diff(want, o))
		}
	}
	// A name that might be meant for a command says so, unless there are none.
	o := ours("imgnbd", "-r", "-k", t.TempDir()+"/s", "inof")
	if !strings.Contains(o.Stderr, "No such file or directory\nimgnbd: hint: imgnbd help lists") {
		t.Error(o.Stderr)
	}
	for _, args := range []string{"./inof", "inof.raw", "file:inof", t.TempDir() + "/inof", "--image-opts file.filename=inof"} {
		o := ours(append([]string{"imgnbd", "-r", "-k", t.TempDir() + "/s"}, strings.Fields(args)...)...)
		if o.Code != 1 || strings.Contains(o.Stderr, "help") {
			t.Errorf("%s: %+v", args, o)
		}
	}
	// It serves what another server exports once more.
	o = ours("imgnbd", "-r", "-k", t.TempDir()+"/s", "nbd://localhost/disk")
	if !strings.HasPrefix(o.Stderr, "imgnbd: Failed to blk_new_open 'nbd://localhost/disk': Unknown protocol 'nbd'\nimgnbd: hint: ") {
		t.Errorf("%+v", o)
	}
	for _, args := range []string{"convert disk.raw new", "help convert"} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || o.Stderr != "imgnbd: there is no command 'convert'\nTry `imgnbd --help' for more information.\n" {
			t.Errorf("%s: %+v", args, o)
		}
	}
	// A command's own help has its options.
	if o := ours("imgnbd", "info", "--foo"); o.Code != 1 || !strings.HasSuffix(o.Stderr, "Try `imgnbd info --help' for more information.\n") {
		t.Errorf("%+v", o)
	}
	// It opens character devices.
	o = ours("imgnbd", "-r", "-k", t.TempDir()+"/s", "/dev/null")
	if o.Code != 1 || !strings.Contains(o.Stderr, "is a character device") {
		t.Error(o)
	}
	// It removes a file that is in the socket's way, whatever it is.
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	o = ours("qemu-nbd", "-r", "-k", wd+"/disk.raw", "disk.raw")
	if o.Code != 1 || o.Stderr != "qemu-nbd: Failed to unlink socket "+wd+"/disk.raw: it is not a socket\n" {
		t.Error(o)
	}
	if _, err := os.Stat("disk.raw"); err != nil {
		t.Error(err)
	}
}
