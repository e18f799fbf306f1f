package export

import (
	"errors"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestLastChunkLast: where the line answers the first part of a read, a hole,
// and a worker the rest, the worker's chunk, which ends the reply, comes after
// the line's, also if the line is busy with further requests of its batch.
func TestLastChunkLast(t *testing.T) {
	const hole, data, other = 64 << 10, 64 << 10, 1 << 20
	for _, style := range []style{structured, extended} {
		dev := &hooked{Device: memDisk(t, 2<<20)}
		dev.appendExtents = func(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
			if off < hole {
				return append(dst, image.Extent{Offset: off, Length: min(n, hole-off), Zero: true}), nil
			}
			return append(dst, image.Extent{Offset: off, Length: n, Data: true, Allocated: true}), nil
		}
		read := make(chan struct{}, 16)
		dev.tryReadAt = func(p []byte, off int64) error {
			switch {
			case off >= other:
				// The line is here while the worker is done long since.
				select {
				case <-read:
				case <-time.After(patience):
					return errors.New("the worker did not read")
				}
				time.Sleep(20 * time.Millisecond)
			case off >= hole:
				return image.ErrWouldBlock
			}
			return dev.Device.TryReadAt(p, off)
		}
		dev.readAt = func(p []byte, off int64) (int, error) {
			n, err := dev.Device.ReadAt(p, off)
			read <- struct{}{}
			return n, err
		}
		p := serve(t, map[string]*Export{"": {Device: dev}}, nil).connect("unix", "", style)
		// One packet, so that both are in one batch.
		p.write(append(p.header(nbd.CmdRead, 0, 1, 0, hole+data), p.header(nbd.CmdRead, nbd.CmdFlagDF, 2, other, 512)...))
		ended := map[uint64]bool{}
		for len(ended) < 2 {
			c := p.chunk(512)
			if ended[c.cookie] {
				t.Fatalf("%v: a chunk of the reply to %d after its last one", style, c.cookie)
			}
			if c.done {
				ended[c.cookie] = true
			}
		}
		_ = p.ok(nbd.CmdFlush, 0, 0, 0, nil)
	}
}
