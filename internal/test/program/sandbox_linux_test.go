package program

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// release compiles the program as it is released, without C.
func release(t *testing.T) string {
	t.Helper()
	t.Setenv("CGO_ENABLED", "0")
	return build(t)
}

// threads returns a line of the status of each thread of a process.
func threads(t *testing.T, pid int, line string) (values []string) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(text), "\n"+line+":")
		value, _, _ := strings.Cut(rest, "\n")
		values = append(values, strings.Join(strings.Fields(value), " "))
	}
	return values
}

// A confined server serves, under another user, and reads again what it has to;
// nothing is left of it at the end.
func TestSandbox(t *testing.T) {
	if os.Getuid() != 0 {
		qemu.Missing(t, "root, who can become another user,")
	}
	bin := release(t)
	dir, err := os.MkdirTemp("", "sb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil { // that user removes the socket
		t.Fatal(err)
	}
	socket, list, disk := filepath.Join(dir, "s"), filepath.Join(dir, "list"), filepath.Join(dir, "disk.qcow2")
	qemu.Img(t, "create", "-q", "-f", "qcow2", disk, "64M") // which only root may open
	allow := func(text string) {
		if err := os.WriteFile(list+".new", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(list+".new", list); err != nil {
			t.Fatal(err)
		}
	}
	allow("uid:root\n") // which takes a look into the list of users
	journals := journals(t)
	p := &patient{t: t, bin: bin, socket: socket, args: []string{"--untrusted", "--user=65534:65534", "--allow-file=" + list,
		"--journal=" + journals, "--discard=unmap", "-f", "qcow2", disk}}
	p.start()
	t.Cleanup(func() { p.cmd.Process.Kill() })
	c := p.connect()
	pid := p.cmd.Process.Pid
	for line, want := range map[string]string{
		"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0000000000000000", "CapPrm": "0000000000000000",
		"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "",
	} {
		for _, have := range threads(t, pid, line) {
			if have != want {
				t.Errorf("%s: %s, want %s", line, have, want)
			}
		}
	}

	data := compressible(1 << 20)
	err = c.Write(data, 1<<20, 0)
	if err == nil {
		err = c.Trim(8<<20, 1<<20, 0)
	}
	if err == nil {
		err = c.Flush()
	}
	got := make([]byte, len(data))
	if err == nil {
		err = c.Read(got, 1<<20, 0)
	}
	if err != nil || string(got) != string(data) {
		t.Errorf("the data path: %v", err)
	}
	c.Close()

	// The file of who may come in is another one now.
	allow("uid:65534\n")
	other, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, other); n != 0 || err != nil {
		t.Errorf("who is not allowed any more gets %d bytes, %v", n, err)
	}
	other.Close()
	allow("uid:0\n")
	p.connect().Close()

	p.end()
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket is left behind")
	}
	left, err := filepath.Glob(filepath.Join(journals, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range left { // that user may not remove it
		if fi, err := os.Stat(file); err != nil || fi.Size() != 0 {
			t.Errorf("the journal %s is left behind with something in it", file)
		}
	}
	qemu.Check(t, disk)

	// It is of no harm to the next one, who may.
	if out, err := exec.Command(bin, "-f", "qcow2", "--journal="+journals, "--run", "true", disk).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if left, _ = filepath.Glob(filepath.Join(journals, "*")); len(left) > 0 {
		t.Errorf("%s are left behind", left)
	}
}

// A user whom the file system of the image does not let in is told at the start: to
// ask for the size, for one, takes more than a file that is open.
func TestUserOnFUSE(t *testing.T) {
	if os.Getuid() != 0 {
		qemu.Missing(t, "root, who can become another user,")
	}
	bin, dir := release(t), t.TempDir()
	empty := qemu.Create(t, "qcow2", "", "4M") // of which nothing is read once it is open
	qemu.Start(t, "nbdfuse", filepath.Join(dir, "disk"), "[", qemu.Require(t, "nbdkit"), "-f", "--exit-with-parent", "file", empty, "]")
	t.Cleanup(func() { qemu.Run(t, "umount", "-l", dir) })
	path := filepath.Join(dir, "disk")
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		} else if time.Since(began) > time.Minute {
			t.Fatal(err)
		}
	}
	for user, works := range map[string]bool{"0:0": true, "65534:65534": false} {
		for _, format := range []string{"raw", "qcow2"} {
			cmd := exec.Command(bin, "--user="+user, "--read-only", "-f", format, "--stdio", path)
			cmd.Stdin = strings.NewReader("") // a pipe, with a client that has gone
			out, err := cmd.CombinedOutput()
			if (err == nil) != works || !works && !(strings.Contains(string(out), path) && strings.Contains(string(out), "allow_other")) {
				t.Errorf("user %s, %s: %v: %s", user, format, err, out)
			}
		}
	}
}
