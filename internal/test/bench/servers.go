//go:build linux

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A server is a program that is compared: how to start it, with {socket} or
// {port} of 127.0.0.1, {format} and {image} put in. It serves the image
// writable, to any number of clients, as the export "disk".
type server struct {
	name    string
	unix    []string
	tcp     []string                      // nil if it cannot
	direct  []string                      // options that bypass the page cache; nil if it cannot
	only    bool                          // takes part in nothing but that
	formats []string                      // that it serves
	simple  bool                          // has no structured replies
	daemon  bool                          // leaves itself behind, with its process id in {pid}
	config  func(transport string) string // of a file, which is {config}
	ours    bool                          // not a peer
}

var both = []string{"raw", "qcow2"}

// imgnbd is a build of ours. Its path may follow settings of the environment,
// as in "GOMAXPROCS=1 bin/imgnbd".
func imgnbd(name, command string) server {
	program := strings.Fields(command)
	if len(program) > 1 {
		program = append([]string{"env"}, program...)
	}
	with := func(args ...string) []string { return slices.Concat(program, args) }
	return server{
		name: name, ours: true, formats: both,
		unix:   with("-k", "{socket}", "-t", "-e", "0", "-x", "disk", "-f", "{format}", "{image}"),
		tcp:    with("-b", "127.0.0.1", "-p", "{port}", "-t", "-e", "16", "-x", "disk", "-f", "{format}", "{image}"),
		direct: []string{"--cache=none"},
	}
}

func qemuNBD(name, program, aio string) server {
	return server{
		name: name, formats: both, only: aio == "native",
		unix:   []string{program, "-k", "{socket}", "-t", "-e", "0", "-x", "disk", "--aio=" + aio, "-f", "{format}", "{image}"},
		tcp:    []string{program, "-b", "127.0.0.1", "-p", "{port}", "-t", "-e", "16", "-x", "disk", "--aio=" + aio, "-f", "{format}", "{image}"},
		direct: []string{"--cache=none"},
	}
}

// peers are the servers in a folder, or in the PATH if that is "".
func peers(folder, suffix string) []server {
	program := func(name string) string { return filepath.Join(folder, name) }
	return []server{
		qemuNBD("qemu-nbd threads"+suffix, program("qemu-nbd"), "threads"),
		qemuNBD("qemu-nbd io_uring"+suffix, program("qemu-nbd"), "io_uring"),
		qemuNBD("qemu-nbd native"+suffix, program("qemu-nbd"), "native"),
		{
			name: "nbdkit" + suffix, formats: []string{"raw"},
			unix: []string{program("nbdkit"), "-f", "-U", "{socket}", "file", "{image}"},
			tcp:  []string{program("nbdkit"), "-f", "-i", "127.0.0.1", "-p", "{port}", "file", "{image}"},
		},
		{
			name: "nbd-server" + suffix, formats: []string{"raw"}, simple: true, daemon: true,
			unix:   []string{program("nbd-server"), "-C", "{config}", "-p", "{pid}"},
			tcp:    []string{program("nbd-server"), "-C", "{config}", "-p", "{pid}"},
			config: nbdServer,
		},
	}
}

// installed lists the peers of two ages: the system's, and Debian 13's, which
// install-judges unpacks. It returns the names of those that are missing too.
func installed() (found []server, missing []string) {
	all := peers("", "")
	if cache, err := os.UserCacheDir(); err == nil {
		all = append(all, peers(filepath.Join(cache, "imgnbd", "judges", "debian-13", "bin"), newer)...)
	}
	for _, s := range all {
		if _, err := exec.LookPath(s.unix[0]); err != nil {
			missing = append(missing, s.name)
		} else {
			found = append(found, s)
		}
	}
	return found, missing
}

const newer = " (Debian 13)"

// nbdServer is a configuration. With a Unix socket there is no TCP port.
func nbdServer(transport string) string {
	listen := "unixsock = {socket}\n"
	if transport == tcp {
		listen = "listenaddr = 127.0.0.1\nport = {port}\n"
	}
	return "[generic]\n" + listen + "[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
}

// can reports whether s takes part in w.
func (s server) can(w workload) bool {
	return slices.Contains(s.formats, w.kind.format) &&
		(w.transport == unix || s.tcp != nil) &&
		(!w.Structured || !s.simple) &&
		(w.place == direct && s.direct != nil || w.place != direct && !s.only)
}

// command returns what starts s for w.
func (s server) command(w workload) []string {
	args := s.unix
	if w.transport == tcp {
		args = s.tcp
	}
	if w.place == direct {
		// The image comes last.
		args = slices.Concat(args[:len(args)-1], s.direct, args[len(args)-1:])
	}
	return args
}
