package history

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// Clients are several connections to one export, on each of which some
// requests are in flight.
type Clients struct {
	History *History
	Dial    func(ctx context.Context) (net.Conn, error)

	Conns, Depth int
	Requests     int   // of all; 0: until Stop is closed
	Unit         int64 // bytes; many requests begin or end at multiples
	Seed         uint64
	Patience     time.Duration // how long the server may be away
	Stop         <-chan struct{}
}

// Run carries out the requests. Connections that are lost are made again.
func (c *Clients) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	each := c.Requests / (c.Conns * c.Depth)
	for i := range c.Conns {
		conn := &connection{dial: c.Dial, patience: c.Patience}
		for k := range c.Depth {
			group.Go(func() {
				r := rand.New(rand.NewPCG(c.Seed, uint64(i*c.Depth+k)))
				for n := 0; n < each || c.Requests == 0; n++ {
					select {
					case <-c.Stop:
						return
					case <-ctx.Done():
						return
					default:
					}
					if err := c.request(ctx, conn, r); err != nil {
						cancel(fmt.Errorf("connection %d: %w", i, err))
						return
					}
				}
			})
		}
		defer conn.close()
	}
	group.Wait()
	return context.Cause(ctx)
}

// request carries out one request. That the connection is lost is no error.
func (c *Clients) request(ctx context.Context, conn *connection, r *rand.Rand) error {
	client, err := conn.get(ctx)
	if err != nil {
		return err
	}
	h, size := c.History, c.History.Size()
	off := r.Int64N(size)
	if r.IntN(2) == 0 {
		off = off / c.Unit * c.Unit
	}
	n := min(1+r.Int64N(3*c.Unit), size-off)
	if r.IntN(3) == 0 {
		n = min(c.Unit*(1+r.Int64N(3)), size-off)
	}
	fua := nbd.CmdFlagFUA * nbd.CommandFlags(r.IntN(8)/7)
	change := func(id int, err error) error {
		h.End(id, err == nil)
		return err
	}
	switch k := r.IntN(100); {
	case k < 45:
		if id, data := h.Write(off, n, fua != 0); data != nil {
			err = change(id, client.Write(data, off, fua))
		}
	case k < 55:
		flags := fua
		if k < 50 {
			flags |= nbd.CmdFlagNoHole
		}
		err = change(h.Zero(off, n, false, fua != 0), client.WriteZeroes(off, n, flags))
	case k < 62:
		err = change(h.Zero(off, n, true, fua != 0), client.Trim(off, n, fua))
	case k < 67:
		err = h.Flush(client.Flush)
	default:
		p := make([]byte, n)
		err = h.Read(p, off, func() error { return client.Read(p, off, 0) })
	}
	// Another request may have found out before this one was sent.
	if errors.Is(err, nbd.ErrConnection) || errors.Is(err, fs.ErrClosed) {
		conn.lost(client)
		return nil
	}
	return err
}

// A connection is made when it is needed.
type connection struct {
	dial     func(ctx context.Context) (net.Conn, error)
	patience time.Duration

	mu     sync.Mutex
	client *nbd.Client
}

func (c *connection) get(ctx context.Context) (*nbd.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil {
		return c.client, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.patience)
	defer cancel()
	for {
		conn, err := c.dial(ctx)
		if err == nil {
			if c.client, err = nbd.Connect(ctx, conn, nbd.Options{}); err == nil {
				return c.client, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no server: %w", err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// lost forgets a connection, unless it was made again already.
func (c *connection) lost(old *nbd.Client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client == old {
		c.client = nil
		old.Close()
	}
}

func (c *connection) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil {
		c.client.Close()
	}
}
