package connect

import (
	"path/filepath"
	"slices"
	"strconv"
)

// A Device is a device that is attached.
type Device struct {
	Path     string
	Size     uint64 // bytes
	ReadOnly bool

	// Image and Connections are known of devices of this module's. PID is
	// that of the server, or else of the program that attached the device,
	// which may have ended; 0: unknown.
	Image       string
	Connections int
	PID         int
	Program     string // "" if it has ended
	Dead        bool   // the server, one of this module's, has ended

	Partitions []Partition
	Holders    []Holder
}

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
	}
	if s := h.server(index); s.known() {
		defer s.close()
		d.Image, d.Connections, d.PID, d.Dead = s.Image, s.Connections, s.PID, s.dead()
	} else {
		d.PID, _ = strconv.Atoi(h.read(index, n, "pid"))
	}
	if !d.Dead && d.PID > 0 {
		d.Program = h.program(strconv.Itoa(d.PID))
	}
	for _, p := range h.partitions(index) {
		d.Partitions = append(d.Partitions, Partition{filepath.Join(h.dev, p), h.bytes(index, p, "start"), h.bytes(index, p, "size")})
	}
	return d
}

// describe says what is attached to a device.
func (h *host) describe(index int) string {
	d := h.device(index)
	what := d.Image
	if what == "" {
		what = "attached"
	}
	switch {
	case d.Dead:
		return what + ", whose server has ended"
	case d.Program != "":
		return what + " by " + d.Program + ", process " + strconv.Itoa(d.PID)
	}
	return what + " by a program that has ended"
}
