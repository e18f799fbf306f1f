//go:build linux

package load

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// nbdkit serves 64 MiB of memory and returns the URI.
func nbdkit(t *testing.T, options ...string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	args := append([]string{"-f", "-U", socket}, options...)
	qemu.Start(t, qemu.Require(t, "nbdkit"), append(args, "memory", "64M")...)
	return await(t, "unix", socket, "nbd+unix:///?socket="+socket)
}

func await(t *testing.T, network, address, uri string) string {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
			return uri
		} else if time.Now().After(end) {
			t.Fatalf("the server does not listen: %v", err)
		}
	}
}

func TestRun(t *testing.T) {
	unix := nbdkit(t)
	for name, c := range map[string]Config{
		"random 4k reads":    {Conns: 1, Depth: 32, Block: 4096, Reads: 1, Random: true},
		"1M reads":           {Conns: 2, Depth: 4, Block: 1 << 20, Reads: 1},
		"one at a time":      {Conns: 1, Depth: 1, Block: 512, Reads: 1},
		"4k writes":          {Conns: 2, Depth: 16, Block: 4096, Writes: 1},
		"1M reads, writes":   {Conns: 2, Depth: 16, Block: 1 << 20, Reads: 1, Writes: 1, Random: true},
		"writes and flushes": {Conns: 1, Depth: 32, Block: 4096, Writes: 8, Flushes: 1},
		"odd blocks":         {Conns: 3, Depth: 7, Block: 12345, Reads: 7, Writes: 3, Random: true},
		"holes":              {Conns: 1, Depth: 4, Block: 65536, Reads: 1, Structured: true},
		"structured":         {Conns: 1, Depth: 4, Block: 65536, Reads: 1, Writes: 1, Structured: true},
		"idle ones":          {Conns: 2, Idle: 50, Depth: 1, Block: 4096, Reads: 1, Random: true},
		"100 connections":    {Conns: 100, Depth: 1, Block: 4096, Reads: 1, Random: true},
	} {
		t.Run(name, func(t *testing.T) {
			c.URI, c.Duration = unix, 100*time.Millisecond
			r, err := Run(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			if r.Ops != r.Reads+r.Writes+r.Flushes || r.Bytes != (r.Reads+r.Writes)*int64(c.Block) {
				t.Errorf("%+v does not add up", r)
			}
			for kind, n := range map[string][2]int64{"reads": {int64(c.Reads), r.Reads}, "writes": {int64(c.Writes), r.Writes}, "flushes": {int64(c.Flushes), r.Flushes}} {
				if (n[0] > 0) != (n[1] > 0) && r.Ops > 100 {
					t.Errorf("%d %s, a share of %d", n[1], kind, n[0])
				}
			}
			if !(0 < r.P50 && r.P50 <= r.P99 && r.P99 <= r.Max && r.Max < 1e6*r.Seconds) {
				t.Errorf("latencies %v, %v, %v in %v s", r.P50, r.P99, r.Max, r.Seconds)
			}
		})
	}
}

// A server that fails a request now and then must not look fast.
func TestErrorsCount(t *testing.T) {
	c := Config{Conns: 1, Depth: 4, Block: 4096, Reads: 1, Writes: 1, Duration: time.Minute}
	c.URI = nbdkitError(t)
	if r, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("%+v, %v; want the server's error", r, err)
	}
}

func nbdkitError(t *testing.T) string {
	socket := filepath.Join(t.TempDir(), "s")
	qemu.Start(t, qemu.Require(t, "nbdkit"), "-f", "-U", socket, "--filter=error", "memory", "64M", "error=ENOSPC", "error-pwrite-rate=1%")
	return await(t, "unix", socket, "nbd+unix:///?socket="+socket)
}

// A server that falls silent or goes away ends the run with an error.
func TestSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answered := make(chan struct{})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			// An oldstyle greeting: 1 MiB, no flags. Then nothing more.
			fmt.Fprintf(conn, "NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53%s\x00\x00\x00\x01%s", "\x00\x00\x00\x00\x00\x10\x00\x00", strings.Repeat("\x00", 124))
			close(answered)
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-answered
		time.Sleep(20 * time.Millisecond)
		cancel()
	}()
	r, err := Run(ctx, Config{URI: "nbd://" + l.Addr().String(), Conns: 1, Depth: 1, Block: 512, Reads: 1, Duration: time.Minute})
	if err == nil {
		t.Errorf("%+v of a server that answers nothing", r)
	}
}

func TestRefused(t *testing.T) {
	good := Config{URI: nbdkit(t, "-r"), Conns: 1, Depth: 1, Block: 512, Reads: 1, Duration: time.Millisecond}
	for why, change := range map[string]func(*Config){
		"0 connections":   func(c *Config) { c.Conns = 0 },
		"-1 idle":         func(c *Config) { c.Idle = -1 },
		"depth 1025":      func(c *Config) { c.Depth = 1025 },
		"block of 0":      func(c *Config) { c.Block = 0 },
		"no shares":       func(c *Config) { c.Reads = 0 },
		"scheme":          func(c *Config) { c.URI = "disk.img" },
		"smaller than 65": func(c *Config) { c.Block, c.Conns = 1<<20, 65 },
		"read-only":       func(c *Config) { c.Writes = 1 },
	} {
		c := good
		change(&c)
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v; want it to speak of %q", err, why)
		}
	}
}

// What makes the client cheap: no allocation for a request.
func TestNoAllocation(t *testing.T) {
	c := Config{URI: nbdkit(t), Conns: 1, Depth: 32, Block: 4096, Reads: 7, Writes: 3, Random: true, Duration: 200 * time.Millisecond}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := int64(after.Mallocs - before.Mallocs); r.Ops > 2000 && n > r.Ops/2 {
		t.Errorf("%d allocations for %d requests", n, r.Ops)
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	for i := range 100000 {
		h.add(time.Duration(i))
	}
	for q, want := range map[float64]float64{0: 0, 0.0001: 10, 0.5: 50000, 0.99: 99000, 1: 99999} {
		if got := float64(h.quantile(q)); got < want || got > want*1.04+1 {
			t.Errorf("quantile %v is %v, want about %v", q, got, want)
		}
	}
	h.add(1<<63 - 1)
	h.add(-1)
	if h.quantile(1) != 1<<63-1 {
		t.Errorf("the longest is %v", h.quantile(1))
	}
}
