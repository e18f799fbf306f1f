package connect

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Use is how a device is held.
type Use string

const (
	Mounted Use = "mount"   // as a file system
	Swap    Use = "swap"    // for swapping
	Claimed Use = "holder"  // by another block device, as of LVM or md
	Opened  Use = "process" // by a process that reads or writes it
)

// A Holder is somebody who uses a device or a partition of it.
type Holder struct {
	Device string // as /dev/nbd0p1
	Use    Use
	Name   string // the mount point, the block device, or the process
}

func (x Holder) String() string {
	switch x.Use {
	case Mounted:
		return x.Device + " is mounted on " + x.Name
	case Swap:
		return x.Device + " is swapped to"
	case Claimed:
		return x.Device + " is part of " + x.Name
	}
	return x.Device + " is open in " + x.Name
}

// A BusyError says who uses a device.
type BusyError struct {
	Path    string
	Holders []Holder // empty: nobody that can be seen from here
}

func (e *BusyError) Error() string {
	if len(e.Holders) == 0 {
		return e.Path + " is in use by somebody who cannot be seen from here"
	}
	var all []string
	for _, x := range e.Holders {
		all = append(all, x.String())
	}
	return strings.Join(all, ", ")
}

// names returns a device and its partitions.
func (h *host) names(index int) []string {
	return append([]string{name(index)}, h.partitions(index)...)
}

// nodes returns the paths of a device and its partitions by their numbers.
func (h *host) nodes(index int) map[string]string {
	nodes := map[string]string{}
	for _, n := range h.names(index) {
		nodes[h.read(index, n, "dev")] = filepath.Join(h.dev, n)
	}
	return nodes
}

// holders returns who has a claim on a device or its partitions.
func (h *host) holders(index int) []Holder {
	var list []Holder
	for _, n := range h.names(index) {
		dir := filepath.Join(h.sys, name(index), "holders")
		if n != name(index) {
			dir = filepath.Join(h.sys, name(index), n, "holders")
		}
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			list = append(list, Holder{filepath.Join(h.dev, n), Claimed, h.blockName(e.Name())})
		}
	}
	nodes := h.nodes(index)
	list = append(list, h.mounts(nodes)...)
	swaps, _ := os.ReadFile(filepath.Join(h.proc, "swaps"))
	for line := range strings.Lines(string(swaps)) {
		if path, _, _ := strings.Cut(line, " "); isNode(nodes, path) {
			list = append(list, Holder{path, Swap, ""})
		}
	}
	return list
}

func isNode(nodes map[string]string, path string) bool {
	return slices.Contains(slices.Collect(maps.Values(nodes)), path)
}

// blockName returns the name that people know a block device by.
func (h *host) blockName(dev string) string {
	if b, err := os.ReadFile(filepath.Join(h.sys, dev, "dm/name")); err == nil {
		return filepath.Join(h.dev, "mapper", strings.TrimSpace(string(b)))
	}
	return filepath.Join(h.dev, dev)
}

// A mount is a line of mountinfo.
type mount struct {
	number, source, point string
	kind                  string // of file system
	writable              bool   // the file system, however it is seen here
}

// node returns the one of these nodes that the file system of a mount is on. Some
// kinds have numbers of their own, and only their source to go by. That is root's
// word in the namespace of this process, except for FUSE, and elsewhere for kinds
// that nobody else can mount.
func (m mount) node(nodes map[string]string, here bool) (path string, ok bool) {
	if path, ok = nodes[m.number]; ok {
		return path, true
	}
	byRoot := here && !strings.HasPrefix(m.kind, "fuse") || m.kind == "btrfs" || m.kind == "bcachefs"
	return m.source, byRoot && isNode(nodes, m.source)
}

// mounts returns the mounts of these nodes in all mount namespaces, those of this
// process first. Where a mount point is known by the same name in several, it is
// there once. Anybody can have a namespace, and mount in it what he says is from
// anywhere.
func (h *host) mounts(nodes map[string]string) []Holder {
	list := h.mountsHere(nodes)
	seen := map[string]bool{h.mountNamespace("self"): true, "": true}
	for _, process := range h.processes() {
		namespace := h.mountNamespace(process)
		if seen[namespace] {
			continue
		}
		seen[namespace] = true
		for _, m := range h.mountinfo(process) {
			path, ok := m.node(nodes, false)
			if x := (Holder{path, Mounted, m.point}); ok && !slices.Contains(list, x) {
				list = append(list, x)
			}
		}
	}
	return list
}

// mountsHere returns those in the mount namespace of this process.
func (h *host) mountsHere(nodes map[string]string) []Holder {
	var list []Holder
	for _, m := range h.mountinfo("self") {
		path, ok := m.node(nodes, true)
		if x := (Holder{path, Mounted, m.point}); ok && !slices.Contains(list, x) {
			list = append(list, x)
		}
	}
	return list
}

// mountNamespace tells that of a process from others; "": it has ended.
func (h *host) mountNamespace(process string) string {
	namespace, _ := os.Readlink(filepath.Join(h.proc, process, "ns/mnt"))
	return namespace
}

// mountinfo returns the mounts that a process sees.
func (h *host) mountinfo(process string) []mount {
	text, _ := os.ReadFile(filepath.Join(h.proc, process, "mountinfo"))
	var list []mount
	for line := range strings.Lines(string(text)) {
		if m, ok := parseMount(line); ok {
			list = append(list, m)
		}
	}
	return list
}

// parseMount reads a line of mountinfo, see proc(5).
func parseMount(line string) (mount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	f, g := strings.Fields(before), strings.Fields(after)
	if !ok || len(f) < 5 || len(g) < 2 {
		return mount{}, false
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	writable := len(g) > 2 && strings.HasPrefix(g[2], "rw")
	return mount{f[2], unescape.Replace(g[1]), unescape.Replace(f[4]), g[0], writable}, true
}

func (h *host) processes() []string {
	entries, _ := os.ReadDir(h.proc)
	var list []string
	for _, e := range entries {
		if n := e.Name(); n[0] >= '1' && n[0] <= '9' {
			list = append(list, n)
		}
	}
	return list
}

// openers returns the processes that have a device or a partition of it open.
func (h *host) openers(index int) []Holder {
	var list []Holder
	paths := map[string]bool{}
	for _, n := range h.names(index) {
		paths[filepath.Join(h.dev, n)] = true
	}
	for _, process := range h.processes() {
		links, _ := filepath.Glob(filepath.Join(h.proc, process, "fd/*"))
		for _, l := range links {
			if path, err := os.Readlink(l); err == nil && paths[path] {
				list = append(list, Holder{path, Opened, fmt.Sprintf("%s, process %s", h.program(process), process)})
				break
			}
		}
	}
	return list
}

// hasOpen reports whether a process has a file open. No others of its files are
// looked at: they may be where nobody answers.
func (h *host) hasOpen(pid int, f *os.File) bool {
	is, err := f.Stat()
	if err != nil {
		return false
	}
	links, _ := filepath.Glob(filepath.Join(h.proc, strconv.Itoa(pid), "fd/*"))
	for _, l := range links {
		if path, err := os.Readlink(l); err != nil || filepath.Base(path) != filepath.Base(f.Name()) {
			continue
		}
		if st, err := os.Stat(l); err == nil && os.SameFile(st, is) {
			return true
		}
	}
	return false
}

// program names what a process runs, "" if there is no such process.
func (h *host) program(pid string) string {
	comm, _ := os.ReadFile(filepath.Join(h.proc, pid, "comm"))
	return strings.TrimSpace(string(comm))
}
