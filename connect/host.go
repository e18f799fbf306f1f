package connect

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A host is where devices are: the kernel's commands, and the files in which
// it shows what it has.
type host struct {
	kernel
	sys  string // /sys/block
	dev  string // /dev
	proc string // /proc
	run  string // /run/imgnbd, where servers say what they serve
}

func newHost() (*host, error) {
	k, err := newKernel()
	if err != nil {
		return nil, err
	}
	return &host{kernel: k, sys: "/sys/block", dev: "/dev", proc: "/proc", run: "/run/imgnbd"}, nil
}

// kernel is what is not done by reading a file.
type kernel interface {
	// connect makes a device and returns its index.
	connect(c *config) (int, error)
	// reconfigure gives a device new connections in place of those that have
	// ended. Connections that there is no place for are ignored in silence:
	// their other ends see the end at once.
	reconfigure(r *reconfiguration) error
	// setTimeout sets both times of a config for an attached device, also for
	// requests that are under way; backend is of its attachment, or it is
	// refused with EINVAL.
	setTimeout(index int, backend string, timeout, deadTimeout time.Duration) error
	// kill ends a process at once.
	kill(p *os.Process) error
	// kept returns those ends of socket pairs, closed here, that the kernel has kept.
	kept(conns []net.Conn) ([]net.Conn, error)
	// watch looks after connections that a device has been given.
	watch(conns []net.Conn) (lines, error)
	// detachOnClose has the device disconnected when nobody has it open any
	// more; backend is of its attachment, or it is refused with EINVAL.
	detachOnClose(index int, backend string) error
	// disconnect ends the connections of a device, whoever uses it.
	disconnect(index int) error
	// open opens a block device for reading. An exclusive open fails with
	// EBUSY if the device or a part of it is mounted or claimed otherwise, and
	// keeps it from being so until Close.
	open(path string, exclusive bool) (block, error)
	// number returns major:minor of a block device node.
	number(path string) (string, error)
	// syncFS flushes the file system that is mounted at path.
	syncFS(path string) error
}

// A block is an open block device.
type block interface {
	rescan() error      // reads the partition table again
	sync() error        // flushes the page cache of the device, and the device
	endReadOnly() error // as far as a user has made it so
	Close() error
}

// lines are the connections of a device, as far as they can be seen while the
// kernel uses them. They are used by one goroutine.
type lines interface {
	// wait returns the places of those that have ended, on either side, or the
	// cause of ctx. Each end is told once.
	wait(ctx context.Context) ([]int, error)
	// set watches conn in the place of one that has ended.
	set(place int, conn net.Conn) error
	close()
}

const anyIndex = -1

// A config is all that a device can be told. Attributes stick to a device of
// the kernel beyond its disconnection, so each is sent each time.
type config struct {
	index     int
	size      uint64 // bytes, a multiple of blockSize
	blockSize uint64 // logical, bytes
	flags     uint64 // transmission flags
	conns     []net.Conn
	backend   string // identifies this attachment
	maxPart   int    // of the module; negative: its default
	replaces  bool   // a device of this index that is being destroyed
	destroy   bool   // the device ends with the attachment; one that is attached later is new

	// timeout is how long a request may take until its connection is given up;
	// 0: see setRequestTimer. The kernel counts seconds.
	timeout time.Duration

	// deadTimeout is how long requests wait for a new connection when there is
	// none, before they fail. The kernel counts seconds.
	deadTimeout time.Duration
}

// A reconfiguration is what an attached device is given anew.
type reconfiguration struct {
	index       int
	backend     string // of its attachment, or it is refused with EINVAL
	conns       []net.Conn
	deadTimeout time.Duration // with connections only
}

// read returns what /sys says about a device or a partition of it, "" if it
// says nothing.
func (h *host) read(index int, dev, attribute string) string {
	dir := filepath.Join(h.sys, name(index))
	if dev != name(index) {
		dir = filepath.Join(dir, dev)
	}
	b, err := os.ReadFile(filepath.Join(dir, attribute))
	if err != nil {
		return ""
	}
	return strings.TrimRight(string(b), "\n")
}

// bytes reads a number of sectors.
func (h *host) bytes(index int, dev, attribute string) uint64 {
	sectors, _ := strconv.ParseUint(h.read(index, dev, attribute), 10, 64)
	return sectors * sector
}

func (h *host) size(index int) uint64 { return h.bytes(index, name(index), "size") }

// answered returns what changes when a request to a device is: how many reads,
// writes, discards and flushes there were, see the kernel's block/stat.rst.
func (h *host) answered(index int) string {
	f := append(strings.Fields(h.read(index, name(index), "stat")), make([]string, 16)...)
	return strings.Join([]string{f[0], f[4], f[11], f[15]}, " ")
}

// connected reports whether the kernel has a configuration for the device: it
// is attached, or was and somebody still has it open.
func (h *host) connected(index int) bool { return h.read(index, name(index), "pid") != "" }

// partitions returns the names of the partitions that the kernel knows.
func (h *host) partitions(index int) []string {
	dirs, _ := filepath.Glob(filepath.Join(h.sys, name(index), name(index)+"p*"))
	var names []string
	for _, d := range dirs {
		names = append(names, filepath.Base(d))
	}
	slices.SortFunc(names, func(a, b string) int { return partition(a) - partition(b) })
	return names
}

// partition returns the number of the partition nbd0p12.
func partition(dev string) int {
	_, number, _ := strings.Cut(dev, "p")
	n, _ := strconv.Atoi(number)
	return n
}
