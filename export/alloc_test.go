//go:build linux && !race

package export

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/qcow2"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// TestNoGarbage: the data path makes nothing to collect, whichever way a
// request takes: inline, by the file, ahead, by a worker. Under the race
// detector pools forget at random.
func TestNoGarbage(t *testing.T) {
	const size = 64 << 20
	rawDisk, _ := fileDisk(t, size)
	disks := map[string]image.Device{
		"raw":   rawDisk,
		"qcow2": qcow2Disk(t, size),
		"waits": &hooked{Device: memDisk(t, 8<<20), tryReadAt: never},
		"comes": &hooked{Device: memDisk(t, 8<<20), tryReadAt: underWayAlways},
	}
	arrives := &hooked{Device: memDisk(t, 8<<20)}
	var tries atomic.Int64
	arrives.tryReadAt = func(p []byte, off int64) error {
		if tries.Add(1)%2 == 1 {
			return image.ErrUnderWay
		}
		return arrives.Device.TryReadAt(p, off)
	}
	disks["arrives"] = arrives
	if err := disks["qcow2"].WriteAt(pattern(0, 8<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	const small, large = 4096, 1 << 20
	requests := []struct {
		name  string
		on    string // a disk; "" is each
		cmd   nbd.Command
		off   uint64
		n     int
		count int
	}{
		{"4k reads", "", nbd.CmdRead, 0, small, 8},
		{"1M reads", "", nbd.CmdRead, 0, large, 2},
		{"4k overwrites", "", nbd.CmdWrite, small, small, 8},
		{"1M overwrites", "", nbd.CmdWrite, 0, large, 2},
		{"4k reads of nothing", "qcow2", nbd.CmdRead, size / 2, small, 8},
		{"1M reads of nothing", "qcow2", nbd.CmdRead, size / 2, large, 2},
		{"zeroing", "", nbd.CmdWriteZeroes, 4 << 20, large, 8},
	}
	for name, dev := range disks {
		s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
		for _, network := range []string{"unix", "tcp"} {
			for _, style := range []style{simple, structured, extended} {
				p := s.connect(network, "", style)
				agreed := agreement{structured: style != simple, extended: style == extended}
				for _, r := range requests {
					if r.on != "" && r.on != name {
						continue
					}
					// One at a time, so that each reply is where it is expected. Holes
					// are not told: all are as long as data.
					var flags nbd.CommandFlags
					reply := len(agreed.appendDone(nil, &request{cmd: r.cmd}))
					payload := 0
					switch r.cmd {
					case nbd.CmdRead:
						if reply = agreed.dataHeadSize() + r.n; style != simple {
							flags = nbd.CmdFlagDF
						}
					case nbd.CmdWrite:
						payload = r.n
					}
					ask := append(p.header(r.cmd, flags, 1, r.off, uint64(r.n)), make([]byte, payload)...)
					end := len(agreed.appendDone(nil, &request{cmd: r.cmd}))
					answer := make([]byte, max(reply, end))
					receive := func(b []byte) {
						for len(b) > 0 {
							n, err := p.conn.Read(b)
							if err != nil {
								t.Fatal(err)
							}
							b = b[n:]
						}
					}
					do := func() {
						for range r.count {
							if _, err := p.conn.Write(ask); err != nil {
								t.Fatal(err)
							}
							receive(answer[:reply])
							if style != simple && r.cmd == nbd.CmdRead && answer[5]&nbd.ReplyFlagDone == 0 {
								receive(answer[:end]) // in a chunk of its own
							}
						}
					}
					do() // buffers are made
					most := 0
					if r.cmd == nbd.CmdWriteZeroes && name == "qcow2" {
						most = 2 * r.count // who changes the mapping claims it: that, and a channel
					}
					if got := testing.AllocsPerRun(20, do); got >= float64(most+1) {
						t.Errorf("%s, %s, %v, %s: %v allocations for %d, at most %d", name, network, style, r.name, got, r.count, most)
					}
				}
				p.conn.Close()
				for {
					s.mu.Lock()
					n := len(s.sessions)
					s.mu.Unlock()
					if n == 0 {
						break
					}
				}
			}
		}
	}
}

// TestIdleStack: a connection that waits for its first request does so on the smallest
// stack that there is, 2 KiB.
func TestIdleStack(t *testing.T) {
	const n = 500
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	stacks := func(connections int32) int64 {
		for s.transmitting.Load() != connections {
			runtime.Gosched()
		}
		runtime.GC() // takes back what the handshakes have left
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.StackInuse)
	}
	before := stacks(0)
	for range n {
		s.connect("unix", "", structured)
	}
	if each := (stacks(n) - before) / n; each >= 3<<10 {
		t.Errorf("each of %d idle connections has %d bytes of stack", n, each)
	}
}

// qcow2Disk returns a new disk that holds nothing.
func qcow2Disk(t testing.TB, size int64) image.Device {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	qemu.Img(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	store, err := file.Open(context.Background(), &url.URL{Scheme: "file", Path: path}, storage.Options{Access: storage.WriteGrow})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := qcow2.Open(context.Background(), store, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}
