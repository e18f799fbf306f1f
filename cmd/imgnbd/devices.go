package main

import (
	"fmt"
	"strings"

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
	Image       string            `json:"image,omitempty"`
	Connections int               `json:"connections,omitempty"`
	PID         int               `json:"pid,omitempty"`
	Program     string            `json:"program,omitempty"`
	Dead        bool              `json:"dead"`
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
		l := listedDevice{d.Path, d.Size, d.ReadOnly, d.Image, d.Connections, d.PID, d.Program, d.Dead,
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

func printDevices(u *ui, devices []connect.Device) {
	for _, d := range devices {
		u.printf("%s: %s, %s", d.Path, sizeText(int64(d.Size)), served(d))
		if d.ReadOnly {
			u.printf(", read-only")
		}
		u.printf("\n")
		for _, p := range d.Partitions {
			u.printf("  %s: %s\n", p.Path, sizeText(int64(p.Size)))
		}
		for _, x := range d.Holders {
			u.printf("  %s\n", printable(x.String()))
		}
	}
}

// served says what a device is, and whose.
func served(d connect.Device) string {
	what := printable(d.Image)
	if what == "" {
		what = "attached"
	}
	switch {
	case d.Dead:
		return fmt.Sprintf("%s, whose server, process %d, has ended", what, d.PID)
	case d.Program != "":
		return fmt.Sprintf("%s by %s, process %d", what, printable(d.Program), d.PID)
	}
	return what + " by a program that has ended"
}
