package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// handOver moves all connections of s to a new server of e.
func handOver(t *testing.T, s *Server, e *Export) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	handed, err := s.HandOver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var told atomic.Int32
	next := &Server{ConnState: func(_ *Client, st State) {
		if st == StateNew {
			told.Add(1)
		}
	}}
	for i, h := range handed {
		if err := next.Resume(h, e); err != nil {
			t.Fatal(err)
		}
		if got := int(told.Load()); got != i+1 {
			t.Errorf("%d connections were resumed, ConnState was told of %d", i+1, got)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := next.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return next
}

// A client does not see that its connection goes from one server to another,
// wherever in a request that happens.
func TestHandOver(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			var flushed atomic.Int32
			disk := memDisk(t, 1<<20)
			e := &Export{Name: "e", Device: &hooked{Device: disk, flush: func() error {
				flushed.Add(1)
				return disk.Flush()
			}}}
			first := serve(t, map[string]*Export{"e": e}, nil)
			p := first.connect(network, "e", simple)

			// Idle, with something to flush.
			p.ok(nbd.CmdWrite, 0, 0, 512, pattern(1, 512))
			s := handOver(t, first.Server, e)
			if flushed.Load() == 0 {
				t.Error("what was answered is not flushed")
			}
			if got := p.ok(nbd.CmdRead, 0, 0, 512, nil); !bytes.Equal(got, pattern(1, 512)) {
				t.Error("another disk")
			}

			// At each place of a request that has arrived in part.
			for _, n := range []int{512, largeWrite + 512, 512} {
				whole := append(p.header(nbd.CmdWrite, 0, 7, 4096, uint64(n)), pattern(uint64(n), n)...)
				for _, cut := range []int{1, 27, 28, 29, len(whole) - 1} {
					p.write(whole[:cut])
					rest := make(chan struct{})
					go func() {
						defer close(rest)
						time.Sleep(20 * time.Millisecond)
						p.conn.Write(whole[cut:])
					}()
					s = handOver(t, s, e)
					<-rest
					if reply := p.read(16); binary.BigEndian.Uint64(reply[8:]) != 7 || binary.BigEndian.Uint32(reply[4:]) != 0 {
						t.Fatalf("%d of %d bytes: reply %x", cut, len(whole), reply)
					}
					if got := p.ok(nbd.CmdRead, 0, 4096, uint64(n), nil); !bytes.Equal(got, pattern(uint64(n), n)) {
						t.Errorf("%d of %d bytes: other data", cut, len(whole))
					}
				}
			}

			// A refused request, whose payload is skipped.
			p.write(append(p.header(nbd.CmdWrite, 0, 8, 1<<20, 600000), make([]byte, 1000)...))
			if reply := p.read(16); nbd.Errno(binary.BigEndian.Uint32(reply[4:])) != nbd.ENOSPC {
				t.Fatalf("reply %x", reply)
			}
			rest := make(chan struct{})
			go func() {
				defer close(rest)
				p.conn.Write(make([]byte, 599000))
			}()
			handOver(t, s, e)
			<-rest
			p.ok(nbd.CmdFlush, 0, 0, 0, nil)
		})
	}
}

// Under load no request is lost and none is done twice.
func TestHandOverUnderLoad(t *testing.T) {
	disk := memDisk(t, 1<<20)
	var writes atomic.Int64
	e := &Export{Name: "e", MultiConn: true, Device: &hooked{Device: disk, writeAt: func(p []byte, off int64, f image.WriteFlags) error {
		writes.Add(1)
		return disk.WriteAt(p, off, f)
	}}}
	first := serve(t, map[string]*Export{"e": e}, nil)
	const clients, requests, depth = 2, 400, 16
	done := make(chan error, clients)
	for c := range clients {
		p := first.connect("unix", "e", simple)
		go func() {
			slots := make(chan struct{}, depth)
			go func() {
				for i := range requests {
					slots <- struct{}{}
					// With FUA it is done by a worker, and not in order.
					flags := nbd.CommandFlags(0)
					if i%3 == 0 {
						flags = nbd.CmdFlagFUA
					}
					off := uint64(c*requests+i) * 512
					p.conn.Write(append(p.header(nbd.CmdWrite, flags, uint64(i), off, 512), pattern(off, 512)...))
				}
			}()
			seen := make(map[uint64]bool)
			for range requests {
				var reply [16]byte
				if _, err := io.ReadFull(p.conn, reply[:]); err != nil {
					done <- err
					return
				}
				cookie := binary.BigEndian.Uint64(reply[8:])
				if seen[cookie] || binary.BigEndian.Uint32(reply[4:]) != 0 {
					done <- errors.New("answered twice, or not well")
					return
				}
				seen[cookie] = true
				<-slots
			}
			done <- nil
		}()
	}
	s := first.Server
	ended := 0
	for i := 0; ended < clients; i++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			ended++
		default:
			s = handOver(t, s, e)
			// On one processor they get nowhere otherwise.
			for n := writes.Load(); writes.Load() == n && len(done) == 0; {
				runtime.Gosched()
			}
		}
	}
	if n := writes.Load(); n != clients*requests {
		t.Errorf("%d writes for %d requests", n, clients*requests)
	}
	got := make([]byte, clients*requests*512)
	if _, err := disk.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	same(t, "disk", got, pattern(0, len(got)))
}

// What cannot go on elsewhere is ended, and a flush that fails ends all.
func TestHandOverRefused(t *testing.T) {
	disk := memDisk(t, 1<<20)
	e := &Export{Name: "e", Device: disk, MultiConn: true}
	first := serve(t, map[string]*Export{"e": e}, nil)
	asking, p, q := first.dial("unix"), first.connect("unix", "e", structured), first.connect("unix", "e", simple)
	asking.greet()
	s := handOver(t, first.Server, e)
	for what, c := range map[string]*peer{"a handshake": asking, "structured replies": p} {
		if !c.gone() {
			t.Errorf("%s: a connection goes on whose state nobody knows", what)
		}
	}
	q.ok(nbd.CmdFlush, 0, 0, 0, nil)
	if err := s.Resume(Handed{Input: make([]byte, lineInput+1)}, e); err == nil {
		t.Error("too much input")
	}

	broken := &Export{Name: "e", Device: &hooked{Device: disk, flush: func() error { return errors.New("broken") }}}
	second := &server{t: t, Server: &Server{Open: func(context.Context, *Client, string) (*Export, error) { return broken, nil }}}
	r := second.connect("pipe", "e", simple)
	r.ok(nbd.CmdWrite, 0, 0, 512, pattern(1, 512))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if handed, err := second.HandOver(ctx); handed != nil || err == nil {
		t.Errorf("%v, %v", handed, err)
	}
	if !r.gone() {
		t.Error("it is left open")
	}
}
