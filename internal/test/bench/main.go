//go:build linux

// bench measures the program beside qemu-nbd, nbdkit and nbd-server, the
// system's and those of Debian 13.
//
// Machines differ, and one machine differs from minute to minute; so all
// servers serve the same images in one run, one after the other, repeatedly and
// in alternating order, and what counts is the ratio within a repeat. The CPU
// time that a server took for an operation is steadier than its rate.
//
//	go run ./internal/test/bench                          eleven workloads, under 3 minutes
//	go run ./internal/test/bench -full                    all of them, 9 times
//	go run ./internal/test/bench -base old/imgnbd         two builds of ours, too
//	go run ./internal/test/bench -imgnbd bin/imgnbd -base 'GOMAXPROCS=1 bin/imgnbd'
//
// It serves on Unix sockets and 127.0.0.1 only, ends what it has started, and
// removes the images, which lie in /dev/shm and in the folder of -disk.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	xunix "golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

type options struct {
	full     bool
	repeats  int
	duration time.Duration
	size     int64
	disk     string
	json     string
	plot     string
	markdown string
	imgnbd   string
	base     string
	match    string
	servers  string
	more     []server
}

func parse(args []string) (o options, err error) {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	f.BoolVar(&o.full, "full", false, "all workloads, not only eleven")
	f.IntVar(&o.repeats, "repeats", 0, "how often each server is measured in each workload (default 3, with -full 9); after two, only ours and the fastest peers")
	f.DurationVar(&o.duration, "time", 400*time.Millisecond, "how long each time")
	mib := f.Int64("size", 256, "MiB of each image")
	f.StringVar(&o.disk, "disk", "", "folder on a disk (default is the system's for temporary files)")
	f.StringVar(&o.json, "json", "", "file to write all figures to")
	f.StringVar(&o.plot, "plot", "", "file to draw the ratios to the best peers in, as SVG")
	f.StringVar(&o.markdown, "markdown", "", "file to write the table to that docs/performance.md has")
	f.StringVar(&o.imgnbd, "imgnbd", "", "the program (default is built from ./cmd/imgnbd); none: peers only")
	f.StringVar(&o.base, "base", "", "another build of it to compare with, or [NAME=VALUE...] PATH: with another environment")
	f.StringVar(&o.match, "run", "", "only workloads that match this regular expression, of all")
	f.StringVar(&o.servers, "servers", "", "only servers that match this regular expression")
	f.Func("server", "another server, NAME=COMMAND, split at blanks, with {socket}, {format} and {image}; may be repeated", func(v string) error {
		name, command, ok := strings.Cut(v, "=")
		if !ok || !strings.Contains(command, "{socket}") || !strings.Contains(command, "{image}") {
			return fmt.Errorf("%q is not NAME=COMMAND with {socket} and {image}", v)
		}
		s := server{name: name, unix: strings.Fields(command), formats: []string{"raw"}}
		if strings.Contains(command, "{format}") {
			s.formats = both
		}
		o.more = append(o.more, s)
		return nil
	})
	f.Parse(args)
	if f.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	if o.repeats == 0 {
		o.repeats = 3
		if o.full {
			o.repeats = 9
		}
	}
	if o.repeats < 1 || *mib < 64 {
		return o, fmt.Errorf("%d repeats of %d MiB: too little", o.repeats, *mib)
	}
	o.size = *mib << 20
	return o, nil
}

func run(ctx context.Context, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	// What a daemon leaves behind becomes our child, so that we can end it.
	if err := xunix.Prctl(xunix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl: %w", err)
	}
	img, err := newImages(o.size, o.disk)
	if err != nil {
		return err
	}
	defer img.remove()
	servers, err := choose(ctx, o, img.disk)
	if err != nil {
		return err
	}
	match, err := regexp.Compile(o.match)
	if err != nil {
		return err
	}
	var findings []finding
	var failed error // the rest is measured all the same
	for _, w := range workloads {
		if !match.MatchString(w.name) || !w.quick && !o.full && o.match == "" {
			continue
		}
		if w.far() && !canBeFar() {
			fmt.Fprintf(os.Stderr, "bench: not measured, for want of root or /dev/fuse: %s\n", w.name)
			continue
		}
		f, err := measure(ctx, o, w, servers, img)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", w.name, err))
			continue
		}
		f.print(os.Stdout)
		findings = append(findings, f)
	}
	summary(os.Stdout, findings)
	if o.json != "" {
		b, err := json.MarshalIndent(findings, "", "  ")
		if err == nil {
			err = os.WriteFile(o.json, append(b, '\n'), 0o644)
		}
		failed = errors.Join(failed, err)
	}
	if o.markdown != "" {
		failed = errors.Join(failed, os.WriteFile(o.markdown, []byte(markdown(findings)), 0o644))
	}
	if o.plot != "" {
		failed = errors.Join(failed, os.WriteFile(o.plot, []byte(plot(findings)), 0o644))
	}
	return failed
}

// choose lists the servers to measure: ours, and the peers that are installed.
func choose(ctx context.Context, o options, dir string) ([]server, error) {
	match, err := regexp.Compile(o.servers)
	if err != nil {
		return nil, err
	}
	var servers []server
	if o.imgnbd == "" {
		o.imgnbd = filepath.Join(dir, "imgnbd")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", o.imgnbd, "./cmd/imgnbd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go build: %w\n%s", err, out)
		}
	}
	if o.imgnbd != "none" {
		servers = append(servers, imgnbd("imgnbd", o.imgnbd))
	}
	if o.base != "" {
		servers = append(servers, imgnbd("base", o.base))
	}
	servers = append(servers, o.more...)
	found, missing := installed()
	if len(missing) > 0 {
		fmt.Fprintf(os.Stderr, "bench: not installed, and not measured: %s\n", strings.Join(missing, ", "))
	}
	servers = append(servers, found...)
	servers = slices.DeleteFunc(servers, func(s server) bool { return !match.MatchString(s.name) })
	if len(servers) == 0 {
		return nil, fmt.Errorf("no server matches %q", o.servers)
	}
	return servers, nil
}
