package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/connect"
)

func TestPrintDevices(t *testing.T) {
	devices := []connect.Device{
		{Path: "/dev/nbd0", Size: 1 << 30, Image: "/disk.qcow2", Connections: 1, PID: 1234, Program: "imgnbd", State: connect.Live,
			Partitions: []connect.Partition{{Path: "/dev/nbd0p1", Start: 1 << 20, Size: 100 << 20}, {Path: "/dev/nbd0p2", Start: 101 << 20, Size: 900 << 20}},
			Holders: []connect.Holder{{Device: "/dev/nbd0p1", Use: connect.Mounted, Name: "/mnt"}, {Device: "/dev/nbd0p1", Use: connect.Mounted, Name: "/a\nb"},
				{Device: "/dev/nbd0p2", Use: connect.Claimed, Name: "/dev/mapper/vg-lv"}}},
		{Path: "/dev/nbd1", Size: 1 << 20, ReadOnly: true, Server: "nbd://host/name", PID: 99, Program: "imgnbd", State: connect.Away,
			Holders: []connect.Holder{{Device: "/dev/nbd1", Use: connect.Swap}}},
		{Path: "/dev/nbd2", Size: 4096, Image: "/disk.raw", Partition: 5, Connections: 1, PID: 100, State: connect.Dead},
		{Path: "/dev/nbd10", Size: 512, PID: 7, State: connect.Unattended},
	}
	var out bytes.Buffer
	u := newUI("imgnbd", nil, &out, nil)
	printDevices(u, devices)
	const want = `DEVICE       SIZE     MODE  STATE       PID   PROGRAM  IMAGE OR SERVER         USE
/dev/nbd0    1 GiB    rw    live        1234  imgnbd   /disk.qcow2
/dev/nbd0p1  100 MiB                                                           mounted on /mnt
/dev/nbd0p1                                                                    mounted on /a�b
/dev/nbd0p2  900 MiB                                                           part of /dev/mapper/vg-lv
/dev/nbd1    1 MiB    ro    away        99    imgnbd   nbd://host/name         swap
/dev/nbd2    4 KiB    rw    dead        100            /disk.raw, partition 5
/dev/nbd10   512 B    rw    unattended  7
`
	if diff := cmp.Diff(strings.ReplaceAll(want, `\ufffd`, "\ufffd"), out.String()); diff != "" {
		t.Error(diff)
	}
	out.Reset()
	if err := u.json(listedDevices(devices[1:3])); err != nil {
		t.Fatal(err)
	}
	const wantJSON = `[
    {
        "device": "/dev/nbd1",
        "size": 1048576,
        "read-only": true,
        "state": "away",
        "server": "nbd://host/name",
        "pid": 99,
        "program": "imgnbd",
        "partitions": [
        ],
        "holders": [
            {
                "device": "/dev/nbd1",
                "use": "swap"
            }
        ]
    },
    {
        "device": "/dev/nbd2",
        "size": 4096,
        "read-only": false,
        "state": "dead",
        "image": "/disk.raw",
        "partition": 5,
        "connections": 1,
        "pid": 100,
        "partitions": [
        ],
        "holders": [
        ]
    }
]
`
	if diff := cmp.Diff(wantJSON, out.String()); diff != "" {
		t.Error(diff)
	}
	out.Reset()
	if printDevices(u, nil); out.Len() > 0 {
		t.Error(out.String())
	}
}
