package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// connect is our own client, which believes a server nothing: it notices
// chunks that overlap, are missing or come after the last.
func connect(t *testing.T, s server, protocol nbd.Protocol) *nbd.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, s.network, s.address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := nbd.Connect(ctx, conn, nbd.Options{Protocol: protocol, Contexts: []string{nbd.ContextBaseAllocation}, Timeout: hang})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Many reads of all sizes at once, of every kind of image, in every form of
// reply, with block status between.
func TestReadEverything(t *testing.T) {
	want := contents()
	for name, make := range images {
		i := make(t)
		for transport := range transports {
			s := serve(t, transport, "-r", "-f", i.format, i.file)
			for protocol := nbd.Extended; protocol <= nbd.Simple; protocol++ {
				t.Run(fmt.Sprintf("%s %s %v", name, transport, protocol), func(t *testing.T) {
					c := connect(t, s, protocol)
					var group sync.WaitGroup
					for seed := range uint64(16) {
						group.Go(func() {
							if err := readRandomly(c, want, rand.New(rand.NewPCG(seed, 6))); err != nil {
								t.Error(err)
							}
						})
					}
					group.Wait()
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

func readRandomly(c *nbd.Client, want []byte, rng *rand.Rand) error {
	buf := make([]byte, 3<<20)
	for range 40 {
		off := rng.IntN(len(want))
		n := min(1+rng.IntN(1<<(1+rng.IntN(21))), len(want)-off)
		var flags nbd.CommandFlags
		if c.Session().Flags&nbd.FlagSendDF != 0 && rng.IntN(4) == 0 {
			flags = nbd.CmdFlagDF
		}
		if err := c.Read(buf[:n], int64(off), flags); err != nil {
			return err
		}
		if !bytes.Equal(buf[:n], want[off:off+n]) {
			return fmt.Errorf("read of %d at %d: other bytes than the image has", n, off)
		}
		if len(c.Session().Contexts) == 0 {
			continue
		}
		status, err := c.BlockStatus(int64(off), int64(n), 0)
		if err != nil {
			return err
		}
		for _, e := range status[0].Extents {
			run := want[off : off+int(e.Length)]
			if e.Flags&nbd.StateZero != 0 && bytes.Count(run, []byte{0}) != len(run) {
				return fmt.Errorf("data in %d bytes at %d is called zero", e.Length, off)
			}
			off += len(run)
		}
	}
	return nil
}

// Connections share what is written: a flush on one covers what another wrote,
// and a client that vanishes midway disturbs none.
func TestManyClients(t *testing.T) {
	file := create(t, filepath.Join(t.TempDir(), "disk.raw"), size)
	for transport := range transports {
		s := serve(t, transport, "-f", "raw", file)
		const clients = 8
		want := make([]byte, size)
		var group sync.WaitGroup
		for i := range clients {
			c := connect(t, s, nbd.Protocol(i%3))
			group.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 7))
				part := want[i*size/clients : (i+1)*size/clients]
				for range 100 {
					off := rng.IntN(len(part))
					p := part[off : off+1+rng.IntN(min(len(part)-off, 200000))]
					for j := range p {
						p[j] = byte(rng.Uint32())
					}
					if err := c.Write(p, int64(i*size/clients+off), 0); err != nil {
						t.Error(err)
						return
					}
				}
				if err := errors.Join(c.Flush(), c.Close()); err != nil {
					t.Error(err)
				}
			})
		}
		stop := make(chan struct{})
		var rude sync.WaitGroup
		rude.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := net.Dial(s.network, s.address)
				if err != nil {
					t.Error(err)
					return
				}
				session, err := nbd.Handshake(context.Background(), conn, nbd.Options{})
				if err != nil {
					t.Error(err)
					return
				}
				c := nbd.NewClient(conn, session, nbd.Options{})
				for range 4 {
					go c.Read(make([]byte, 1<<20), 0, 0)
				}
				time.Sleep(time.Millisecond)
				conn.Close()
			}
		})
		group.Wait()
		close(stop)
		rude.Wait()
		c := connect(t, s, nbd.Extended)
		got := make([]byte, size)
		if err := c.Read(got, 0, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes are read than were written", transport)
		}
		c.Close()
		s.stop() // killed: what was flushed is in the file
		equal(t, file, want)
	}
}

// An image that is served is not written by another, and is free afterwards.
func TestLocks(t *testing.T) {
	file := qemu.Create(t, "qcow2", "", "1M")
	s := serve(t, "unix", "-r", "-f", "qcow2", file)
	eachAge(t, func(t *testing.T, w way) {
		r := qemu.Try(t, w.tool(t, "qemu-io"), "-f", "qcow2", "-c", "write 0 64k", file)
		if out := r.Stdout + r.Stderr; r.Code == 0 {
			t.Errorf("qemu-io writes to an image that is served:\n%s", out)
		}
		qemu.Run(t, w.tool(t, "qemu-img"), "info", file) // reading is free
	})
	s.stop()
	qemu.IO(t, "qcow2", file, "write 0 64k")
}

func eachAge(t *testing.T, f func(t *testing.T, w way)) {
	for age := range ages {
		t.Run(age, func(t *testing.T) { f(t, way{age, "unix"}) })
	}
}
