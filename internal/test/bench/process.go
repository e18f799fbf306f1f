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
	uri    string
	pid    int
	cmd    *exec.Cmd // nil for a daemon, which is our child all the same
	output *bytes.Buffer
}

// ready bounds a server's start, and its end.
const ready = 20 * time.Second

// start starts s and returns when it has answered a client.
func start(ctx context.Context, s server, dir, transport, format, image string) (*process, error) {
	args := s.unix
	if transport == tcp {
		args = s.tcp
	}
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
	fill := strings.NewReplacer("{socket}", socket, "{pid}", pid, "{config}", config, "{port}", port, "{format}", format, "{image}", image)
	if s.config != nil {
		if err := os.WriteFile(config, []byte(fill.Replace(s.config(transport))), 0o600); err != nil {
			return nil, err
		}
	}
	var filled []string
	for _, a := range args {
		filled = append(filled, fill.Replace(a))
	}
	p := &process{output: new(bytes.Buffer), uri: "nbd://127.0.0.1:" + port + "/disk"}
	network, address := "tcp", "127.0.0.1:"+port
	if transport == unix {
		network, address = "unix", socket
		p.uri = (&nbd.URI{Network: "unix", Address: socket, Export: "disk"}).String()
	}
	cmd := exec.Command(filled[0], filled[1:]...)
	cmd.Stdout, cmd.Stderr = p.output, p.output
	cmd.WaitDelay = time.Second
	if s.daemon {
		// Its output would be held open; whatever it has to say is not ours.
		cmd.Stdout, cmd.Stderr = nil, nil
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	} else {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		p.cmd, p.pid = cmd, cmd.Process.Pid
	}
	if err := p.await(ctx, network, address, pid); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s: %w\n%s", s.name, err, p.output)
	}
	return p, nil
}

// await returns when a client has been through a handshake.
func (p *process) await(ctx context.Context, network, address, pidFile string) error {
	ctx, cancel := context.WithTimeout(ctx, ready)
	defer cancel()
	for {
		if p.pid == 0 {
			text, _ := os.ReadFile(pidFile)
			p.pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		err := handshake(ctx, network, address)
		if err == nil && p.pid != 0 {
			return nil
		}
		if p.cmd != nil && exited(p.pid) {
			return errors.New("ended at once")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", errors.Join(context.Cause(ctx), err))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func handshake(ctx context.Context, network, address string) error {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = nbd.Handshake(ctx, conn, nbd.Options{Export: "disk", Protocol: nbd.Simple})
	return err
}

// exited reports whether a child of ours has ended and was not waited for.
func exited(pid int) bool {
	st, err := readStat(pid)
	return err != nil || st.state == "Z"
}

// stop ends the server, by force if it does not end itself.
func (p *process) stop() {
	if p.pid == 0 {
		return
	}
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

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
