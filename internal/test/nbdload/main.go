//go:build linux

// nbdload loads an NBD server and prints what it saw as JSON. An error of any
// request is an error of the whole.
//
//	nbdload -depth 32 -block 4k -random nbd+unix:///?socket=/tmp/s
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/load"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "nbdload: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	c := load.Config{Block: 4096}
	f := flag.NewFlagSet("nbdload", flag.ExitOnError)
	f.Usage = func() {
		fmt.Fprintln(f.Output(), "usage: nbdload [flags] URI")
		f.PrintDefaults()
	}
	f.IntVar(&c.Conns, "conns", 1, "connections")
	f.IntVar(&c.Depth, "depth", 1, "requests in flight on each connection")
	f.Func("block", "bytes of a request, with suffix k or M (default 4k)", func(s string) (err error) {
		c.Block, err = size(s)
		return err
	})
	f.IntVar(&c.Idle, "idle", 0, "connections besides, which ask for nothing")
	f.IntVar(&c.Reads, "reads", 1, "share of reads")
	f.IntVar(&c.Writes, "writes", 0, "share of writes")
	f.IntVar(&c.Flushes, "flushes", 0, "share of flushes")
	f.BoolVar(&c.Random, "random", false, "random offsets")
	f.BoolVar(&c.Structured, "structured", false, "structured replies")
	f.Uint64Var(&c.Seed, "seed", 1, "of the random offsets")
	f.DurationVar(&c.Duration, "time", time.Second, "how long")
	f.Parse(args)
	if f.NArg() != 1 {
		f.Usage()
		os.Exit(2)
	}
	c.URI = f.Arg(0)
	r, err := load.Run(ctx, c)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func size(s string) (int, error) {
	digits, shift := strings.TrimSuffix(s, "k"), 10
	if digits == s {
		digits, shift = strings.TrimSuffix(s, "M"), 20
	}
	if digits == s {
		shift = 0
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || n<<shift > 1<<31 {
		return 0, fmt.Errorf("%q is no size", s)
	}
	return int(n << shift), nil
}
