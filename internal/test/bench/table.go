//go:build linux

package main

import (
	"slices"

	"github.com/imgnbd/imgnbd/internal/test/load"
)

// A server is a row of what is compared: how to start it, with {socket} or
// {port} of 127.0.0.1, {format} and {image} put in. It serves the image
// writable, to any number of clients, as the export "disk".
type server struct {
	name    string
	unix    []string
	tcp     []string                      // nil if it cannot
	formats []string                      // that it serves
	simple  bool                          // has no structured replies
	daemon  bool                          // leaves itself behind, with its process id in {pid}
	config  func(transport string) string // of a file, which is {config}
	ours    bool                          // not a peer
}

var both = []string{"raw", "qcow2"}

func imgnbd(name, path string) server {
	return server{
		name: name, ours: true, formats: both,
		unix: []string{path, "-k", "{socket}", "-t", "-e", "0", "-x", "disk", "-f", "{format}", "{image}"},
		tcp:  []string{path, "-b", "127.0.0.1", "-p", "{port}", "-t", "-e", "0", "-x", "disk", "-f", "{format}", "{image}"},
	}
}

func qemuNBD(name, aio string) server {
	return server{
		name: name, formats: both,
		unix: []string{"qemu-nbd", "-k", "{socket}", "-t", "-e", "0", "-x", "disk", "--aio=" + aio, "-f", "{format}", "{image}"},
		tcp:  []string{"qemu-nbd", "-b", "127.0.0.1", "-p", "{port}", "-t", "-e", "0", "-x", "disk", "--aio=" + aio, "-f", "{format}", "{image}"},
	}
}

var peers = []server{
	qemuNBD("qemu-nbd threads", "threads"),
	qemuNBD("qemu-nbd io_uring", "io_uring"),
	{
		name: "nbdkit", formats: []string{"raw"},
		unix: []string{"nbdkit", "-f", "-U", "{socket}", "file", "{image}"},
		tcp:  []string{"nbdkit", "-f", "-i", "127.0.0.1", "-p", "{port}", "file", "{image}"},
	},
	{
		name: "nbd-server", formats: []string{"raw"}, simple: true, daemon: true,
		unix:   []string{"nbd-server", "-C", "{config}", "-p", "{pid}"},
		tcp:    []string{"nbd-server", "-C", "{config}", "-p", "{pid}"},
		config: nbdServer,
	},
}

// nbdServer is a configuration. With a Unix socket there is no TCP port.
func nbdServer(transport string) string {
	listen := "unixsock = {socket}\n"
	if transport == tcp {
		listen = "listenaddr = 127.0.0.1\nport = {port}\n"
	}
	return "[generic]\n" + listen + "[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
}

// A kind is a kind of image.
type kind struct {
	name   string
	format string
	// fresh images are made anew before each measurement and hold nothing: it
	// is first writes that are measured.
	fresh   bool
	size    int64    // of the disk of a fresh one, if that is not the size of all
	convert []string // arguments of qemu-img convert that make it from source
	create  []string // or of qemu-img create, for a fresh one
	chain   int      // or how many images hold its clusters between them, at random
}

var (
	source  = kind{name: "source", format: "raw"} // which nobody writes to
	raw     = kind{name: "raw", format: "raw", convert: []string{"-S", "0", "-O", "raw"}}
	newRaw  = kind{name: "new raw", format: "raw", fresh: true, create: []string{"-f", "raw"}}
	qcow2   = kind{name: "qcow2", format: "qcow2", convert: []string{"-O", "qcow2"}}
	qcow2z  = kind{name: "qcow2 zlib", format: "qcow2", convert: []string{"-c", "-O", "qcow2", "-o", "compression_type=zlib"}}
	qcow2zs = kind{name: "qcow2 zstd", format: "qcow2", convert: []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}}

	// So large that the first writes do not run out.
	newQcow2 = kind{name: "new qcow2", format: "qcow2", fresh: true, size: 64 << 30, create: []string{"-f", "qcow2"}}
	chain4   = kind{name: "chain of 4", format: "qcow2", chain: 4}
	chain16  = kind{name: "chain of 16", format: "qcow2", chain: 16}
)

// Where images lie, and how clients come.
const (
	memory, disk = false, true
	unix, tcp    = "unix", "tcp"
)

// A workload is a row of what is measured.
type workload struct {
	name      string
	quick     bool
	kind      kind
	onDisk    bool
	transport string
	load      load.Config
}

const (
	k = 1 << 10
	m = 1 << 20
)

func reads(conns, depth, block int) load.Config {
	return load.Config{Conns: conns, Depth: depth, Block: block, Reads: 1}
}

func writes(conns, depth, block int) load.Config {
	return load.Config{Conns: conns, Depth: depth, Block: block, Writes: 1}
}

func mix(conns, depth, block, reads, writes, flushes int) load.Config {
	return load.Config{Conns: conns, Depth: depth, Block: block, Reads: reads, Writes: writes, Flushes: flushes}
}

func random(c load.Config) load.Config     { c.Random = true; return c }
func structured(c load.Config) load.Config { c.Structured = true; return c }

// can reports whether s takes part in w.
func (s server) can(w workload) bool {
	return slices.Contains(s.formats, w.kind.format) && (w.transport == unix || s.tcp != nil) && (!w.load.Structured || !s.simple)
}

var workloads = []workload{
	{"raw read 1M qd16", true, raw, memory, unix, reads(1, 16, m)},
	{"raw write 1M qd16", true, raw, memory, unix, writes(1, 16, m)},
	{"raw rand read 4k qd1", true, raw, memory, unix, random(reads(1, 1, 4*k))},
	{"raw rand read 4k qd32", true, raw, memory, unix, random(reads(1, 32, 4*k))},
	{"raw rand write 4k qd32", true, raw, memory, unix, random(writes(1, 32, 4*k))},
	{"raw rand 70/30 4k qd32", true, raw, memory, unix, random(mix(1, 32, 4*k, 7, 3, 0))},
	{"raw 8 writes:1 flush 4k qd32, disk", true, raw, disk, unix, random(mix(1, 32, 4*k, 0, 8, 1))},
	{"raw read 1M qd16, tcp", true, raw, memory, tcp, reads(1, 16, m)},

	{"raw read 64k qd16", false, raw, memory, unix, reads(1, 16, 64*k)},
	{"raw read 1M qd16, structured", false, raw, memory, unix, structured(reads(1, 16, m))},
	{"raw rand read 4k qd32 x4", false, raw, memory, unix, random(reads(4, 32, 4*k))},
	{"raw rand read 4k qd1 x100", false, raw, memory, unix, random(reads(100, 1, 4*k))},
	{"raw write 1M qd16, disk", false, raw, disk, unix, writes(1, 16, m)},
	{"raw write, flush 4k qd1, disk", false, raw, disk, unix, random(mix(1, 1, 4*k, 0, 1, 1))},
	{"raw rand read 4k qd1, tcp", false, raw, memory, tcp, random(reads(1, 1, 4*k))},
	{"raw rand read 4k qd32, tcp", false, raw, memory, tcp, random(reads(1, 32, 4*k))},
	{"raw read 64k qd16, tcp", false, raw, memory, tcp, reads(1, 16, 64*k)},
	{"raw write 1M qd16, tcp", false, raw, memory, tcp, writes(1, 16, m)},
	{"new raw write 64k qd16", false, newRaw, memory, unix, writes(1, 16, 64*k)},
	{"new raw read 1M qd16, structured", false, newRaw, memory, unix, structured(reads(1, 16, m))},

	{"qcow2 first rand write 4k qd32", true, newQcow2, memory, unix, random(writes(1, 32, 4*k))},
	{"qcow2 first write 1M qd16", true, newQcow2, memory, unix, writes(1, 16, m)},
	{"qcow2 rand write 4k qd32", true, qcow2, memory, unix, random(writes(1, 32, 4*k))},

	{"qcow2 first write 4k qd32", false, newQcow2, memory, unix, writes(1, 32, 4*k)},
	{"qcow2 first write 64k qd16", false, newQcow2, memory, unix, writes(1, 16, 64*k)},
	{"qcow2 first rand write 64k qd16", false, newQcow2, memory, unix, random(writes(1, 16, 64*k))},
	{"qcow2 8 first writes:1 flush 4k qd32, disk", false, newQcow2, disk, unix, random(mix(1, 32, 4*k, 0, 8, 1))},
	{"qcow2 write 1M qd16", false, qcow2, memory, unix, writes(1, 16, m)},
	{"qcow2 read 1M qd16", false, qcow2, memory, unix, reads(1, 16, m)},
	{"qcow2 rand read 4k qd1", false, qcow2, memory, unix, random(reads(1, 1, 4*k))},
	{"qcow2 rand read 4k qd32", false, qcow2, memory, unix, random(reads(1, 32, 4*k))},
	{"qcow2 read 1M qd16, tcp", false, qcow2, memory, tcp, reads(1, 16, m)},
	{"new qcow2 read 1M qd16", false, newQcow2, memory, unix, reads(1, 16, m)},
	{"new qcow2 read 1M qd16, structured", false, newQcow2, memory, unix, structured(reads(1, 16, m))},
	{"qcow2 chain of 4 read 1M qd16", false, chain4, memory, unix, reads(1, 16, m)},
	{"qcow2 chain of 4 rand read 4k qd32", false, chain4, memory, unix, random(reads(1, 32, 4*k))},
	{"qcow2 chain of 16 read 1M qd16", false, chain16, memory, unix, reads(1, 16, m)},
	{"qcow2 chain of 16 rand read 4k qd32", false, chain16, memory, unix, random(reads(1, 32, 4*k))},
	{"qcow2 zlib read 1M qd16", false, qcow2z, memory, unix, reads(1, 16, m)},
	{"qcow2 zlib rand read 4k qd32", false, qcow2z, memory, unix, random(reads(1, 32, 4*k))},
	{"qcow2 zstd read 1M qd16", false, qcow2zs, memory, unix, reads(1, 16, m)},
	{"qcow2 zstd rand read 4k qd32", false, qcow2zs, memory, unix, random(reads(1, 32, 4*k))},
}
