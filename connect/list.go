package connect

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Device is a device that is attached.
type Device struct {
	Path     string
	Size     uint64 // bytes
	ReadOnly bool

	// Image, of which a Partition may be all that is attached, or Server, and
	// Connections, are known of devices of this module's.
	// PID is that of the process that serves or tends the device, or else of
	// the program that attached it, which may have ended; 0: unknown.
	Image       string
	Partition   int // 0: all of Image
	Server      string
	Connections int
	PID         int
	Program     string // "" if it has ended
	State       State

	Partitions []Partition
	Holders    []Holder
}

// A State says whether somebody answers to a device, as far as it is known.
type State string

const (
	Live       State = "live"       // a process serves or tends it
	Away       State = "away"       // its server cannot be reached, and is tried again
	Dead       State = "dead"       // its server has ended
	Unattended State = "unattended" // attached by a process that has ended: only the kernel knows
)

// A Partition is one that the kernel has found.
type Partition struct {
	Path  string
	Start uint64 // bytes from the beginning of the device
	Size  uint64 // bytes
}

// Devices returns what is attached now, by any program.
func Devices() ([]Device, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.devices(), nil
}

func (h *host) devices() []Device {
	dirs, _ := filepath.Glob(filepath.Join(h.sys, "nbd*"))
	var indices []int
	for _, d := range dirs {
		if i, err := h.index(filepath.Join(h.dev, filepath.Base(d))); err == nil && h.connected(i) {
			indices = append(indices, i)
		}
	}
	slices.Sort(indices)
	var list []Device
	for _, i := range indices {
		list = append(list, h.device(i))
	}
	return list
}

func (h *host) device(index int) Device {
	n := name(index)
	d := Device{
		Path:     h.path(index),
		Size:     h.size(index),
		ReadOnly: h.read(index, n, "ro") == "1",
		Holders:  h.holders(index),
		State:    Live,
	}
	if s := h.server(index); s.known() {
		defer s.close()
		d.Image, d.Partition, d.Server = s.Image, s.Partition, s.Server
		d.Connections, d.PID, d.State = s.Connections, s.PID, s.state()
	} else if d.PID = h.attacher(index); h.program(strconv.Itoa(d.PID)) == "" {
		d.State = Unattended
	}
	if d.State == Live || d.State == Away {
		d.Program = h.program(strconv.Itoa(d.PID))
	}
	for _, p := range h.partitions(index) {
		d.Partitions = append(d.Partitions, Partition{filepath.Join(h.dev, p), h.bytes(index, p, "start"), h.bytes(index, p, "size")})
	}
	return d
}

// attacher returns the process that has attached a device. The kernel notes a thread
// of it; if that has ended, it is returned itself.
func (h *host) attacher(index int) int {
	thread, _ := strconv.Atoi(h.read(index, name(index), "pid"))
	status, _ := os.ReadFile(filepath.Join(h.proc, strconv.Itoa(thread), "status"))
	for line := range strings.Lines(string(status)) {
		if is, ok := strings.CutPrefix(line, "Tgid:"); ok {
			if process, err := strconv.Atoi(strings.TrimSpace(is)); err == nil {
				return process
			}
		}
	}
	return thread
}

// Source names what is attached, for people; "": nobody knows.
func (d *Device) Source() string {
	if d.Partition != 0 {
		return d.Image + ", partition " + strconv.Itoa(d.Partition)
	}
	return d.Image + d.Server
}

// describe says what is attached to a device.
func (h *host) describe(index int) string {
	d := h.device(index)
	what := d.Source()
	if what == "" {
		what = "attached"
	}
	switch {
	case d.State == Dead:
		return what + ", whose server has ended"
	case d.Program != "":
		return what + " by " + d.Program + ", process " + strconv.Itoa(d.PID)
	}
	return what + " by a program that has ended"
}
