//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A process is a server at work.
type process struct {
	name             string
	uri              string
	network, address string
	pid              int
	pidFile          string // of a daemon, which is our child all the same
	cmd              *exec.Cmd
	output           *bytes.Buffer
}

// ready bounds a server's start, and its end.
const ready = 2 * time.Minute

// launch starts s.
func launch(s server, dir string, w workload, image string) (*process, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	socket, pid, config := filepath.Join(dir, "socket"), filepath.Join(dir, "pid"), filepath.Join(dir, "config")
	for _, name := range []string{socket, pid} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	fill := strings.NewReplacer("{socket}", socket, "{pid}", pid, "{config}", config, "{port}", port, "{format}", w.kind.format, "{image}", image)
	if s.config != nil {
		if err := os.WriteFile(config, []byte(fill.Replace(s.config(w.transport))), 0o600); err != nil {
			return nil, err
		}
	}
	var args []string
	for _, a := range s.command(w) {
		args = append(args, fill.Replace(a))
	}
	p := &process{name: s.name, output: new(bytes.Buffer)}
	p.network, p.address, p.uri = "tcp", "127.0.0.1:"+port, "nbd://127.0.0.1:"+port+"/disk"
	if w.transport == unix {
		p.network, p.address = "unix", socket
		p.uri = (&nbd.URI{Network: "unix", Address: socket, Export: "disk"}).String()
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = p.output, p.output
	cmd.WaitDelay = time.Second
	if s.daemon {
		// Its output would be held open; whatever it has to say is not ours.
		cmd.Stdout, cmd.Stderr = nil, nil
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		p.pidFile = pid
		return p, nil
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	p.cmd, p.pid = cmd, cmd.Process.Pid
	return p, nil
}

// await returns when a client has been served.
func (p *process) await(ctx context.Context, client func(ctx context.Context, network, address string) error) error {
	ctx, cancel := context.WithTimeout(ctx, ready)
	defer cancel()
	for {
		err := client(ctx, p.network, p.address)
		if p.pid == 0 {
			text, _ := os.ReadFile(p.pidFile)
			p.pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		if err == nil && p.pid != 0 {
			return nil
		}
		if p.cmd != nil && exited(p.pid) {
			p.stop() // all that it said is there then
			return fmt.Errorf("%s: ended at once\n%s", p.name, p.output)
		}
		select {
		case <-ctx.Done():
			p.stop()
			return fmt.Errorf("%s: not ready: %w\n%s", p.name, errors.Join(context.Cause(ctx), err), p.output)
		case <-time.After(200 * time.Microsecond):
		}
	}
}

// exited reports whether a child of ours has ended and was not waited for.
func exited(pid int) bool {
	st, err := readStat(pid)
	return err != nil || st.state == "Z"
}

// stop ends the server, by force if it does not end itself. Once it has ended,
// stop does nothing.
func (p *process) stop() {
	if p.pid == 0 {
		return
	}
	defer func() { p.pid = 0 }()
	// A daemon's children are its own until it ends; afterwards ours.
	tree := descendants(p.pid)
	syscall.Kill(p.pid, syscall.SIGTERM)
	for end := time.Now().Add(ready); !exited(p.pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			syscall.Kill(p.pid, syscall.SIGKILL)
			break
		}
	}
	if p.cmd != nil {
		p.cmd.Wait()
		return
	}
	for _, pid := range tree {
		if pid != p.pid {
			syscall.Kill(pid, syscall.SIGTERM)
		}
		var status syscall.WaitStatus
		syscall.Wait4(pid, &status, 0, nil)
	}
}

// A stat is what is needed of /proc/PID/stat.
type stat struct {
	state  string
	parent int
	ticks  int64 // of CPU, of it and of the children that it waited for
}

func readStat(pid int) (s stat, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return s, err
	}
	// The name, which comes second in parentheses, may hold anything.
	_, rest, _ := strings.Cut(string(text[bytes.LastIndexByte(text, ')'):]), " ")
	f := strings.Fields(rest)
	if len(f) < 15 {
		return s, fmt.Errorf("/proc/%d/stat: %q", pid, text)
	}
	s.state = f[0]
	s.parent, _ = strconv.Atoi(f[1])
	for _, field := range f[11:15] { // utime, stime, cutime, cstime
		n, _ := strconv.ParseInt(field, 10, 64)
		s.ticks += n
	}
	return s, nil
}

// descendants returns pid and all processes below it.
func descendants(pid int) []int {
	children := map[int][]int{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if id, err := strconv.Atoi(e.Name()); err == nil {
			if s, err := readStat(id); err == nil {
				children[s.parent] = append(children[s.parent], id)
			}
		}
	}
	tree := []int{pid}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree
}

// tick is the unit of /proc/PID/stat, which is 1/100 s for user space whatever
// the kernel's own may be.
const tick = 10 * time.Millisecond

// cpu returns the CPU time that the server and its children have used.
func (p *process) cpu() time.Duration {
	var ticks int64
	for _, pid := range descendants(p.pid) {
		if s, err := readStat(pid); err == nil {
			ticks += s.ticks
		}
	}
	return time.Duration(ticks) * tick
}

// memory returns the MiB that the server and its children hold; what they
// share with others counts in part.
func (p *process) memory() float64 {
	var kib int64
	for _, pid := range descendants(p.pid) {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		_, rest, _ := strings.Cut(string(text), "\nPss:")
		var n int64
		fmt.Sscan(rest, &n)
		kib += n
	}
	return float64(kib) / k
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
