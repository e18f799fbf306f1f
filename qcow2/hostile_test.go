package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/klauspost/compress/flate"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A builder makes small images by hand, without help of the code under test
// beyond its encoders.
type builder struct {
	h    *header
	cs   int64
	b    []byte
	free []int64 // clusters whose count is 0
}

// build begins an image: header, refcount table and one block, L1 table.
func build(clusterBits uint32, size int64) *builder {
	h := &header{version: 3, clusterBits: clusterBits, size: uint64(size), refcountOrder: 4, length: headerLengthNew, unknown: make([]byte, 7), refTableClusters: 1}
	x := &builder{h: h, cs: 1 << clusterBits}
	x.alloc(1)
	h.refTableOffset = uint64(x.alloc(1))
	block := x.alloc(1)
	x.put(int64(h.refTableOffset), uint64(block))
	h.l1Size = uint32(newGeometry(h).l1Entries(size))
	h.l1Offset = uint64(x.alloc((int64(h.l1Size)*8-1)>>clusterBits + 1))
	return x
}

// alloc adds clusters at the end.
func (x *builder) alloc(n int64) int64 {
	at := int64(len(x.b))
	x.b = append(x.b, make([]byte, n*x.cs)...)
	return at
}

// l2 returns where the entry of a guest offset lies, making its table.
func (x *builder) l2(off int64) int64 {
	g := newGeometry(x.h)
	l1 := int64(x.h.l1Offset) + g.l1Index(off)*8
	if binary.BigEndian.Uint64(x.b[l1:]) == 0 {
		at := x.alloc(1)
		x.put(l1, uint64(at)|flagCopied)
	}
	table := l1Entry(binary.BigEndian.Uint64(x.b[l1:])).host()
	return table + off>>g.clusterBits&(1<<g.l2Bits-1)*8*int64(g.entryWords)
}

func (x *builder) put(at int64, v uint64) { binary.BigEndian.PutUint64(x.b[at:], v) }

func (x *builder) entry(off int64, e uint64) { x.put(x.l2(off), e) }

// data puts a cluster of data at a guest offset.
func (x *builder) data(off int64, fill byte) int64 {
	l2 := x.l2(off)
	at := x.alloc(1)
	copy(x.b[at:], bytes.Repeat([]byte{fill}, int(x.cs)))
	x.put(l2, uint64(at)|flagCopied)
	return at
}

// compressed puts raw bytes as the compressed data of a cluster.
func (x *builder) compressed(off int64, raw []byte) {
	l2 := x.l2(off)
	at := x.alloc((int64(len(raw))-1)/x.cs + 1)
	copy(x.b[at:], raw)
	x.put(l2, uint64(newGeometry(x.h).compressedEntry(at, int64(len(raw)))))
}

// bytes finishes the image with counts of one for every cluster.
func (x *builder) bytes() []byte {
	fixed, err := x.h.encode()
	if err != nil {
		panic(err)
	}
	copy(x.b, fixed)
	block := refTableEntry(binary.BigEndian.Uint64(x.b[x.h.refTableOffset:])).host()
	for i := range min(int64(len(x.b))/x.cs, x.cs/2) {
		setRefcount(x.b[block:], i, 4, 1)
	}
	for _, c := range x.free {
		setRefcount(x.b[block:], c, 4, 0)
	}
	return x.b
}

func (x *builder) open(t testing.TB) *Image {
	t.Helper()
	return openBytes(t, x.bytes())
}

func openBytes(t testing.TB, b []byte) *Image {
	t.Helper()
	im, err := Open(context.Background(), storagetest.MemOf(b), image.Options{Name: "mem", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

func deflate(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 6)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(p)
	w.Close()
	return b.Bytes()
}

// TestCorruptEntries: what an entry has wrong is said when it is used, by its
// place; the rest of the image can be read.
func TestCorruptEntries(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(x *builder)
		want string
	}{
		{"unaligned", func(x *builder) { x.entry(0x20000, 0x50200) }, "L2 table at 0x40000, entry 2: offset 0x50200 is not aligned to 0x10000"},
		{"past the end", func(x *builder) { x.entry(0x20000, 0x7fff0000) }, "L2 table at 0x40000, entry 2: offset 0x7fff0000 is past the end (0x60000)"},
		{"reserved", func(x *builder) { x.entry(0x20000, 1<<57|0x50000) }, "L2 table at 0x40000, entry 2: reserved bits 0x200000000000000 are set"},
		{"reserved, unallocated", func(x *builder) { x.entry(0x20000, 2) }, "L2 table at 0x40000, entry 2: reserved bits 0x2 are set"},
		{"compressed past the end", func(x *builder) { x.entry(0x20000, flagCompressed|1<<40) }, "L2 table at 0x40000, entry 2: compressed data at 0x10000000000 is past the end (0x60000)"},
		{"compressed garbage", func(x *builder) { x.entry(0x20000, flagCompressed|0x50000) }, "compressed data at 0x50000, 512 bytes: "},
		{"L1 unaligned", func(x *builder) { x.put(int64(x.h.l1Offset), 0x40200) }, "L1 table at 0x30000, entry 0: L2 table offset 0x40200 is not aligned to 0x10000"},
		{"L1 past the end", func(x *builder) { x.put(int64(x.h.l1Offset), 1<<50) }, "L1 table at 0x30000, entry 0: L2 table offset 0x4000000000000 is past the end (0x60000)"},
		{"L1 reserved", func(x *builder) { x.put(int64(x.h.l1Offset), 0x40001) }, "L1 table at 0x30000, entry 0: reserved bits 0x1 are set"},
		{"zero in version 2", func(x *builder) { x.entry(0x20000, 1); x.h.version, x.h.length = 2, headerLengthV2 }, "L2 table at 0x40000, entry 2: zero cluster in an image of version 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := build(16, 1<<30)
			x.data(0x10000, 0x55)
			tt.edit(x)
			im := x.open(t)
			p := make([]byte, 100)
			_, err := im.ReadAt(p, 0x20000)
			if !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "read mem: ") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err := im.TryReadAt(p, 0x20000); !errors.Is(err, image.ErrCorrupt) && !errors.Is(err, image.ErrWouldBlock) {
				t.Errorf("try: %v", err)
			}
			if strings.HasPrefix(tt.name, "L1") {
				if _, err := im.ReadAt(p, 600<<20); err != nil {
					t.Errorf("reading elsewhere: %v", err)
				}
				return
			}
			if _, err := im.ReadAt(p, 0x10000); err != nil || p[0] != 0x55 {
				t.Errorf("reading elsewhere: %v", err)
			}
			x2, err := im.AppendExtents(nil, 0, 1<<20, image.WantZero)
			if err != nil || len(x2) == 0 || tt.name != "compressed garbage" && x2[len(x2)-1].Offset+x2[len(x2)-1].Length != 0x20000 {
				t.Errorf("extents before it: %v, %v", x2, err)
			}
		})
	}
}

func TestCorruptSubclusters(t *testing.T) {
	x := build(16, 1<<20)
	x.h.incompatible = incompatExtendedL2
	at := x.data(0, 1)
	x.put(x.l2(0)+8, 1<<32|1) // allocated and zero
	x.put(x.l2(0x10000)+8, 1) // allocated, but no cluster
	x.entry(0x20000, uint64(at)|flagCopied)
	x.put(x.l2(0x20000)+8, 0x5<<32|0x2)
	im := x.open(t)
	p := make([]byte, 8192)
	for _, off := range []int64{0, 0x10000} {
		if _, err := im.ReadAt(p, off); !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), "subcluster bitmap") {
			t.Errorf("at %#x: %v", off, err)
		}
	}
	if _, err := im.ReadAt(p, 0x20000); err != nil || p[0] != 0 || p[2048] != 1 || p[4095] != 1 || p[4096] != 0 {
		t.Errorf("subclusters: %v", err)
	}
}

// TestHostileHeaders opens images that claim to be huge: nothing of that size
// may be allocated, and nothing may panic.
func TestHostileHeaders(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(x *builder)
		want string
	}{
		{"L1 past the end", func(x *builder) { x.h.l1Size = maxL1Size / 8 }, "L1 table at 0x30000: its 4194304 entries are past the end"},
		{"snapshots past the end", func(x *builder) { x.h.snapshotCount, x.h.snapshotOffset = maxSnapshots, 1<<40 }, "Could not read snapshots"},
		{"snapshots of nothing", func(x *builder) { x.h.snapshotCount, x.h.snapshotOffset = maxSnapshots, 0x30000 }, "Could not read snapshots: snapshot table entry"},
		{"bitmaps past the end", func(x *builder) {
			x.h.autoclear = autoclearBitmaps
			x.h.setExtension(extBitmaps, bitmapsExtension{maxBitmaps, maxBitmapDirectory, 1 << 40}.encode())
		}, "bitmap directory at 0x10000000000 is past the end"},
		{"no bitmaps", func(x *builder) {
			x.h.autoclear = autoclearBitmaps
			x.h.setExtension(extBitmaps, bitmapsExtension{1, 512, 0x10000}.encode())
		}, "bitmap "},
		{"data file without a name", func(x *builder) { x.h.incompatible = incompatDataFile }, "'data-file' is required for this image"},
		{"data file, refused", func(x *builder) {
			x.h.incompatible = incompatDataFile
			x.h.setExtension(extDataFile, []byte("/etc/passwd"))
		}, `data file "/etc/passwd": refused by policy`},
		{"backing, refused", func(x *builder) { x.h.backing = "/etc/passwd" }, `backing image "/etc/passwd": refused by policy`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := build(16, 1<<30)
			tt.edit(x)
			_, err := Open(context.Background(), storagetest.MemOf(x.bytes()), image.Options{ReadOnly: true})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// A snapshot tells the size of its disk itself: as large as an L1 table can be
// it is served to its end, and anything more is refused.
func TestHostileSnapshotSizes(t *testing.T) {
	sel := image.SnapshotSelector{Any: "1"}
	open := func(t *testing.T, clusterBits uint32, size uint64) (image.Device, error) {
		x := build(clusterBits, 1<<20)
		x.data(0, 1)
		at := x.alloc(1)
		x.h.snapshotCount, x.h.snapshotOffset = 1, uint64(at)
		x.put(at, x.h.l1Offset)
		x.put(at+8, uint64(x.h.l1Size)<<32|1<<16) // an id of one byte
		x.put(at+32, 16)                          // bytes of extra data
		x.put(at+snapshotFixed+8, size)
		copy(x.b[at+snapshotFixed+16:], sel.Any)
		return x.open(t).OpenSnapshot(sel)
	}
	for _, bits := range []uint32{9, 16, 21} {
		g := newGeometry(&header{version: 3, clusterBits: bits, refcountOrder: 4})
		most := maxL1Size / 8 * g.tableSpan()
		d, err := open(t, bits, uint64(most))
		if err != nil {
			t.Errorf("2^%d: %v", bits, err)
			continue
		}
		p := bytes.Repeat([]byte{9}, 1024)
		if _, err := d.ReadAt(p, most-1024); err != nil || !bytes.Equal(p, make([]byte, len(p))) {
			t.Errorf("2^%d: the end: %v", bits, err)
		}
		if exts, err := d.AppendExtents(nil, most-1024, 1024, image.WantZero); err != nil || len(exts) != 1 || exts[0].Length != 1024 {
			t.Errorf("2^%d: the end: %+v, %v", bits, exts, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		for _, size := range []uint64{uint64(most) + 512, math.MaxInt64 - 1<<maxClusterBits, math.MaxInt64, 1 << 63, math.MaxUint64} {
			if _, err := open(t, bits, size); !errors.Is(err, image.ErrCorrupt) {
				t.Errorf("2^%d: %d bytes: %v", bits, size, err)
			}
		}
	}
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct {
		params []image.Param
		budget int64
		want   string
	}{
		{nil, defaultL2Cache, ""},
		{[]image.Param{{Key: "l2-cache-size", Value: "1M"}}, 1 << 20, ""},
		{[]image.Param{{Key: "cache-size", Value: "65536"}}, 65536, ""},
		{[]image.Param{{Key: "cache-size", Value: "2M"}, {Key: "l2-cache-size", Value: "64k"}}, 65536, ""},
		{[]image.Param{{Key: "cache-size", Value: "1M"}, {Key: "l2-cache-size", Value: "2M"}}, 0, "l2-cache-size may not exceed cache-size"},
		{[]image.Param{{Key: "l2-cache-size", Value: "-1"}}, 0, "expects a non-negative number"},
		{[]image.Param{{Key: "l2-cache-size", Value: "9999999P"}}, 0, "is out of range"},
		{[]image.Param{{Key: "no-such-thing", Value: "1"}}, 0, "does not support the option 'no-such-thing'"},
	} {
		o, err := parseOptions(tt.params)
		switch {
		case tt.want == "" && (err != nil || o.l2Budget() != tt.budget):
			t.Errorf("%v: %d, %v", tt.params, o.l2Budget(), err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%v: %v, want %q", tt.params, err, tt.want)
		}
	}
}

// TestReadFaults fails every operation of the store in turn: the error
// surfaces or what failed is done again, and the image can be used afterwards.
func TestReadFaults(t *testing.T) {
	x := build(12, 8<<20)
	for i := range int64(20) {
		x.data(i*300<<10, byte(i+1))
	}
	x.compressed(50<<10, deflate(t, bytes.Repeat([]byte{7}, 4096)))
	b := x.bytes()
	want := make([]byte, 8<<20)
	if _, err := openBytes(t, b).ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for k := 1; ; k++ {
		s := storagetest.Fault(storagetest.MemOf(b), storagetest.Nth(storagetest.OpAny&^storagetest.OpClose, k, storagetest.Failure{Err: syscall.EIO}))
		im, err := Open(context.Background(), s, image.Options{ReadOnly: true})
		if err != nil {
			if !errors.Is(err, syscall.EIO) {
				t.Fatalf("operation %d: open: %v", k, err)
			}
			continue
		}
		got := make([]byte, len(want))
		_, err = im.ReadAt(got, 0)
		if err != nil && !errors.Is(err, syscall.EIO) || err == nil && !bytes.Equal(got, want) {
			t.Fatalf("operation %d: %v", k, err)
		}
		if err != nil {
			failed++
		}
		if len(s.Injected()) == 0 {
			break
		}
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("operation %d: reading again: %v", k, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if failed < 20 {
		t.Errorf("only %d operations failed", failed)
	}
}

// TestReadPastTheEnd: the last cluster of a store may be cut, as QEMU's are.
func TestReadPastTheEnd(t *testing.T) {
	x := build(16, 1<<20)
	x.data(0x10000, 0x77)
	b := x.bytes()
	im := openBytes(t, b[:len(b)-60000])
	p := bytes.Repeat([]byte{9}, 0x10000)
	if _, err := im.ReadAt(p, 0x10000); err != nil || p[5535] != 0x77 || p[5536] != 0 || p[65535] != 0 {
		t.Errorf("%v, %d %d", err, p[5535], p[5536])
	}
	exts, err := im.AppendExtents(nil, 0x10000, 0x10000, image.WantLocation|image.WantZero)
	if err != nil || len(exts) != 2 || exts[0].Length != 5536 || exts[0].At.Store == nil || exts[1].At.Store != nil || !exts[1].Zero {
		t.Errorf("%+v, %v", exts, err)
	}
}

// Somebody cuts the file short while it is served: what is not there any more
// does not read as zeros.
func TestReadCutShort(t *testing.T) {
	const far = 512 << 20 // in another table
	x := build(16, 1<<30)
	x.data(0, 1)
	x.data(x.cs, 2)
	tail := int64(len(x.b))
	x.data(far, 3)
	mem := storagetest.MemOf(x.bytes())
	im, err := Open(context.Background(), mem, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	p := make([]byte, 2*x.cs)
	if _, err := im.ReadAt(p, 0); err != nil || p[0] != 1 || p[x.cs] != 2 {
		t.Fatalf("%d, %d, %v", p[0], p[x.cs], err)
	}
	if err := mem.Truncate(tail); err != nil {
		t.Fatal(err)
	}
	if _, err := im.ReadAt(p[:512], far); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("a table that is not there any more: %d, %v", p[0], err)
	}
	if err := mem.Truncate(tail - x.cs); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct{ off, n int64 }{{x.cs, 512}, {2*x.cs - 512, 512}, {0, 2 * x.cs}} {
		if _, err := im.ReadAt(p[:r.n], r.off); !errors.Is(err, image.ErrCorrupt) {
			t.Errorf("%d bytes at %d that are not there any more: %v", r.n, r.off, err)
		}
		if err := im.TryReadAt(p[:r.n], r.off); !errors.Is(err, image.ErrWouldBlock) {
			t.Errorf("trying %d bytes at %d that are not there any more: %v", r.n, r.off, err)
		}
	}
	if _, err := im.ReadAt(p[:x.cs], 0); err != nil || p[0] != 1 {
		t.Errorf("what is there: %d, %v", p[0], err)
	}
}

// TestTryReadAt: nothing is waited for and no cluster decoded; what is at hand
// is served, the part of a table included that finds it.
func TestTryReadAt(t *testing.T) {
	x := build(16, 1<<30)
	x.data(0, 1)
	x.compressed(0x10000, deflate(t, bytes.Repeat([]byte{2}, 0x10000)))
	im := x.open(t)
	p := make([]byte, 4096)
	if err := im.TryReadAt(p, 600<<20); err != nil {
		t.Errorf("unallocated table: %v", err)
	}
	if err := im.TryReadAt(p, 0); err != nil || p[0] != 1 {
		t.Errorf("table at hand: %v, %d", err, p[0])
	}
	if err := im.TryReadAt(p, 0x10000); !errors.Is(err, image.ErrWouldBlock) {
		t.Errorf("cluster not decoded: %v", err)
	}
	if _, err := im.ReadAt(p, 0x1f000); err != nil {
		t.Fatal(err)
	}
	if err := im.TryReadAt(p, 0x10000); err != nil || p[0] != 2 || p[4095] != 2 {
		t.Errorf("decoded: %v, %d", err, p[0])
	}
}

// TestSingleFlight: readers of one table or compressed cluster wait for one
// load, others do not wait.
func TestSingleFlight(t *testing.T) {
	x := build(16, 64<<30)
	x.compressed(0, deflate(t, bytes.Repeat([]byte{2}, 0x10000)))
	x.data(32<<30, 3)
	table := int64(binary.BigEndian.Uint64(x.b[x.h.l1Offset:]) & hostMask)
	started, release := make(chan storagetest.Op, 100), make(chan struct{})
	hold := storagetest.Hold(storagetest.OpRead, started, release)
	s := storagetest.Fault(storagetest.MemOf(x.bytes()), func(op storagetest.Op) *storagetest.Failure {
		if op.Offset != table {
			return nil
		}
		return hold(op)
	})
	im, err := Open(context.Background(), s, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := make([]byte, 512)
			if _, err := im.ReadAt(p, int64(i)*1024); err != nil || p[0] != 2 {
				t.Errorf("%v, %d", err, p[0])
			}
		})
	}
	<-started
	p := make([]byte, 512)
	if _, err := im.ReadAt(p, 32<<30); err != nil || p[0] != 3 {
		t.Errorf("another table: %v, %d", err, p[0])
	}
	close(release)
	wg.Wait()
	if n := len(started); n != 0 {
		t.Errorf("the table was loaded %d times more", n)
	}
	if n := len(im.decoder.kept); n != 1 {
		t.Errorf("%d clusters kept", n)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if _, err := im.ReadAt(p, 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestEviction reads far more tables than the cache may hold, from many
// goroutines: entries of evicted slices are not reused while they are read.
func TestEviction(t *testing.T) {
	const tables = 400
	x := build(9, tables*32<<10)
	for i := range int64(tables) {
		x.data(i*32<<10, byte(i))
	}
	s := storagetest.MemOf(x.bytes())
	im, err := Open(context.Background(), s, image.Options{ReadOnly: true, Params: []image.Param{{Key: "l2-cache-size", Value: "16k"}}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			p := make([]byte, 16)
			for i := range int64(3000) {
				n := (i*7 + int64(g)*131) % tables
				if _, err := im.ReadAt(p, n*32<<10); err != nil || p[0] != byte(n) {
					t.Errorf("table %d: %v, %d", n, err, p[0])
					return
				}
			}
		})
	}
	wg.Wait()
	cached := 0
	for i := range im.mapping.cache.sets {
		for j := range im.mapping.cache.sets[i].ways {
			if im.mapping.cache.sets[i].ways[j].Load() != nil {
				cached++
			}
		}
	}
	if cached > 32 {
		t.Errorf("%d slices of 512 bytes are cached, 32 are allowed", cached)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}

// TestDecoderPrefix: what lies behind the first read of a cluster is not
// decoded, so an error there is found by who reads that far; a second read
// brings in all.
func TestDecoderPrefix(t *testing.T) {
	x := build(16, 1<<20)
	data := texts(0x10000)["words"]
	x.compressed(0, deflate(t, data))
	short := deflate(t, data)
	x.compressed(0x10000, short[:len(short)/2])
	im := x.open(t)
	read := func(at int64, n int) error {
		p := make([]byte, n)
		_, err := im.ReadAt(p, at)
		if err == nil && !bytes.Equal(p, data[at&0xffff:][:n]) {
			t.Errorf("%d bytes at %#x are others", n, at)
		}
		return err
	}
	for _, at := range []int64{0x1000, 0x2000, 0xf000, 0, 0xffff} {
		had := im.TryReadAt(make([]byte, 1), 0xffff) == nil
		if err := read(at, 1); err != nil || had != (at != 0x1000 && at != 0x2000) {
			t.Errorf("read at %#x: %v; all there before: %v", at, err, had)
		}
	}
	for range 2 {
		if err := read(0x10000, 512); err != nil {
			t.Errorf("the beginning of a cluster whose end is missing: %v", err)
		}
		if err := read(0x1f000, 512); !errors.Is(err, image.ErrCorrupt) {
			t.Errorf("its end: %v", err)
		}
	}
}

// TestDecoderBound: clusters that nobody uses are dropped beyond the bound,
// the least recently used first.
func TestDecoderBound(t *testing.T) {
	x := build(21, 64<<21)
	for i := range int64(10) {
		x.compressed(i<<21, deflate(t, bytes.Repeat([]byte{byte(i)}, 1<<21)))
	}
	im := x.open(t)
	p := make([]byte, 16)
	for i := range int64(10) {
		if _, err := im.ReadAt(p, i<<21); err != nil || p[0] != byte(i) {
			t.Fatal(err, p[0])
		}
		if _, err := im.ReadAt(p, 0); err != nil || p[0] != 0 {
			t.Fatal(err, p[0])
		}
	}
	if len(im.decoder.kept) != 4 {
		t.Errorf("%d clusters kept", len(im.decoder.kept))
	}
	for i, kept := range []bool{true, false, false, false, false, false, false, true, true, true} {
		if got := im.TryReadAt(p, int64(i)<<21) == nil; got != kept {
			t.Errorf("cluster %d: kept %v", i, got)
		}
	}
}

func TestTally(t *testing.T) {
	c := newTally(10000)
	for _, n := range []uint64{1, 254, 255, 70000, 255, 3, 0} {
		c.set(5000, n)
		if got := c.get(5000); got != n {
			t.Errorf("got %d, want %d", got, n)
		}
	}
	if len(c.large) != 0 || c.get(-1) != 0 || c.get(1<<40) != 0 {
		t.Error("tally")
	}
	if c.skip(0) != 4096 || c.skip(5000) != 5000 {
		t.Error("skip")
	}
	// Few in a page, many, and all, in any order.
	for _, n := range []int{10, 64, 65, 1 << pageBits} {
		c, m, want := newTally(1<<pageBits), newRoleMap(), map[int64]uint64{}
		for i, k := range rand.New(rand.NewPCG(1, uint64(n))).Perm(1 << pageBits)[:n] {
			want[int64(k)] = uint64(i*5%300 + 1)
			c.set(int64(k), want[int64(k)])
			m.add(int64(k), role(1+i%3))
		}
		for k := range int64(1 << pageBits) {
			if got := c.get(k); got != want[k] || (m.get(k) != roleNone) != (want[k] > 0) {
				t.Fatalf("%d of them: cluster %d: %d, want %d; role %d", n, k, got, want[k], m.get(k))
			}
		}
		if n == 10 && len(c.pages[0]) > 100 {
			t.Error("few clusters take much memory")
		}
	}
}

func seeds() [][]byte {
	plain := build(9, 40<<10)
	plain.data(0, 1)
	plain.data(33<<10, 2)
	plain.entry(512, 1)
	plain.entry(1024, flagCompressed|0x200)

	sub := build(14, 64<<10)
	sub.h.incompatible = incompatExtendedL2
	sub.data(0, 1)
	sub.put(sub.l2(0)+8, 0xf0<<32|0x0f)

	many := build(9, 40<<10)
	many.data(0, 1)
	at := many.alloc(1)
	many.h.snapshotCount, many.h.snapshotOffset = 1, uint64(at)
	many.put(at, many.h.l1Offset)
	binary.BigEndian.PutUint32(many.b[at+8:], 1)
	at = many.alloc(2)
	e := bitmapEntry{tableAt: uint64(at) + 512, tableSize: 1, granularity: 16, name: "b", flags: bitmapAuto}
	copy(many.b[at:], e.encode())
	many.put(at+512, 1)
	many.h.autoclear = autoclearBitmaps
	many.h.setExtension(extBitmaps, bitmapsExtension{1, uint64(len(e.encode())), uint64(at)}.encode())
	return [][]byte{plain.bytes(), sub.bytes(), many.bytes()}
}

func FuzzOpenReadAll(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		im, err := Open(context.Background(), storagetest.MemOf(b), image.Options{ReadOnly: true})
		if err != nil {
			return
		}
		readAll(t, im)
		for i, sn := range im.Snapshots() {
			if i == 3 {
				break
			}
			if d, err := im.OpenSnapshot(image.SnapshotSelector{ID: sn.ID, Name: sn.Name}); err == nil {
				readAll(t, d)
				d.Close()
			}
		}
		for _, info := range im.Bitmaps() {
			if m, err := im.Bitmap(info.Name); err == nil && im.Info().Size > 0 {
				m.AppendDirty(nil, 0, im.Info().Size)
			}
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// readAll reads at most a megabyte of a device and looks at its extents.
func readAll(t testing.TB, d image.Device) {
	size := d.Info().Size
	p := make([]byte, 64<<10)
	for off := int64(0); off < min(size, 1<<20); off += int64(len(p)) {
		q := p[:min(int64(len(p)), size-off)]
		n, err := d.ReadAt(q, off)
		if err == nil && n != len(q) || errors.Is(err, io.EOF) {
			t.Fatalf("read: %d, %v", n, err)
		}
		d.TryReadAt(q, off)
	}
	steps := 0
	for e, err := range image.Extents(d, 0, size, image.WantZero|image.WantAllocated|image.WantLocation) {
		if steps++; err != nil || steps > 1000 {
			break
		}
		if e.Length <= 0 {
			t.Fatalf("extent %+v", e)
		}
	}
}

func FuzzCheck(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		im, err := Open(context.Background(), storagetest.MemOf(b), image.Options{ReadOnly: true})
		if err != nil {
			return
		}
		defer im.Close()
		var findings int64
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		res, err := im.Check(ctx, image.CheckOptions{Report: func(f image.Finding) {
			if findings++; findings > 1<<16 {
				cancel()
			}
		}})
		if err == nil && findings != res.Corruptions+res.Leaks && res.CheckErrors == 0 && len(im.Bitmaps()) == 0 {
			t.Fatalf("%d findings, but %+v", findings, res)
		}
	})
}

// FuzzDecode gives the decoders anything: they answer with a cluster or an
// error, in bounded memory.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{3, 0}, false)
	f.Add([]byte("\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"), true)
	f.Fuzz(func(t *testing.T, b []byte, zstd bool) {
		w := &workspace{src: b}
		p := make([]byte, 4096)
		if zstd {
			_ = w.zstd(p)
		} else {
			_ = w.inflate.inflate(p, b)
		}
	})
}

// alternating is an image whose clusters are data and holes by turns. All its
// L2 tables are one.
func alternating(clusterBits uint32, size int64) *builder {
	x := build(clusterBits, size)
	x.data(0, 1)
	table, data := x.l2(0), binary.BigEndian.Uint64(x.b[x.l2(0):])
	for i := int64(0); i < x.cs; i += 16 {
		x.put(table+i, data)
	}
	for i := range int64(x.h.l1Size) {
		x.put(int64(x.h.l1Offset)+8*i, uint64(table))
	}
	return x
}

// countExtents counts the questions for extents.
type countExtents struct {
	image.Device
	n int
}

func (c *countExtents) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	c.n++
	return c.Device.AppendExtents(dst, off, n, want)
}

// A few small images can describe a disk in as many pieces as the lowest could
// have clusters, and all that may be told as one extent. An answer looks at few.
func TestHostileExtents(t *testing.T) {
	const size = 64 << 20
	bottom := &countExtents{Device: alternating(9, size).open(t)}
	var top image.Device = bottom
	for _, x := range []*builder{alternating(13, size), alternating(17, size), build(16, size)} {
		x.h.backing = "below"
		im, err := Open(context.Background(), storagetest.MemOf(x.bytes()), image.Options{ReadOnly: true, Refs: backedBy{top}})
		if err != nil {
			t.Fatal(err)
		}
		top = im
	}
	defer top.Close()
	for want := range image.WantLocation * 2 {
		bottom.n = 0
		exts, err := top.AppendExtents(nil, 0, size, want)
		if err != nil || len(exts) > image.MaxExtents || bottom.n > 1 {
			t.Errorf("want %d: %d extents, the lowest image was asked %d times, %v", want, len(exts), bottom.n, err)
		}
	}
}

// Space that was allocated ahead is holes wherever nothing was written yet. One
// answer looks at a part of them.
func TestPreallocatedExtents(t *testing.T) {
	const size = 4 << 20
	x := build(16, size)
	for off := int64(0); off < size; off += x.cs {
		x.data(off, 1)
	}
	mem := storagetest.MemOf(x.bytes())
	for off := int64(0); off < size; off += 8 << 10 {
		host := l2Entry(binary.BigEndian.Uint64(x.b[x.l2(off):])).host() + off%x.cs
		if err := mem.Discard(host, 4<<10); err != nil {
			t.Fatal(err)
		}
	}
	asked := 0
	store := storagetest.Fault(mem, func(op storagetest.Op) *storagetest.Failure {
		if op.Kind == storagetest.OpExtents {
			asked++
		}
		return nil
	})
	im, err := Open(context.Background(), store, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if !im.preallocated() {
		t.Fatal("the holes are not noticed")
	}
	for off := int64(0); off < size; {
		asked = 0
		exts, err := im.AppendExtents(nil, off, size-off, image.WantZero)
		if err != nil || len(exts) == 0 || len(exts) > image.MaxExtents || asked > 1 {
			t.Fatalf("at %#x: %d extents, the store was asked %d times, %v", off, len(exts), asked, err)
		}
		for _, e := range exts {
			if e.Offset != off || e.Length != 4<<10 || e.Zero != (off%(8<<10) == 0) {
				t.Fatalf("at %#x: %+v", off, e)
			}
			off += e.Length
		}
	}
}

// Somebody cuts short the file of a preallocated image: what is not there any
// more is not told as holes.
func TestExtentsCutShort(t *testing.T) {
	x := build(16, 1<<20)
	for off := int64(0); off < 1<<20; off += x.cs {
		x.data(off, 1)
	}
	end := int64(len(x.b)) - 1<<20
	mem := storagetest.MemOf(x.bytes())
	if err := mem.Discard(end, 512<<10); err != nil {
		t.Fatal(err)
	}
	im, err := Open(context.Background(), mem, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if !im.preallocated() {
		t.Fatal("the holes are not noticed")
	}
	for e, err := range image.Extents(im, 0, 1<<20, image.WantZero) {
		if err != nil || e.Zero != (e.Offset < 512<<10) {
			t.Errorf("before: %+v, %v", e, err)
		}
	}
	if err := mem.Truncate(end); err != nil {
		t.Fatal(err)
	}
	for e, err := range image.Extents(im, 0, 1<<20, image.WantZero) {
		if err != nil || e.Zero {
			t.Errorf("after: %+v, %v", e, err)
		}
	}
}

// The bits of a large bitmap may all be one cluster of zeros, which makes one
// extent. An answer reads little of them.
func TestHostileBitmap(t *testing.T) {
	const size = 1 << 30
	x := build(9, size)
	at := x.alloc(1)
	e := bitmapEntry{tableSize: uint32(size >> 9 / (x.cs * 8)), granularity: 9, name: "b"}
	e.tableAt = uint64(x.alloc(int64(e.tableSize) * 8 / x.cs))
	copy(x.b[at:], e.encode())
	zeros := x.alloc(1)
	for i := range int64(e.tableSize) {
		x.put(int64(e.tableAt)+8*i, uint64(zeros))
	}
	x.h.autoclear = autoclearBitmaps
	x.h.setExtension(extBitmaps, bitmapsExtension{1, uint64(len(e.encode())), uint64(at)}.encode())
	reads := 0
	store := storagetest.Fault(storagetest.MemOf(x.bytes()), func(op storagetest.Op) *storagetest.Failure {
		if op.Kind == storagetest.OpRead {
			reads++
		}
		return nil
	})
	im, err := Open(context.Background(), store, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	b, err := im.Bitmap("b")
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < size; {
		reads = 0
		exts, err := b.AppendDirty(nil, off, size-off)
		if err != nil || len(exts) != 1 || exts[0].Offset != off || exts[0].Dirty || reads > image.MaxExtents+1 {
			t.Fatalf("at %#x: %+v after %d reads, %v", off, exts, reads, err)
		}
		off += exts[0].Length
	}
}

// Bits that a file lost with its end are not taken for zeros: a backup would
// leave out what they stand for. What stands for nothing may be missing.
func TestBitmapCutOff(t *testing.T) {
	const size, cluster = 16 << 20, 4096 // 256 bits
	x := build(12, size)
	at := x.alloc(1)
	e := bitmapEntry{tableSize: 1, granularity: 16, name: "b"}
	e.tableAt = uint64(x.alloc(1))
	copy(x.b[at:], e.encode())
	bits := x.alloc(1)
	x.put(int64(e.tableAt), uint64(bits))
	x.h.autoclear = autoclearBitmaps
	x.h.setExtension(extBitmaps, bitmapsExtension{1, uint64(len(e.encode())), uint64(at)}.encode())
	whole := x.bytes()
	for n, want := range map[int64]error{8: image.ErrCorrupt, 31: image.ErrCorrupt, 32: nil, cluster: nil} {
		im, err := Open(context.Background(), storagetest.MemOf(whole[:bits+n]), image.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		b, err := im.Bitmap("b")
		if err != nil {
			t.Fatal(err)
		}
		if exts, err := b.AppendDirty(nil, 0, size); !errors.Is(err, want) {
			t.Errorf("%d bytes of bits: %+v, %v", n, exts, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// backedBy opens one image, whatever it is asked for.
type backedBy struct{ image.Device }

func (b backedBy) OpenImage(context.Context, image.Reference) (image.Device, error) {
	return b.Device, nil
}

func (b backedBy) OpenStore(context.Context, image.Reference, bool) (storage.Store, error) {
	return nil, image.ErrReference
}
