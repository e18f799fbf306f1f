package history

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/qcow2"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// backing is a disk full of Initial.
type backing struct{ size int }

func (b backing) OpenImage(ctx context.Context, _ image.Reference) (image.Device, error) {
	p := make([]byte, b.size)
	for i := range p {
		p[i] = Initial
	}
	return raw.Format().Open(ctx, storagetest.MemOf(p), image.Options{ReadOnly: true})
}

func (b backing) OpenStore(context.Context, image.Reference, bool) (storage.Store, error) {
	return nil, os.ErrNotExist
}

// TestClients: what clients of one export are told fits together, byte by
// byte, and what a flush covers survives a power cut, whichever connection it
// came on and whichever the writes.
func TestClients(t *testing.T) {
	qemu.Require(t, "qemu-img")
	for _, tt := range []struct {
		name, options string
		size          int64
		unit          int64
		first         byte
	}{
		{"raw", "", 64 << 10, 4096, 0},
		{"512", "cluster_size=512", 32 << 10, 512, 0},
		{"512 backing", "cluster_size=512", 32 << 10, 512, Initial},
		{"4k backing", "cluster_size=4k", 128 << 10, 4096, Initial},
		{"64k", "cluster_size=64k", 256 << 10, 8192, 0},
		{"subclusters backing", "extended_l2=on,cluster_size=16k", 128 << 10, 2048, Initial},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			requests, points := 900, 60
			if testing.Short() {
				requests, points = 300, 15
			}
			blank := make([]byte, tt.size)
			if tt.options != "" {
				options := tt.options
				if tt.first == Initial {
					back := filepath.Join(t.TempDir(), "back")
					if err := os.WriteFile(back, blank, 0o600); err != nil {
						t.Fatal(err)
					}
					options += ",backing_fmt=raw,backing_file=" + back
				}
				var err error
				if blank, err = os.ReadFile(qemu.Create(t, "qcow2", options, fmt.Sprint(tt.size))); err != nil {
					t.Fatal(err)
				}
			}
			log := &storagetest.Log{Yield: true}
			store := log.NewStore(blank, storage.Info{NewReadsZero: true, Discard: true})
			open := func(s storage.Store, readOnly bool) (image.Device, error) {
				opt := image.Options{ReadOnly: readOnly, Refs: backing{int(tt.size)}, Unmap: true}
				if tt.options == "" {
					return raw.Format().Open(t.Context(), s, opt)
				}
				return qcow2.Format().Open(t.Context(), s, opt)
			}
			dev, err := open(store, false)
			if err != nil {
				t.Fatal(err)
			}
			dial := serve(t, dev)
			h := New(tt.size, tt.first, func() int { return log.Note(nil) })
			clients := Clients{History: h, Dial: dial, Conns: 4, Depth: 3, Requests: requests, Unit: tt.unit, Seed: 1, Patience: time.Minute}
			if err := clients.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := h.Check(); err != nil {
				t.Fatal(err)
			}

			// Power cuts, at points of the record.
			events := log.Events()
			disk := log.NewDisk(rand.New(rand.NewPCG(1, 2)))
			after := make([]byte, tt.size)
			for i, e := range events {
				disk.Step(e)
				if i%max(len(events)/points, 1) > 0 {
					continue
				}
				left, err := open(storagetest.MemOf(disk.Crash()[0]), true)
				if err != nil {
					t.Fatalf("after a power cut at %d: %v", i+1, err)
				}
				if _, err := left.ReadAt(after, 0); err != nil {
					t.Fatalf("after a power cut at %d: %v", i+1, err)
				}
				if err := h.CheckCrash(after, i+1); err != nil {
					t.Fatal(err)
				}
				left.Close()
			}
			if err := dev.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// serve exports a device on a Unix socket, and by every other connection on TCP.
func serve(t *testing.T, dev image.Device) func(context.Context) (net.Conn, error) {
	t.Helper()
	e := &export.Export{Device: dev, MultiConn: true}
	s := &export.Server{Open: func(context.Context, *export.Client, string) (*export.Export, error) { return e, nil }}
	addresses := make(chan net.Addr, 2)
	ended := make(chan error, 2)
	for _, a := range [][2]string{{"unix", filepath.Join(t.TempDir(), "s")}, {"tcp", "127.0.0.1:0"}} {
		l, err := net.Listen(a[0], a[1])
		if err != nil {
			t.Fatal(err)
		}
		addresses <- l.Addr()
		go func() { ended <- s.Serve(l) }()
	}
	t.Cleanup(func() {
		_ = s.Shutdown(context.Background())
		<-ended
		<-ended
	})
	return func(ctx context.Context) (net.Conn, error) {
		a := <-addresses
		addresses <- a
		return new(net.Dialer).DialContext(ctx, a.Network(), a.String())
	}
}

// The checker is worth as much as what it finds.
func TestCheck(t *testing.T) {
	type step func(h *History)
	var ids [9]int
	begin := func(k int) step { return func(h *History) { ids[k], _ = h.Write(0, 1, false) } }
	zero := func(k int) step { return func(h *History) { ids[k] = h.Zero(0, 1, false, false) } }
	end := func(k int) step { return func(h *History) { h.End(ids[k], true) } }
	fail := func(k int) step { return func(h *History) { h.End(ids[k], false) } }
	read := func(v byte) step {
		return func(h *History) { _ = h.Read([]byte{v}, 0, func() error { return nil }) }
	}
	for _, tt := range []struct {
		name  string
		steps []step
		ok    bool
	}{
		{"what was there", []step{read(Initial), begin(1), end(1), read(1)}, true},
		{"old", []step{begin(1), end(1), read(Initial)}, false},
		{"foreign", []step{begin(1), end(1), read(7)}, false},
		{"from the future", []step{read(1), begin(1), end(1)}, false},
		{"either of two", []step{begin(1), begin(2), end(1), end(2), read(1)}, true},
		{"one, then the other", []step{begin(1), begin(2), end(1), end(2), read(1), read(2)}, false},
		{"back again", []step{begin(1), begin(2), read(1), read(2), read(1), end(1), end(2)}, false},
		{"new, then old", []step{begin(1), read(1), read(Initial), end(1)}, false},
		{"not yet, then done", []step{begin(1), read(Initial), read(1), end(1)}, true},
		{"zeros", []step{begin(1), end(1), zero(2), end(2), read(0)}, true},
		{"no zeros", []step{begin(1), end(1), read(0)}, false},
		{"zeroed, and still there", []step{begin(1), end(1), zero(2), end(2), read(1)}, false},
		{"zeroed between", []step{begin(1), end(1), read(1), zero(2), end(2), read(1)}, false},
		{"failed, not there", []step{begin(1), fail(1), read(Initial)}, true},
		{"failed, there", []step{begin(1), fail(1), read(1)}, true},
		{"failed, there, gone", []step{begin(1), fail(1), read(1), read(Initial)}, false},
	} {
		now := 0
		h := New(1, Initial, func() int { now++; return now })
		for _, s := range tt.steps {
			s(h)
		}
		if err := h.Check(); (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	now := 0
	h := New(1, Initial, func() int { now++; return now })
	id, _ := h.Write(0, 1, false)
	h.End(id, true)
	before := now + 1
	_ = h.Flush(func() error { return nil })
	for value, ok := range map[byte][2]bool{Initial: {true, false}, 1: {true, true}, 2: {false, false}} {
		for i, at := range []int{before, now + 1} {
			if err := h.CheckCrash([]byte{value}, at); (err == nil) != ok[i] {
				t.Errorf("%d after a power cut at %d: %v", value, at, err)
			}
		}
	}
}
