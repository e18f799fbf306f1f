package main

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/imgnbd/imgnbd/connect"
)

// devicesCommand lists what is attached to this machine, by any program.
func devicesCommand() *command {
	c := newCommand("devices")
	output := "human"
	value(c.flags, "output", "", func(s string) error {
		if output = s; s != "human" && s != "json" {
			return fmt.Errorf("--output=%s is none of human, json", s)
		}
		return nil
	})
	c.run = func(u *ui, operands []string) error {
		if len(operands) > 0 {
			return usageError("no operand is expected, not %s", strings.Join(operands, " "))
		}
		devices, err := connect.Devices()
		if err != nil {
			return err
		}
		if output == "json" {
			return u.json(listedDevices(devices))
		}
		printDevices(u, devices)
		return nil
	}
	return c
}

// A listedDevice is a device as JSON shows it.
type listedDevice struct {
	Device      string            `json:"device"`
	Size        uint64            `json:"size"`
	ReadOnly    bool              `json:"read-only"`
	State       connect.State     `json:"state"`
	Image       string            `json:"image,omitempty"`
	Partition   int               `json:"partition,omitempty"`
	Server      string            `json:"server,omitempty"`
	Connections int               `json:"connections,omitempty"`
	PID         int               `json:"pid,omitempty"`
	Program     string            `json:"program,omitempty"`
	Partitions  []listedPartition `json:"partitions"`
	Holders     []listedHolder    `json:"holders"`
}

type listedPartition struct {
	Device string `json:"device"`
	Start  uint64 `json:"start"`
	Size   uint64 `json:"size"`
}

type listedHolder struct {
	Device string      `json:"device"`
	Use    connect.Use `json:"use"`
	Name   string      `json:"name,omitempty"`
}

func listedDevices(devices []connect.Device) []listedDevice {
	list := []listedDevice{}
	for _, d := range devices {
		l := listedDevice{d.Path, d.Size, d.ReadOnly, d.State, d.Image, d.Partition, d.Server, d.Connections, d.PID, d.Program,
			[]listedPartition{}, []listedHolder{}}
		for _, p := range d.Partitions {
			l.Partitions = append(l.Partitions, listedPartition{p.Path, p.Start, p.Size})
		}
		for _, x := range d.Holders {
			l.Holders = append(l.Holders, listedHolder(x))
		}
		list = append(list, l)
	}
	return list
}

// printDevices prints a table with a line for each device and each partition,
// and more where several use it.
func printDevices(u *ui, devices []connect.Device) {
	if len(devices) == 0 {
		return
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
	row("DEVICE", "SIZE", "MODE", "STATE", "PID", "PROGRAM", "IMAGE OR SERVER", "USE")
	for _, d := range devices {
		mode, pid, program := "rw", "", printable(d.Program)
		if d.ReadOnly {
			mode = "ro"
		}
		if d.PID > 0 {
			pid = strconv.Itoa(d.PID)
		}
		use := uses(d.Holders, d.Path)
		row(d.Path, sizeText(int64(d.Size)), mode, string(d.State), pid, program, printable(d.Source()), use[0])
		for _, more := range use[1:] {
			row(d.Path, "", "", "", "", "", "", more)
		}
		for _, p := range d.Partitions {
			use := uses(d.Holders, p.Path)
			row(p.Path, sizeText(int64(p.Size)), "", "", "", "", "", use[0])
			for _, more := range use[1:] {
				row(p.Path, "", "", "", "", "", "", more)
			}
		}
	}
	w.Flush()
	for line := range strings.Lines(b.String()) {
		u.printf("%s\n", strings.TrimRight(line, " \n"))
	}
}

// uses says how a device or a partition is used, at least once.
func uses(holders []connect.Holder, path string) []string {
	var list []string
	for _, x := range holders {
		if x.Device != path {
			continue
		}
		switch x.Use {
		case connect.Mounted:
			list = append(list, "mounted on "+printable(x.Name))
		case connect.Swap:
			list = append(list, "swap")
		default:
			list = append(list, "part of "+printable(x.Name))
		}
	}
	if list == nil {
		return []string{""}
	}
	return list
}
