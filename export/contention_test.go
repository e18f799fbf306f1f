//go:build linux && !race

package export

import (
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestNoContention: connections that read what is at hand wait neither for each
// other nor for anything that they share, by the runtime's own account of every
// wait for a lock, a channel or a condition.
func TestNoContention(t *testing.T) {
	const size, block, depth, rounds = 8 << 20, 4096, 16, 40
	rawDisk, _ := fileDisk(t, size)
	for name, dev := range map[string]image.Device{"raw": rawDisk, "qcow2": qcow2Disk(t, size), "memory": memDisk(t, size)} {
		if name != "raw" {
			if err := dev.WriteAt(pattern(0, size), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		// What the host has put out of its memory meanwhile is read here, too.
		ready := &hooked{Device: dev, tryReadAt: func(p []byte, off int64) error {
			err := dev.TryReadAt(p, off)
			if errors.Is(err, image.ErrWouldBlock) {
				_, err = dev.ReadAt(p, off)
			}
			return err
		}}
		s := serve(t, map[string]*Export{"": {Device: ready}}, nil)
		for _, procs := range []int{1, 2, 8} {
			conns := make([]*peer, 16)
			for i := range conns {
				conns[i] = s.connect("unix", "", simple)
				conns[i].ok(nbd.CmdRead, 0, 0, size, nil)  // all is at hand now
				conns[i].ok(nbd.CmdRead, 0, 0, block, nil) // and who sent it has ended
			}
			read := func() {
				var wg sync.WaitGroup
				for i, p := range conns {
					var ask []byte
					for n := range uint64(depth) {
						ask = append(ask, p.header(nbd.CmdRead, 0, n, (n*97+uint64(i))%(size/block)*block, block)...)
					}
					wg.Go(func() {
						for range rounds {
							if _, err := p.conn.Write(ask); err != nil {
								t.Error(err)
								return
							}
							if _, err := io.CopyN(io.Discard, p.conn, depth*(16+block)); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			}
			// A lock on the path is met each time, one that the runtime takes for
			// itself now and then is not.
			found := waits(procs, read)
			for range 2 {
				if len(found) > 0 {
					found = waits(procs, read)
				}
			}
			for _, wait := range found {
				t.Errorf("%s, GOMAXPROCS=%d: %s", name, procs, wait)
			}
			for _, p := range conns {
				p.conn.Close()
			}
		}
	}
}

// waits returns where sessions waited while f ran, except for their sockets and
// for the locks of the runtime itself.
func waits(procs int, f func()) []string {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
	defer runtime.SetMutexProfileFraction(runtime.SetMutexProfileFraction(1))
	runtime.SetBlockProfileRate(1)
	defer runtime.SetBlockProfileRate(0)
	before := map[string]int64{}
	collect := func(found func(where string, count int64)) {
		for _, profile := range []func([]runtime.BlockProfileRecord) (int, bool){runtime.MutexProfile, runtime.BlockProfile} {
			n, _ := profile(nil)
			records := make([]runtime.BlockProfileRecord, n+64)
			n, _ = profile(records)
			for _, r := range records[:n] {
				var where []string
				frames := runtime.CallersFrames(r.Stack())
				for more := true; more; {
					var frame runtime.Frame
					frame, more = frames.Next()
					where = append(where, frame.Function)
				}
				if where[0] != "runtime.unlock" {
					found(strings.Join(where, " < "), r.Count)
				}
			}
		}
	}
	collect(func(where string, count int64) { before[where] += count })
	f()
	after := map[string]int64{}
	collect(func(where string, count int64) { after[where] += count })
	var all []string
	for where, count := range after {
		if count > before[where] && strings.Contains(where, "(*session).serveRequests") {
			all = append(all, where)
		}
	}
	return all
}
