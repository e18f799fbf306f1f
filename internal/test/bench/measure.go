//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	xunix "golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/load"
)

// After so many repeats only the peers that may still be the best go on: those
// whose rate is at least near of the best one's.
const (
	heats = 2
	near  = 0.8
)

// measure runs a workload against all servers that can serve it.
func measure(ctx context.Context, o options, w workload, servers []server, img *images) (finding, error) {
	samples := make([][]sample, len(servers))
	order := make([]int, 0, len(servers))
	for i, s := range servers {
		if s.can(w) {
			order = append(order, i)
		}
	}
	for repeat := range o.repeats {
		if repeat == heats {
			best := 0.0
			for _, i := range order {
				if !servers[i].ours {
					best = max(best, median(samples[i], rateOf))
				}
			}
			order = slices.DeleteFunc(order, func(i int) bool {
				return !servers[i].ours && median(samples[i], rateOf) < near*best
			})
		}
		for _, i := range order {
			s, err := once(ctx, o, w, servers[i], img)
			if err != nil {
				return finding{}, fmt.Errorf("%s: %w", servers[i].name, err)
			}
			samples[i] = append(samples[i], s)
		}
		slices.Reverse(order)
	}
	var rows []row
	for i, s := range servers {
		if len(samples[i]) > 0 {
			rows = append(rows, newRow(s, samples[i]))
		}
	}
	return newFinding(w, rows), nil
}

// once measures one server once.
func once(ctx context.Context, o options, w workload, s server, img *images) (sample, error) {
	file, err := img.get(w)
	if err != nil {
		return sample{}, err
	}
	if w.kind.fresh {
		defer os.Remove(file)
	}
	if w.cold() {
		if err := dropCache(file); err != nil {
			return sample{}, err
		}
	} else if w.far() {
		if err := warm(file); err != nil {
			return sample{}, err
		}
	}
	began := time.Now()
	p, err := launch(s, img.disk, w, file)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	if w.opening {
		if err := p.await(ctx, firstByte); err != nil {
			return sample{}, err
		}
		took := time.Since(began)
		return sample{result(1, int64(firstBlock), took), p.cpu().Seconds(), p.memory()}, nil
	}
	if err := p.await(ctx, greeting); err != nil {
		return sample{}, err
	}
	if w.copyTo != "" {
		return p.nbdcopy(ctx, w, img)
	}
	return p.load(ctx, w, o.duration)
}

// warmUp is how long a server is loaded before it is measured.
const warmUp = 50 * time.Millisecond

// load measures what a server does for the cheap client.
func (p *process) load(ctx context.Context, w workload, d time.Duration) (sample, error) {
	c := w.Config
	c.URI, c.Seed, c.Duration = p.uri, 1, warmUp
	if !w.kind.fresh && !w.cold() {
		c.Idle = 0
		if _, err := load.Run(ctx, c); err != nil {
			return sample{}, err
		}
	}
	c.Idle, c.Seed, c.Duration = w.Idle, 2, d
	before := p.cpu()
	r, err := load.Run(ctx, c)
	if err != nil {
		return sample{}, err
	}
	found := sample{*r, (p.cpu() - before).Seconds(), 0}
	if w.weighed {
		// Once more, since looking disturbs.
		c.Duration = lookAfter * 4
		looked := make(chan float64, 1)
		go func() {
			time.Sleep(lookAfter)
			looked <- p.memory()
		}()
		_, err = load.Run(ctx, c)
		found.Memory = <-looked
	}
	return found, err
}

// lookAfter is how long clients have been at work when memory is looked at.
const lookAfter = 150 * time.Millisecond

// nbdcopy measures a copy of the whole image.
func (p *process) nbdcopy(ctx context.Context, w workload, img *images) (sample, error) {
	size, to := img.sizeOf(w.kind), w.copyTo
	if to == toFile {
		to = filepath.Join(img.memory, "copy")
		defer os.Remove(to)
	}
	before, began := p.cpu(), time.Now()
	if out, err := exec.CommandContext(ctx, "nbdcopy", p.uri, to).CombinedOutput(); err != nil {
		return sample{}, fmt.Errorf("nbdcopy: %w\n%s", err, out)
	}
	took := time.Since(began)
	return sample{result(1, size, took), (p.cpu() - before).Seconds(), 0}, nil
}

// result is that of ops operations which took so long together.
func result(ops, bytes int64, took time.Duration) load.Result {
	us := float64(took.Nanoseconds()) / 1000 / float64(ops)
	return load.Result{
		Ops: ops, Bytes: bytes, Seconds: took.Seconds(),
		Rate: float64(ops) / took.Seconds(), MiB: float64(bytes) / took.Seconds() / m,
		P50: us, P99: us, Max: us,
	}
}

// firstBlock is what a client asks of a server that has just started, in bytes.
const firstBlock = 4 * k

// greeting is a client that goes through a handshake.
func greeting(ctx context.Context, network, address string) error {
	return visit(ctx, network, address, 0)
}

// firstByte is a client that wants data, too.
func firstByte(ctx context.Context, network, address string) error {
	return visit(ctx, network, address, firstBlock)
}

func visit(ctx context.Context, network, address string, n int) error {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	opt := nbd.Options{Export: "disk", Protocol: nbd.Simple}
	session, err := nbd.Handshake(ctx, conn, opt)
	if err != nil || n == 0 {
		return err
	}
	c := nbd.NewClient(conn, session, opt)
	defer c.Close()
	return c.Read(make([]byte, n), 0, 0)
}

// dropCache makes the page cache forget a file.
func dropCache(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil { // what is dirty stays
		return err
	}
	return xunix.Fadvise(int(f.Fd()), 0, 0, xunix.FADV_DONTNEED)
}
