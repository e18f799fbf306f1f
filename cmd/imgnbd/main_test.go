package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// realQEMUNBD is the path of the real one, "" if there is none. In PATH it is
// behind this program, which the scripts call by that name too.
var realQEMUNBD string

func TestMain(m *testing.M) {
	realQEMUNBD, _ = exec.LookPath("qemu-nbd")
	program := func() { os.Exit(process()) }
	testscript.Main(m, map[string]func(){"imgnbd": program, "qemu-nbd": program})
}

// deadline bounds what would otherwise hang.
const deadline = 5 * time.Minute

// TestScripts runs the stories of testdata/script. In them imgnbd and qemu-nbd
// are this program, $QEMU_NBD is the real one.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("QEMU_NBD", realQEMUNBD)
			// Short, since the path of a socket may have 107 bytes.
			dir, err := os.MkdirTemp("", "s")
			if err != nil {
				return err
			}
			e.Setenv("S", dir)
			e.Defer(func() {
				killDaemons(e.WorkDir, dir)
				os.RemoveAll(dir)
			})
			return nil
		},
		Condition: condition,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"wait-for": waitFor,
			"signal":   signalCommand,
			"probe":    probe,
			"status":   status,
		},
	})
}

// killDaemons ends what a story that failed has left running: the processes
// in its pid files that have sockets in dir.
func killDaemons(work, dir string) {
	for _, folder := range []string{work, dir} {
		files, _ := filepath.Glob(filepath.Join(folder, "pid*"))
		for _, file := range files {
			text, _ := os.ReadFile(file)
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil {
				continue
			}
			if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.Contains(string(args), dir+"/") {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

// condition knows tool:NAME, which is true if a program is installed. Where
// tests run for judgement, its absence is a failure.
func condition(cond string) (bool, error) {
	name, ok := strings.CutPrefix(cond, "tool:")
	if !ok {
		return false, fmt.Errorf("unknown condition %q", cond)
	}
	_, err := exec.LookPath(name)
	if name == "qemu-nbd" && realQEMUNBD == "" {
		err = exec.ErrNotFound
	}
	if err != nil && os.Getenv("CI") != "" {
		return false, err
	}
	return err == nil, nil
}

// wait-for FILE...: until all exist; ! wait-for: until none does.
func waitFor(ts *testscript.TestScript, neg bool, files []string) {
	for _, f := range files {
		path := ts.MkAbs(f)
		eventually(ts, func() error {
			info, err := os.Lstat(path)
			if !neg && err == nil && info.Mode().Type() == fs.ModeSocket {
				return listening(path)
			}
			if neg && err == nil {
				return errors.New(path + " still exists")
			}
			if neg && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
	}
}

// listening returns an error unless somebody accepts connections at a socket,
// which has its name a little before that.
func listening(path string) error {
	sockets, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(sockets)) {
		const flags, name, accepts = 3, 7, "00010000"
		f := strings.Fields(line)
		if len(f) > name && f[flags] == accepts && (f[name] == path || f[name] == filepath.Base(path)) {
			return nil
		}
	}
	return errors.New(path + " takes no connections")
}

// signal NAME PIDFILE [stays]: sends it and waits for the process to end, or
// looks that it does not.
func signalCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: signal NAME PIDFILE [stays]")
	}
	sig, ok := map[string]syscall.Signal{
		"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP,
		"USR1": syscall.SIGUSR1, "PIPE": syscall.SIGPIPE, "KILL": syscall.SIGKILL,
	}[args[0]]
	if !ok {
		ts.Fatalf("unknown signal %s", args[0])
	}
	var pid int
	eventually(ts, func() (err error) { // the file is there before its text
		pid, err = strconv.Atoi(strings.TrimSpace(ts.ReadFile(args[1])))
		return err
	})
	ts.Check(syscall.Kill(pid, sig))
	if len(args) > 2 {
		return
	}
	eventually(ts, func() error {
		// A zombie waits for its parent, and once it is the last of its threads
		// it is as dead as one can be: until then its files are open.
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return nil
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); len(fields) > 17 && fields[0] == "Z" && fields[17] == "1" {
			return nil
		}
		return fmt.Errorf("process %d is still there", pid)
	})
}

// probe SOCKET [hold|waits]: connects and leaves, or stays to the end of the
// script; with waits the server has to leave it without a greeting.
func probe(ts *testscript.TestScript, neg bool, args []string) {
	c, err := net.Dial("unix", ts.MkAbs(args[0]))
	if neg {
		if err == nil {
			c.Close()
			ts.Fatalf("%s accepts connections", args[0])
		}
		return
	}
	ts.Check(err)
	if len(args) == 1 {
		ts.Check(c.Close())
		return
	}
	ts.Defer(func() { c.Close() })
	if args[1] == "waits" {
		ts.Check(c.SetReadDeadline(time.Now().Add(500 * time.Millisecond)))
		if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			ts.Fatalf("%s: served, or turned away (%d bytes, %v)", args[0], n, err)
		}
	}
}

// status N COMMAND...: runs it and compares the exit status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if e, ok := errors.AsType[*exec.ExitError](ts.Exec(args[1], args[2:]...)); ok {
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("%s: exit status %d, want %d", filepath.Base(args[1]), got, want)
	}
}

func eventually(ts *testscript.TestScript, f func() error) {
	for end := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%v", err)
		}
	}
}
