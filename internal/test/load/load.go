//go:build linux

// Package load drives an NBD server for a while and measures it.
//
// It has to be much cheaper than the server that it judges, since the two
// share the machine: one thread for each connection, all requests that became
// possible sent by one call, replies received up to 1 MiB at once, and neither
// a goroutine nor an allocation for a request. It does not look at the data;
// whether the bytes are right is for other tests to say.
package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A Config says what to do.
type Config struct {
	URI      string        // nbd:// or nbd+unix://
	Conns    int           // connections, at least 1
	Idle     int           // connections besides, which ask for nothing
	Depth    int           // requests in flight on each, 1 to 1024
	Block    int           // bytes of a request, at most 32 MiB
	Duration time.Duration // no request begins after it

	// The shares of the kinds of requests, in any unit.
	Reads, Writes, Flushes int

	Random     bool // else each connection goes through its part of the export in order
	Structured bool // ask for structured replies, which tell holes from data
	Seed       uint64
}

// A Result is what was seen. Latencies are from the call that sent a request
// to the one that received the end of its reply.
type Result struct {
	Ops     int64   `json:"ops"`
	Reads   int64   `json:"reads"`
	Writes  int64   `json:"writes"`
	Flushes int64   `json:"flushes"`
	Bytes   int64   `json:"bytes"` // read and written
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"ops_per_s"`
	MiB     float64 `json:"mib_per_s"`
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
	Max     float64 `json:"max_us"`
	CPU     float64 `json:"client_cpu_us_per_op"`
}

func (c *Config) check() error {
	switch {
	case c.Conns < 1 || c.Idle < 0 || c.Conns+c.Idle > 10000:
		return fmt.Errorf("%d connections and %d idle ones", c.Conns, c.Idle)
	case c.Depth < 1 || c.Depth > maxDepth:
		return fmt.Errorf("depth %d: not 1 to %d", c.Depth, maxDepth)
	case c.Block < 1 || c.Block > nbd.MaxPayload:
		return fmt.Errorf("block of %d bytes: not 1 to %d", c.Block, nbd.MaxPayload)
	case c.Reads < 0 || c.Writes < 0 || c.Flushes < 0 || c.Reads+c.Writes+c.Flushes == 0:
		return fmt.Errorf("%d reads, %d writes, %d flushes: no shares", c.Reads, c.Writes, c.Flushes)
	}
	return nil
}

// patience bounds the wait for the last replies.
const patience = 5 * time.Minute

// Run connects, loads the server for c.Duration and waits for the last
// replies. An error of any request is an error of the whole.
//
// While it runs the garbage collector is off and the process has a P for each
// connection, whose thread waits in the kernel; so only one Run at a time.
func Run(ctx context.Context, c Config) (*Result, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	uri, err := nbd.ParseURI(c.URI)
	if err != nil {
		return nil, err
	}
	var workers []*worker
	defer func() {
		for _, w := range workers {
			syscall.Close(w.fd)
		}
	}()
	for i := range c.Idle {
		conn, _, err := open(ctx, uri, c)
		if err != nil {
			return nil, fmt.Errorf("idle connection %d: %w", i, err)
		}
		defer conn.Close()
	}
	for i := range c.Conns {
		w, err := connect(ctx, uri, c, i)
		if err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
		workers = append(workers, w)
	}

	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(c.Conns + 2))
	ctx, cancel := context.WithTimeoutCause(ctx, c.Duration+patience, errors.New("replies are missing"))
	defer cancel()
	// A worker that waits in the kernel is ended by ending its connection.
	stop := context.AfterFunc(ctx, func() {
		for _, w := range workers {
			syscall.Shutdown(w.fd, syscall.SHUT_RDWR)
		}
	})
	start := time.Now()
	var group sync.WaitGroup
	for _, w := range workers {
		group.Go(func() { w.err = w.run(start, c.Duration) })
	}
	group.Wait()
	elapsed := time.Since(start)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	return sum(workers, elapsed)
}

func sum(workers []*worker, elapsed time.Duration) (*Result, error) {
	var r Result
	var all histogram
	var cpu time.Duration
	for i, w := range workers {
		if w.err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, w.err)
		}
		r.Reads += w.ops[nbd.CmdRead]
		r.Writes += w.ops[nbd.CmdWrite]
		r.Flushes += w.ops[nbd.CmdFlush]
		r.Bytes += w.bytes
		cpu += w.cpu
		all.merge(&w.latency)
	}
	r.Ops = r.Reads + r.Writes + r.Flushes
	if r.Ops == 0 {
		return nil, errors.New("no request was answered")
	}
	r.Seconds = elapsed.Seconds()
	r.Rate = float64(r.Ops) / r.Seconds
	r.MiB = float64(r.Bytes) / r.Seconds / (1 << 20)
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
	r.P50, r.P99, r.Max = us(all.quantile(0.50)), us(all.quantile(0.99)), us(all.max)
	r.CPU = us(cpu) / float64(r.Ops)
	return &r, nil
}

// open makes a connection on which requests can be sent.
func open(ctx context.Context, uri *nbd.URI, c Config) (net.Conn, *nbd.Session, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, uri.Network, uri.Address)
	if err != nil {
		return nil, nil, err
	}
	opt := nbd.Options{Export: uri.Export, Protocol: nbd.Simple}
	if c.Structured {
		opt.Protocol = nbd.Structured
	}
	session, err := nbd.Handshake(ctx, conn, opt)
	if err == nil && c.Structured && session.Protocol != nbd.Structured {
		err = errors.New("no structured replies")
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, session, nil
}

// connect makes a connection for a worker, in blocking mode.
func connect(ctx context.Context, uri *nbd.URI, c Config, i int) (*worker, error) {
	conn, session, err := open(ctx, uri, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	file, ok := conn.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("connection of type %T", conn)
	}
	f, err := file.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	if err := syscall.SetNonblock(fd, false); err != nil {
		syscall.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	w, err := newWorker(fd, session, c, i)
	if err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return w, nil
}
