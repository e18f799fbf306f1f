//go:build linux

package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// fileDisk returns a raw disk over a file with the pattern in it, and the file.
func fileDisk(t *testing.T, size int) (image.Device, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, pattern(0, size), 0o666); err != nil {
		t.Fatal(err)
	}
	store, err := file.Open(context.Background(), &url.URL{Scheme: "file", Path: path}, storage.Options{Access: storage.Write})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := raw.Open(store, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev, path
}

// watched counts the bytes that the server copies and the pins that it holds.
type watched struct {
	hooked
	copied atomic.Int64
	pins   atomic.Int64
	pinned atomic.Int64 // pins that were ever taken
}

func watch(dev image.Device) *watched {
	w := &watched{hooked: hooked{Device: dev}}
	w.tryReadAt = func(p []byte, off int64) error {
		w.copied.Add(int64(len(p)))
		return dev.TryReadAt(p, off)
	}
	w.readAt = func(p []byte, off int64) (int, error) {
		w.copied.Add(int64(len(p)))
		return dev.ReadAt(p, off)
	}
	return w
}

func (w *watched) Pin() image.Pin {
	w.pins.Add(1)
	w.pinned.Add(1)
	return image.NewPin(w, 0)
}

func (w *watched) Unpin(uint64) { w.pins.Add(-1) }

// TestSendFile: large reads come from the file itself.
func TestSendFile(t *testing.T) {
	const size = 40 << 20
	disk, _ := fileDisk(t, size)
	dev := watch(disk)
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	want := pattern(0, size)
	for _, style := range []style{simple, structured, extended} {
		p := s.connect("unix", "", style)
		for _, n := range []int{sendFileMin, 1<<20 + 3, nbd.MaxPayload} {
			before := dev.copied.Load()
			same(t, style.String(), p.ok(nbd.CmdRead, 0, 4095, uint64(n), nil), want[4095:4095+n])
			if copied := dev.copied.Load() - before; copied > 4096 {
				t.Errorf("%v: %d bytes of %d were copied", style, copied, n)
			}
		}
	}
	if n := dev.pins.Load(); n != 0 {
		t.Errorf("%d pins are held", n)
	}
}

// TestSendFileCut: a file that is cut while it is sent. What it does not give
// any more is the device's to give; if that fails too, the client is told
// where it can be, and never gets too few bytes or too many.
func TestSendFileCut(t *testing.T) {
	const size = nbd.MaxPayload
	const kept = size/2 - 64<<10 // the kernel gives up a piece as a whole
	broken := errors.New("medium is broken")
	for _, fails := range []bool{false, true} {
		for _, style := range []style{simple, structured, extended} {
			disk, path := fileDisk(t, size)
			dev := watch(disk)
			var cut atomic.Bool
			dev.appendExtents = func(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
				// With the first bytes under way, the rest of the file goes.
				if off > 0 && off < size/2 && !cut.Swap(true) {
					if err := os.Truncate(path, size/2); err != nil {
						t.Error(err)
					}
				}
				if want&image.WantLocation == 0 {
					return append(dst, image.Extent{Offset: off, Length: n, Data: true}), nil
				}
				return disk.AppendExtents(dst, off, n, want)
			}
			dev.readAt = func(p []byte, off int64) (int, error) {
				if fails {
					return 0, broken
				}
				copy(p, pattern(uint64(off), len(p)))
				return len(p), nil
			}
			p := serve(t, map[string]*Export{"": {Device: dev}}, nil).connect("unix", "", style)
			p.write(p.header(nbd.CmdRead, 0, 1, 0, size))
			switch {
			case !fails:
				same(t, style.String(), p.answer(0, size).data, pattern(0, size))
			case style == simple:
				same(t, style.String(), p.read(nbd.SimpleReplySize + kept)[nbd.SimpleReplySize:], pattern(0, kept))
				if n, err := io.Copy(io.Discard, p.conn); n > size/2-kept || err != nil {
					t.Errorf("after a read that cannot be finished: %d bytes, %v", n, err)
				}
				continue
			default:
				a := p.answer(0, size)
				if a.errno != nbd.EIO {
					t.Errorf("%v: %v", style, a)
				}
				same(t, style.String(), a.data[:kept], pattern(0, kept))
			}
			if !cut.Load() {
				t.Fatal("the file was not cut")
			}
			p.ok(nbd.CmdFlush, 0, 0, 0, nil)
		}
	}
}

// TestSlowReaderHoldsNoPin: a client that stops in the middle of a reply does
// not keep space from being used again.
func TestSlowReaderHoldsNoPin(t *testing.T) {
	const size = 32 << 20
	disk, _ := fileDisk(t, size)
	dev := watch(disk)
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", structured)
	p.write(p.header(nbd.CmdRead, 0, 1, 0, size))
	p.read(nbd.StructuredReplySize + 8 + 1000) // it has begun
	for dev.pinned.Load() < 3 || dev.pins.Load() != 0 {
		runtime.Gosched()
	}
	same(t, "the rest", p.read(size-1000), pattern(1000, size-1000))
	if c := p.chunk(0); !c.done || c.errno != 0 {
		t.Errorf("the last chunk: %+v", c)
	}
}

// TestForward: large reads over TCP are read ahead of their sending, but not
// far: a client that takes nothing makes the server hold little.
func TestForward(t *testing.T) {
	const size, block, requests = 64 << 20, 1 << 20, 48
	disk, _ := fileDisk(t, size)
	dev := watch(disk)
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	want := pattern(0, size)
	for _, style := range []style{simple, structured, extended} {
		p := s.connect("tcp", "", style)
		if err := p.conn.(*net.TCPConn).SetReadBuffer(block); err != nil {
			t.Fatal(err)
		}
		before := dev.copied.Load()
		for i := range uint64(requests) {
			p.write(p.header(nbd.CmdRead, 0, i, i*block, block))
		}
		p.write(p.header(nbd.CmdRead, 0, requests, 0, 512)) // waits for those before it
		for i := range requests {
			same(t, fmt.Sprint(style, i), p.answer(uint64(i*block), block).data, want[i*block:(i+1)*block])
			if read, most := dev.copied.Load()-before, int64(i+1+lineAhead)*block+tcpBuffers; read > most {
				t.Fatalf("%v: %d bytes were read for a client that has taken %d", style, read, (i+1)*block)
			}
		}
		same(t, style.String(), p.answer(0, 512).data, want[:512])
		p.conn.Close()
	}
}

// tcpBuffers is more than the two sockets of a connection keep, in bytes.
const tcpBuffers = 24 << 20
