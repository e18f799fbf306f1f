package export

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestUnderWay: reads that are under way get their own bytes or their own
// error, whether they have arrived when they are looked at, are waited for, or
// fail; and nothing is left of those whose client went.
func TestUnderWay(t *testing.T) {
	for clients := range 2 { // the line of an only one waits by itself
		t.Run(fmt.Sprint(clients+1), func(t *testing.T) { underWayOf(t, clients+1) })
	}
}

func underWayOf(t *testing.T, clients int) {
	const size, block, count, bad = 1 << 20, 4096, 1 << 20 / 4096, 77 * 4096
	each(t, func(t *testing.T, network string, style style) {
		disk := &hooked{Device: memDisk(t, size)}
		if err := disk.Device.WriteAt(pattern(0, size), 0, 0); err != nil {
			t.Fatal(err)
		}
		var tries atomic.Int64
		disk.tryReadAt = func(p []byte, off int64) error {
			if off == bad || tries.Add(1)%4 != 0 {
				return image.ErrUnderWay
			}
			return disk.Device.TryReadAt(p, off)
		}
		disk.readAt = func(p []byte, off int64) (int, error) {
			if off == bad {
				return 0, syscall.EIO
			}
			return disk.Device.ReadAt(p, off)
		}
		s := serve(t, map[string]*Export{"": {Device: disk}}, nil)
		var peers []*peer
		for range clients {
			peers = append(peers, s.connect(network, "", style))
		}
		ask := func(p *peer) {
			var all []byte
			for i := range uint64(count) {
				all = append(all, p.header(nbd.CmdRead, 0, i, i*block, block)...)
			}
			go p.conn.Write(all) // the replies below tell
		}
		for _, p := range peers {
			ask(p)
		}
		for _, p := range peers {
			answered := make(map[uint64]bool)
			for len(answered) < count {
				c := p.chunk(block)
				if !c.done {
					continue
				}
				if answered[c.cookie] {
					t.Fatalf("two replies to %d", c.cookie)
				}
				answered[c.cookie] = true
				switch off := c.cookie * block; {
				case off == bad:
					if c.errno != nbd.EIO {
						t.Errorf("a read that fails: %+v", c)
					}
				case c.errno != 0 || !bytes.Equal(c.data, pattern(off, block)):
					t.Fatalf("read at %d: error %d, or other bytes", off, c.errno)
				}
			}
		}
		for _, p := range peers {
			ask(p)
			p.read(1)
			p.conn.Close()
		}
	})
}

// TestUnderWayBehindStalled: reads that the medium does not answer cost those
// that it does answer nothing, not even a look at whether it has stalled.
func TestUnderWayBehindStalled(t *testing.T) { synctest.Test(t, testUnderWayBehindStalled) }

func testUnderWayBehindStalled(t *testing.T) {
	const block, bad = 4096, 3
	dev := &hooked{Device: memDisk(t, 1<<20), tryReadAt: underWayAlways}
	goOn := make(chan struct{})
	dev.readAt = func(p []byte, off int64) (int, error) {
		if off < bad*block {
			<-goOn
		}
		return dev.Device.ReadAt(p, off)
	}
	s := &server{t: t, Server: &Server{Open: func(context.Context, *Client, string) (*Export, error) {
		return &Export{Device: dev}, nil
	}}}
	unlucky, p := s.connect("pipe", "", simple), s.connect("pipe", "", simple)
	for i := range uint64(bad) {
		unlucky.write(unlucky.header(nbd.CmdRead, 0, i, i*block, block))
	}
	time.Sleep(100 * stalled)

	start := time.Now() // which goes on only when nothing else does
	for i := range uint64(100) {
		p.ok(nbd.CmdRead, 0, (bad+i)*block, block, nil)
	}
	if d := time.Since(start); d > 0 {
		t.Errorf("reads behind those that stall have waited %v", d)
	}

	s.mu.Lock()
	under := &s.devices[dev].under
	s.mu.Unlock()
	close(goOn)
	for range bad {
		unlucky.chunk(block)
	}
	s.shutdown()
	synctest.Wait()
	if under.starting || under.waiting != 0 || under.stuck != 0 {
		t.Errorf("at the end %d goroutines wait, %d are stuck", under.waiting, under.stuck)
	}
}
