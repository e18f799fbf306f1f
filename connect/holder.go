package connect

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// holders returns who has a claim on a device or its partitions.
func (h *host) holders(index int) []Holder {
	var list []Holder
	byNumber, byPath := map[string]string{}, map[string]bool{}
	for _, n := range h.names(index) {
		path := filepath.Join(h.dev, n)
		byPath[path] = true
		byNumber[h.read(index, n, "dev")] = path
		dir := filepath.Join(h.sys, name(index), "holders")
		if n != name(index) {
			dir = filepath.Join(h.sys, name(index), n, "holders")
		}
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			list = append(list, Holder{path, Claimed, h.blockName(e.Name())})
		}
	}
	for _, m := range h.mounts() {
		// Some file systems have numbers of their own.
		if path, ok := byNumber[m.number]; ok {
			list = append(list, Holder{path, Mounted, m.point})
		} else if byPath[m.source] {
			list = append(list, Holder{m.source, Mounted, m.point})
		}
	}
	swaps, _ := os.ReadFile(filepath.Join(h.proc, "swaps"))
	for line := range strings.Lines(string(swaps)) {
		if path, _, _ := strings.Cut(line, " "); byPath[path] {
			list = append(list, Holder{path, Swap, ""})
		}
	}
	return list
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
	writable              bool // the file system, however it is seen here
}

// mounts returns the mounts of all mount namespaces, those of this process
// first. Where a mount point is known by the same name in several, it is there
// once.
func (h *host) mounts() []mount {
	var list []mount
	seen := map[string]bool{}
	for _, process := range append([]string{"self"}, h.processes()...) {
		dir := filepath.Join(h.proc, process)
		if namespace, err := os.Readlink(filepath.Join(dir, "ns/mnt")); err != nil || seen[namespace] {
			continue
		} else {
			seen[namespace] = true
		}
		text, err := os.ReadFile(filepath.Join(dir, "mountinfo"))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(text)) {
			m, ok := parseMount(line)
			if ok && !slices.Contains(list, m) {
				list = append(list, m)
			}
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
	return mount{f[2], unescape.Replace(g[1]), unescape.Replace(f[4]), writable}, true
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

// program names what a process runs, "" if there is no such process.
func (h *host) program(pid string) string {
	comm, _ := os.ReadFile(filepath.Join(h.proc, pid, "comm"))
	return strings.TrimSpace(string(comm))
}
