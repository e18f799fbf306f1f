//go:build linux

package export

import (
	"bytes"
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
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/qcow2"
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

	recalled atomic.Bool
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
	return image.NewPin(w, 0)
}

func (w *watched) Unpin(uint64) { w.pins.Add(-1) }

func (w *watched) Recalled() bool { return w.recalled.Load() }

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
	for dev.pins.Load() != 0 { // soon
		runtime.Gosched()
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
			// A client that took what comes might have most of it by one call.
			for began := time.Now(); !cut.Load(); runtime.Gosched() {
				if time.Since(began) > patience {
					t.Fatal("the file was not cut")
				}
			}
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
			p.ok(nbd.CmdFlush, 0, 0, 0, nil)
		}
	}
}

// TestLoan: a pin is held until the client has what was sent from a location,
// however slow it is, and no longer.
func TestLoan(t *testing.T) {
	const size = 32 << 20
	disk, _ := fileDisk(t, size)
	dev := watch(disk)
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", structured)
	p.write(p.header(nbd.CmdRead, 0, 1, 0, size))
	p.read(nbd.StructuredReplySize + 8)
	const step = 1 << 20
	for at := uint64(0); at < size; at += step {
		same(t, "a part", p.read(step), pattern(at, step))
		// A client that has all that was sent so far may be without one until
		// the server goes on; when no more can be sent, it has one.
		for end := time.Now().Add(patience); at < size-4*sendBuffer && dev.pins.Load() != 1; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatalf("%d pins are held for a client that has %d bytes of %d", dev.pins.Load(), at+step, size)
			}
		}
	}
	if c := p.chunk(0); !c.done || c.errno != 0 {
		t.Errorf("the last chunk: %+v", c)
	}
	for dev.pins.Load() != 0 {
		runtime.Gosched()
	}
	// It is released, too, if the client goes away without having read.
	p.write(p.header(nbd.CmdRead, 0, 1, 0, size))
	for dev.pins.Load() == 0 {
		runtime.Gosched()
	}
	p.conn.Close()
	for dev.pins.Load() != 0 {
		runtime.Gosched()
	}
}

// A queue is a transport of which a test says what has been received.
type queue struct {
	transport
	total, rest atomic.Int64
}

func (q *queue) sent() int64   { return q.total.Load() }
func (q *queue) unread() int64 { return q.rest.Load() }

// TestLoanQueue: replies that were copied are no matter; what came before them
// is.
func TestLoanQueue(t *testing.T) {
	disk, _ := fileDisk(t, 1<<20)
	dev := watch(disk)
	var q queue
	var l loan
	l.init(&q, func(err error) { t.Error(err) })
	send := func(n int64, byLocation bool) {
		l.begin(dev)
		q.total.Add(n)
		q.rest.Add(n)
		l.end(byLocation)
	}
	send(100, true)
	send(50, false)
	for _, c := range []struct{ rest, pins int64 }{{150, 1}, {51, 1}, {50, 0}, {0, 0}} {
		q.rest.Store(c.rest)
		l.settled()
		if got := dev.pins.Load(); got != c.pins {
			t.Errorf("%d pins with %d bytes unread, want %d", got, c.rest, c.pins)
		}
	}
	send(10, true)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if l.close(ctx); dev.pins.Load() != 0 {
		t.Error("a pin is held after the end")
	}
}

// TestLoanRecalled: who takes nothing while a pin is wanted back is parted from,
// and nobody else is.
func TestLoanRecalled(t *testing.T) {
	disk, _ := fileDisk(t, 1<<20)
	dev := watch(disk)
	var q queue
	var l loan
	failed := make(chan error, 1)
	l.init(&q, func(err error) { failed <- err })
	l.grace = 0
	l.begin(dev)
	q.total.Store(100)
	q.rest.Store(100)
	l.end(true)
	l.look()
	l.look()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
	dev.recalled.Store(true)
	if err := <-failed; err == nil { // the timer looks
		t.Error("no reason")
	}
	if dev.pins.Load() != 1 {
		t.Error("the pin was released before the connection had ended")
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

// TestLentClusters: what a client has not received yet of a qcow2 image that is
// written to does not change into what was written elsewhere, though its
// clusters were given up and others looked for some.
func TestLentClusters(t *testing.T) {
	const size, part = 64 << 20, 2 << 20
	path := qemu.Create(t, "qcow2", "", fmt.Sprint(size))
	store, err := file.Open(context.Background(), &url.URL{Scheme: "file", Path: path}, storage.Options{Access: storage.WriteGrow})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := qcow2.Open(context.Background(), store, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	for _, style := range []style{simple, structured} {
		slow, other := s.connect("unix", "", style), s.connect("unix", "", style)
		old, foreign := bytes.Repeat([]byte{1}, part), bytes.Repeat([]byte{2}, part)
		other.ok(nbd.CmdWrite, 0, 0, part, old)
		other.ok(nbd.CmdFlush, 0, 0, 0, nil)
		slow.write(slow.header(nbd.CmdRead, 0, 42, 0, part))
		head := slow.read(1) // the reply has begun
		other.ok(nbd.CmdTrim, 0, 0, part, nil)
		for at := uint64(part); at < 8*part; at += part {
			other.ok(nbd.CmdFlush, 0, 0, 0, nil)
			other.ok(nbd.CmdWrite, 0, at, part, foreign)
		}
		rest := slow.read(part)
		if i := bytes.IndexByte(append(head, rest...)[64:], 2); i >= 0 {
			t.Errorf("%v: byte %d is of another place", style, i)
		}
		slow.conn.Close()
		other.ok(nbd.CmdTrim, 0, 0, size, nil)
		other.ok(nbd.CmdFlush, 0, 0, 0, nil)
	}
}
