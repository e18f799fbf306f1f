package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What contradicts an attachment is refused before anything is opened.
func TestConnectOptions(t *testing.T) {
	for args, want := range map[string]string{
		"-c auto -d disk":                "--connect and --disconnect exclude each other",
		"-c auto -k /s disk":             "--connect and --socket exclude each other",
		"-c auto -p 1 disk":              "--connect and --port exclude each other",
		"-c auto --stdio disk":           "--connect and --stdio exclude each other",
		"-c auto --run true disk":        "--connect and --run exclude each other",
		"-d -b ::1 /dev/nbd0":            "--disconnect and --bind exclude each other",
		"--force disk":                   "--force goes with --connect or --disconnect",
		"--connections 2 disk":           "--connections goes with --connect or --disconnect",
		"--max-part 8 disk":              "--max-part goes with --connect or --disconnect",
		"--dead-timeout 8 disk":          "--dead-timeout goes with --connect or --disconnect",
		"-c auto --dead-timeout -1 disk": "--dead-timeout=-1 is not a number of seconds",
		"-c auto --connections 0 disk":   "--connections=0 is not a number of connections",
		"-c auto --max-part 256 disk":    "--max-part=256 is not between 0 and 255",
		"-c auto --max-part -1 disk":     "--max-part=-1 is not between 0 and 255",
		"-c auto":                        "Invalid number of arguments",
		"-d":                             "Invalid number of arguments",
		"-L -c auto":                     "List mode is incompatible with per-device settings",
		"-d /nonexistent":                "Cannot open /nonexistent: No such file or directory",
		"-d /dev/null":                   "/dev/null is not the name of a device",
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, "imgnbd: "+want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "s"), fmt.Sprintf("@imgnbd-test-%d", os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		t.Setenv("NOTIFY_SOCKET", path)
		notify("READY=1")
		l.SetReadDeadline(time.Now().Add(deadline))
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("%s: %q, %v", path, b[:n], err)
		}
	}
	// Nobody who listens is no reason to fail.
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	notify("READY=1")
	t.Setenv("NOTIFY_SOCKET", "")
	notify("READY=1")
}
