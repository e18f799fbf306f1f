package export

import (
	"bytes"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestUnderWay: reads that are under way get their own bytes or their own
// error, whether they have arrived when they are looked at, are waited for, or
// fail; and nothing is left of those whose client went.
func TestUnderWay(t *testing.T) {
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
		peers := []*peer{s.connect(network, "", style), s.connect(network, "", style)}
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
