//go:build !race

package export

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestNoGarbage: what the line serves inline makes nothing to collect. Under
// the race detector pools forget at random.
func TestNoGarbage(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	for _, style := range []style{simple, structured, extended} {
		p := s.connect("unix", "", style)
		read := p.header(nbd.CmdRead, 0, 1, 0, 4096)
		write := append(p.header(nbd.CmdWrite, 0, 2, 4096, 512), make([]byte, 512)...)
		var batch []byte
		for range 8 {
			batch = append(append(batch, read...), write...)
		}
		agreed := agreement{structured: style != simple, extended: style == extended}
		size := 8 * (agreed.dataHeadSize() + 4096 + len(agreed.appendDone(nil, &request{cmd: nbd.CmdWrite})))
		replies := make([]byte, size)
		got := testing.AllocsPerRun(200, func() {
			if _, err := p.conn.Write(batch); err != nil {
				t.Fatal(err)
			}
			for n := 0; n < size; {
				m, err := p.conn.Read(replies[n:])
				if err != nil {
					t.Fatal(err)
				}
				n += m
			}
		})
		if got >= 1 {
			t.Errorf("%v: %v allocations for 16 requests", style, got)
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
