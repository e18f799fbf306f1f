//go:build linux

package main

import "github.com/imgnbd/imgnbd/internal/test/load"

// A kind is a kind of image.
type kind struct {
	name   string
	format string
	// fresh images are made anew before each measurement and hold nothing: it
	// is first writes that are measured.
	fresh   bool
	size    int64    // of the disk, if that is not the size of all
	times   int64    // or so many times that
	convert []string // arguments of qemu-img convert that make it from source
	create  []string // or of qemu-img create
	chain   int      // or how many images hold its clusters between them, at random
	sparse  bool     // or a raw file with data in one MiB of each 256
}

var (
	raw        = kind{name: "raw", format: "raw", convert: []string{"-S", "0", "-O", "raw"}}
	largeRaw   = kind{name: "large raw", format: "raw", times: 4}
	sparse     = kind{name: "sparse raw", format: "raw", times: 64, sparse: true}
	newRaw     = kind{name: "new raw", format: "raw", fresh: true, create: []string{"-f", "raw"}}
	qcow2      = kind{name: "qcow2", format: "qcow2", convert: []string{"-O", "qcow2"}}
	largeQcow2 = kind{name: "large qcow2", format: "qcow2", times: 4, convert: []string{"-O", "qcow2"}}
	qcow2z     = kind{name: "qcow2 zlib", format: "qcow2", convert: []string{"-c", "-O", "qcow2", "-o", "compression_type=zlib"}}
	qcow2zs    = kind{name: "qcow2 zstd", format: "qcow2", convert: []string{"-c", "-O", "qcow2", "-o", "compression_type=zstd"}}

	// So large that the first writes do not run out.
	newQcow2 = kind{name: "new qcow2", format: "qcow2", fresh: true, size: 64 << 30, create: []string{"-f", "qcow2"}}
	chain4   = kind{name: "chain of 4", format: "qcow2", chain: 4}
	chain16  = kind{name: "chain of 16", format: "qcow2", chain: 16}

	// All tables, and holes for data: as much as the cache of tables covers,
	// and four times as much.
	tables256G = kind{name: "tables of 256 GiB", format: "qcow2", size: 256 << 30, create: []string{"-f", "qcow2", "-o", "preallocation=metadata"}}
	tables1T   = kind{name: "tables of 1 TiB", format: "qcow2", size: 1 << 40, create: []string{"-f", "qcow2", "-o", "preallocation=metadata"}}
)

// A place is where images lie.
type place int

const (
	memory  place = iota // on tmpfs
	disk                 // on a disk, in the page cache
	cold                 // on a disk, not in the page cache when it begins
	direct               // on a disk, and the page cache is bypassed
	far                  // on a file system that is farDelay away, in the page cache
	farCold              // the same, not in the page cache when it begins
)

// How clients come.
const (
	unix = "unix"
	tcp  = "tcp"
)

// A work is what is done with a server. Its zero value is load.
type work struct {
	load.Config
	copyTo  string // nbdcopy makes a copy: to null: or into a file
	opening bool   // it is started, and asked for the first block
	weighed bool   // its memory is looked at while it serves
}

// A goal is what a ratio is to be at least; 0 is none. must is what others
// were beaten by in prototypes, parity that nobody loses, and stretch what
// would be good to have.
type goal struct{ Must, Parity, Stretch float64 }

func must(ratio float64) goal          { return goal{Must: ratio} }
func parity() goal                     { return goal{Parity: 0.95} }
func (g goal) stretch(to float64) goal { g.Stretch = to; return g }

// A workload is a row of what is measured.
type workload struct {
	name      string
	quick     bool
	kind      kind
	place     place
	transport string
	work
	goal goal
}

// cold reports whether w begins with nothing in the page cache.
func (w *workload) cold() bool { return w.place == cold || w.place == farCold }

// far reports whether the image of w is far away.
func (w *workload) far() bool { return w.place == far || w.place == farCold }

// inBytes reports whether the bytes say more about w than the number of
// operations.
func (w *workload) inBytes() bool { return w.Block >= 64*k || w.copyTo != "" }

const (
	k = 1 << 10
	m = 1 << 20
)

func reads(conns, depth, block int) work {
	return work{Config: load.Config{Conns: conns, Depth: depth, Block: block, Reads: 1}}
}

func writes(conns, depth, block int) work {
	return work{Config: load.Config{Conns: conns, Depth: depth, Block: block, Writes: 1}}
}

func mix(conns, depth, block, reads, writes, flushes int) work {
	return work{Config: load.Config{Conns: conns, Depth: depth, Block: block, Reads: reads, Writes: writes, Flushes: flushes}}
}

func random(w work) work           { w.Random = true; return w }
func structured(w work) work       { w.Structured = true; return w }
func beside(idle int, w work) work { w.Idle = idle; return w }
func copying(to string) work       { return work{copyTo: to} }
func opening() work                { return work{opening: true} }
func weighed(w work) work          { w.weighed = true; return w }

const (
	toNull = "null:"
	toFile = "file"
)

var workloads = []workload{
	{"raw read 1M qd16", true, raw, memory, unix, weighed(reads(1, 16, m)), must(1.7).stretch(2.5)},
	{"raw write 1M qd16", true, raw, memory, unix, weighed(writes(1, 16, m)), parity().stretch(1.2)},
	{"raw rand read 4k qd1", true, raw, memory, unix, random(reads(1, 1, 4*k)), must(1.2).stretch(1.6)},
	{"raw rand read 4k qd32", true, raw, memory, unix, random(reads(1, 32, 4*k)), must(2.5).stretch(3)},
	{"raw rand write 4k qd32", true, raw, memory, unix, random(writes(1, 32, 4*k)), must(1.2).stretch(2)},
	{"raw rand 70/30 4k qd32", true, raw, memory, unix, random(mix(1, 32, 4*k, 7, 3, 0)), must(2.5).stretch(3.5)},
	{"raw 8 writes:1 flush 4k qd32, disk", true, raw, disk, unix, random(mix(1, 32, 4*k, 0, 8, 1)), parity().stretch(1.2)},
	{"raw read 1M qd16, tcp", true, raw, memory, tcp, reads(1, 16, m), parity().stretch(1.2)},

	{"raw read 64k qd16", false, raw, memory, unix, reads(1, 16, 64*k), goal{}},
	{"raw read 1M qd16, structured", false, raw, memory, unix, structured(reads(1, 16, m)), goal{}},
	{"raw rand read 4k qd32 x4", false, raw, memory, unix, random(reads(4, 32, 4*k)), must(2.5).stretch(4)},
	{"raw rand read 4k qd1 x100", false, raw, memory, unix, weighed(random(reads(100, 1, 4*k))), must(1.3)},
	{"raw rand read 4k qd1 x1000", false, raw, memory, unix, weighed(random(reads(1000, 1, 4*k))), goal{}},
	{"raw rand read 4k qd1 x100, 1000 idle", false, raw, memory, unix, weighed(beside(1000, random(reads(100, 1, 4*k)))), must(1.3)},
	{"raw write 1M qd16, disk", false, raw, disk, unix, writes(1, 16, m), parity().stretch(1.2)},
	{"raw write, flush 4k qd1, disk", false, raw, disk, unix, random(mix(1, 1, 4*k, 0, 1, 1)), parity().stretch(1.2)},
	{"raw rand read 4k qd32, cold", false, largeRaw, cold, unix, random(reads(1, 32, 4*k)), must(1.3).stretch(1.8)},
	{"raw rand read 4k qd1, far", false, raw, far, unix, random(reads(1, 1, 4*k)), goal{}},
	{"raw rand read 4k qd32, far", false, raw, far, unix, random(reads(1, 32, 4*k)), goal{}},
	{"raw rand read 4k qd32, far, cold", false, raw, farCold, unix, random(reads(1, 32, 4*k)), must(1.3).stretch(1.8)},
	{"raw rand read 4k qd32, O_DIRECT", false, raw, direct, unix, random(reads(1, 32, 4*k)), parity().stretch(1.2)},
	{"raw read 1M qd16, O_DIRECT", false, raw, direct, unix, reads(1, 16, m), parity().stretch(1.2)},
	{"raw rand read 4k qd1, tcp", false, raw, memory, tcp, random(reads(1, 1, 4*k)), parity().stretch(1.5)},
	{"raw rand read 4k qd32, tcp", false, raw, memory, tcp, random(reads(1, 32, 4*k)), must(2.5)},
	{"raw read 64k qd16, tcp", false, raw, memory, tcp, reads(1, 16, 64*k), goal{}},
	{"raw write 1M qd16, tcp", false, raw, memory, tcp, writes(1, 16, m), parity().stretch(1.1)},
	{"new raw write 64k qd16", false, newRaw, memory, unix, writes(1, 16, 64*k), goal{}},
	{"new raw read 1M qd16, structured", false, newRaw, memory, unix, structured(reads(1, 16, m)), goal{}},
	{"raw nbdcopy", false, largeRaw, memory, unix, copying(toNull), goal{}},
	{"sparse raw nbdcopy", false, sparse, memory, unix, copying(toFile), parity().stretch(1.2)},
	{"raw start to first byte", false, raw, memory, unix, opening(), parity()},

	{"qcow2 first rand write 4k qd32", true, newQcow2, memory, unix, random(writes(1, 32, 4*k)), must(4)},
	{"qcow2 first write 1M qd16", true, newQcow2, memory, unix, writes(1, 16, m), must(1.3)},
	{"qcow2 rand write 4k qd32", true, qcow2, memory, unix, random(writes(1, 32, 4*k)), must(3)},

	{"qcow2 first write 4k qd32", false, newQcow2, memory, unix, writes(1, 32, 4*k), goal{}},
	{"qcow2 first write 64k qd16", false, newQcow2, memory, unix, writes(1, 16, 64*k), parity().stretch(1.3)},
	{"qcow2 first rand write 64k qd16", false, newQcow2, memory, unix, random(writes(1, 16, 64*k)), goal{}},
	{"qcow2 first write 1M qd16, disk", false, newQcow2, disk, unix, writes(1, 16, m), must(1.3)},
	{"qcow2 8 first writes:1 flush 4k qd32, disk", false, newQcow2, disk, unix, random(mix(1, 32, 4*k, 0, 8, 1)), goal{}},
	{"qcow2 write 1M qd16", false, qcow2, memory, unix, weighed(writes(1, 16, m)), must(1.5)},
	{"qcow2 read 1M qd16", false, qcow2, memory, unix, weighed(reads(1, 16, m)), must(2)},
	{"qcow2 rand read 4k qd1", false, qcow2, memory, unix, random(reads(1, 1, 4*k)), must(1.3)},
	{"qcow2 rand read 4k qd32", false, qcow2, memory, unix, random(reads(1, 32, 4*k)), must(3)},
	{"qcow2 read 1M qd16, tcp", false, qcow2, memory, tcp, reads(1, 16, m), goal{}},
	{"qcow2 of 256 GiB rand read 4k qd32", false, tables256G, memory, unix, random(reads(1, 32, 4*k)), goal{}},
	{"qcow2 of 1 TiB rand read 4k qd32", false, tables1T, memory, unix, random(reads(1, 32, 4*k)), goal{}},
	{"new qcow2 read 1M qd16", false, newQcow2, memory, unix, reads(1, 16, m), must(4)},
	{"new qcow2 read 1M qd16, structured", false, newQcow2, memory, unix, structured(reads(1, 16, m)), must(4)},
	{"qcow2 chain of 4 read 1M qd16", false, chain4, memory, unix, reads(1, 16, m), must(1.5)},
	{"qcow2 chain of 4 rand read 4k qd32", false, chain4, memory, unix, random(reads(1, 32, 4*k)), must(1.5)},
	{"qcow2 chain of 16 read 1M qd16", false, chain16, memory, unix, reads(1, 16, m), must(1.5)},
	{"qcow2 chain of 16 rand read 4k qd32", false, chain16, memory, unix, random(reads(1, 32, 4*k)), must(1.5)},
	{"qcow2 zlib read 1M qd16", false, qcow2z, memory, unix, reads(1, 16, m), must(1.1)},
	{"qcow2 zlib rand read 4k qd32", false, qcow2z, memory, unix, random(reads(1, 32, 4*k)), must(1.3)},
	{"qcow2 zstd read 1M qd16", false, qcow2zs, memory, unix, reads(1, 16, m), parity().stretch(1.5)},
	{"qcow2 zstd rand read 4k qd32", false, qcow2zs, memory, unix, random(reads(1, 32, 4*k)), parity().stretch(1.5)},
	{"qcow2 nbdcopy", false, largeQcow2, memory, unix, copying(toNull), must(1.2)},
	{"qcow2 start to first byte", false, qcow2, memory, unix, opening(), parity()},
	{"qcow2 of 1 TiB start to first byte", false, tables1T, memory, unix, opening(), parity()},
}
