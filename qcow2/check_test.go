package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A verdict is what a check says.
type verdict struct {
	Findings                                 []string
	Corruptions, Leaks, Errors, End          int64
	Total, Allocated, Fragmented, Compressed int64
}

// qemuVerdict is that of qemu-img.
func qemuVerdict(t testing.TB, file string) verdict {
	t.Helper()
	r := qemu.Try(t, "qemu-img", "check", "-f", "qcow2", "--output=json", file)
	var j struct {
		Corruptions int64 `json:"corruptions"`
		Leaks       int64 `json:"leaks"`
		Errors      int64 `json:"check-errors"`
		End         int64 `json:"image-end-offset"`
		Total       int64 `json:"total-clusters"`
		Allocated   int64 `json:"allocated-clusters"`
		Fragmented  int64 `json:"fragmented-clusters"`
		Compressed  int64 `json:"compressed-clusters"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &j); err != nil {
		t.Fatalf("qemu-img check %s: %v\n%s%s", file, err, r.Stdout, r.Stderr)
	}
	var lines []string
	for line := range strings.Lines(r.Stderr) {
		line = strings.TrimSuffix(line, "\n")
		line = strings.TrimPrefix(line, "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.")
		if line != "" && !strings.HasPrefix(line, "qemu-img: ") && !strings.HasPrefix(line, "qcow2: Image is corrupt: ") {
			lines = append(lines, line)
		}
	}
	return verdict{lines, j.Corruptions, j.Leaks, j.Errors, j.End, j.Total, j.Allocated, j.Fragmented, j.Compressed}
}

func ourVerdict(t testing.TB, file string) verdict {
	t.Helper()
	im := openFile(t, file)
	defer im.Close()
	var v verdict
	var leaks int64
	res, err := im.Check(context.Background(), image.CheckOptions{Report: func(f image.Finding) {
		v.Findings = append(v.Findings, strings.Split(f.Text, "\n")...)
		if f.Leak {
			leaks++
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if leaks != res.Leaks {
		t.Errorf("%d leaks, but %d reported", res.Leaks, leaks)
	}
	return verdict{v.Findings, res.Corruptions, res.Leaks, res.CheckErrors, res.ImageEndOffset,
		res.TotalClusters, res.AllocatedClusters, res.FragmentedClusters, res.CompressedClusters}
}

func compareVerdicts(t testing.TB, file string) verdict {
	t.Helper()
	want, got := qemuVerdict(t, file), ourVerdict(t, file)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (- qemu-img, + ours):\n%.4000s", diff)
	}
	return want
}

func TestCheckClean(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			compareVerdicts(t, r.make(t))
		})
	}
}

// An editor changes an image behind its back.
type editor struct {
	t testing.TB
	b []byte
	h *header
	g *geometry
}

func edit(t testing.TB, file string, change func(e *editor)) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	h, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	e := &editor{t, b, h, newGeometry(h)}
	change(e)
	if err := os.WriteFile(file, e.b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (e *editor) word(at int64) uint64   { return binary.BigEndian.Uint64(e.b[at:]) }
func (e *editor) put(at int64, v uint64) { binary.BigEndian.PutUint64(e.b[at:], v) }
func (e *editor) l1(i int64) int64       { return int64(e.h.l1Offset) + i*8 }
func (e *editor) refTable(i int64) int64 { return int64(e.h.refTableOffset) + i*8 }
func (e *editor) l2(i, j int64) int64 {
	return l1Entry(e.word(e.l1(i))).host() + j*8*int64(e.g.entryWords)
}
func (e *editor) xor(at int64, v uint64) { e.put(at, e.word(at)^v) }
func (e *editor) setCount(c int64, v uint64) {
	block := refTableEntry(e.word(e.refTable(c >> e.g.refBlockBits))).host()
	setRefcount(e.b[block:], c&(1<<e.g.refBlockBits-1), e.g.refcountOrder, v)
}
func (e *editor) count(c int64) uint64 {
	block := refTableEntry(e.word(e.refTable(c >> e.g.refBlockBits))).host()
	return refcount(e.b[block:], c&(1<<e.g.refBlockBits-1), e.g.refcountOrder)
}

var (
	plainImage      = recipe{io: writes}
	compressedImage = recipe{io: writes, compress: "compression_type=zlib"}
	subclusterImage = recipe{options: "extended_l2=on", io: writes}
	oneBitImage     = recipe{options: "refcount_bits=1", io: writes}
)

// damages are done on purpose.
var damages = []struct {
	name   string
	r      recipe
	change func(e *editor)
	want   string // of qemu-img's findings, so that the damage is what it is meant to be
}{
	{"leak", plainImage, func(e *editor) { e.put(e.l2(0, 0), 0) }, "Leaked cluster"},
	{"refcount 0", plainImage, func(e *editor) { e.setCount(int64(l2Entry(e.word(e.l2(0, 0))).host())>>16, 0) }, "refcount=0 reference=1"},
	{"refcount 2", plainImage, func(e *editor) { e.setCount(int64(l2Entry(e.word(e.l2(0, 0))).host())>>16, 2) }, "refcount=2 reference=1"},
	{"L2 entry without copied", plainImage, func(e *editor) { e.xor(e.l2(0, 0), flagCopied) }, "OFLAG_COPIED data cluster"},
	{"L1 entry without copied", plainImage, func(e *editor) { e.xor(e.l1(0), flagCopied) }, "OFLAG_COPIED L2 cluster"},
	{"two entries, one cluster", plainImage, func(e *editor) { e.put(e.l2(0, 1), e.word(e.l2(0, 0))) }, "refcount=1 reference=2"},
	{"L2 entry unaligned", plainImage, func(e *editor) { e.xor(e.l2(0, 0), 512) }, "Data cluster is not properly aligned"},
	{"zero cluster unaligned", plainImage, func(e *editor) { e.xor(e.l2(0, 0), 513) }, "Preallocated cluster is not properly aligned"},
	{"L2 entry past the end", plainImage, func(e *editor) { e.xor(e.l2(0, 0), 1<<40) }, "exceeding the end of the file"},
	{"L2 entry reserved", plainImage, func(e *editor) { e.xor(e.l2(0, 0), 1<<58) }, "found l2 entry with reserved bits"},
	{"L1 entry reserved", plainImage, func(e *editor) { e.xor(e.l1(0), 1<<58) }, "found L1 entry with reserved bits"},
	{"L1 entry unaligned", plainImage, func(e *editor) { e.xor(e.l1(0), 512) }, "Table is not cluster aligned"},
	{"data in the header", plainImage, func(e *editor) { e.put(e.l2(0, 1), flagCopied|1) }, ""},
	{"data in the refcount block", plainImage, func(e *editor) { e.put(e.l2(0, 1), flagCopied|e.word(e.refTable(0))) }, "refcount block 0 refcount=2"},
	{"data in L1", plainImage, func(e *editor) { e.put(e.l2(0, 1), flagCopied|e.h.l1Offset) }, "reference=2"},
	{"refcount table reserved", plainImage, func(e *editor) { e.xor(e.refTable(0), 1) }, "has reserved bits set"},
	{"refcount block unaligned", plainImage, func(e *editor) { e.xor(e.refTable(0), 512) }, "is not cluster aligned"},
	{"refcount block outside", plainImage, func(e *editor) { e.put(e.refTable(1), 1<<40) }, "is outside image"},
	{"no refcount block", plainImage, func(e *editor) { e.put(e.refTable(0), 0) }, "refcount=0"},
	{"compressed copied", compressedImage, func(e *editor) { e.xor(e.l2(0, 0), flagCopied) }, "copied flag must never be set"},
	{"compressed far", compressedImage, func(e *editor) { e.xor(e.l2(0, 0), 1<<50) }, "exceeding the end"},
	{"bitmap conflict", subclusterImage, func(e *editor) { e.xor(e.l2(0, 0)+8, 1<<32) }, "corrupted subcluster allocation bitmap"},
	{"bitmap of compressed data", recipe{io: writes, compress: "extended_l2=on,cluster_size=16k"}, func(e *editor) { e.xor(e.l2(0, 0)+8, 1) }, "non-zero subcluster allocation bitmap"},
	{"bitmap of nothing", subclusterImage, func(e *editor) { e.xor(e.l2(0, 9)+8, 1) }, "non-zero subcluster allocation map"},
	{"subclusters unaligned", subclusterImage, func(e *editor) { e.xor(e.l2(0, 0), 512) }, "not properly aligned"},
	{"overflow", oneBitImage, func(e *editor) { e.put(e.l2(0, 1), e.word(e.l2(0, 0))) }, "overflow cluster"},
}

func TestCheckDamaged(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := tt.r.make(t)
			edit(t, file, tt.change)
			v := compareVerdicts(t, file)
			if !strings.Contains(strings.Join(v.Findings, "\n"), tt.want) {
				t.Errorf("qemu-img says %q, not %q", v.Findings, tt.want)
			}
		})
	}
}

func TestCheckSnapshotsAndBitmaps(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := withSnapshots(t)
	compareVerdicts(t, file)
	edit(t, file, func(e *editor) { e.xor(int64(e.h.snapshotOffset), 512) })
	compareVerdicts(t, file)
	edit(t, file, func(e *editor) {
		e.xor(int64(e.h.snapshotOffset), 512)
		binary.BigEndian.PutUint32(e.b[e.h.snapshotOffset+8:], 5<<20)
	})
	compareVerdicts(t, file)

	file = withBitmaps(t)
	compareVerdicts(t, file)
	edit(t, file, func(e *editor) {
		h := *e.h
		h.autoclear &^= autoclearBitmaps
		copy(e.b, h.encodeFixed())
	})
	if v := compareVerdicts(t, file); v.Leaks == 0 {
		t.Error("the bitmaps did not leak")
	}
}

// withSnapshots makes an image with snapshots, one of a smaller disk.
func withSnapshots(t testing.TB) string {
	r := recipe{io: writes}
	file := r.make(t)
	qemu.Img(t, "snapshot", "-c", "first", file)
	qemu.IO(t, "qcow2", file, "write -P 0x91 0 200k", "discard 3M 64k")
	qemu.Img(t, "resize", "-q", "-f", "qcow2", file, "8M")
	qemu.Img(t, "snapshot", "-c", "second", file)
	qemu.IO(t, "qcow2", file, "write -P 0x92 100k 7M")
	return file
}

// withBitmaps makes an image with bitmaps, one of which recorded writes.
func withBitmaps(t testing.TB) string {
	r := recipe{size: "64M"}
	file := r.make(t)
	qemu.Img(t, "bitmap", "--add", "-g", "512", file, "fine")
	qemu.Img(t, "bitmap", "--add", file, "coarse")
	qemu.Img(t, "bitmap", "--add", "--disable", file, "off")
	qemu.IO(t, "qcow2", file, "write 1000k 3k", "write 40M 5M", "write 0 512")
	return file
}

var damageBases = []recipe{
	{name: "64k", io: writes},
	{name: "512", options: "cluster_size=512,refcount_bits=2", io: writes[:4], size: "2560k"},
	{name: "4k", options: "cluster_size=4k,refcount_bits=1", io: writes},
	{name: "subclusters", options: "extended_l2=on,cluster_size=16k", io: writes},
	{name: "zstd", io: writes, compress: "compression_type=zstd,cluster_size=4k"},
	{name: "data file", options: "data_file=DIR/data", io: writes},
}

// TestCheckRandomDamage turns over words of the metadata and wants every
// finding and figure to be that of qemu-img.
func TestCheckRandomDamage(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	n := 20
	if testing.Short() {
		n = 2
	}
	for _, base := range damageBases {
		t.Run(base.name, func(t *testing.T) {
			t.Parallel()
			file := base.make(t)
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for seed := range uint64(n) {
				rnd := rand.New(rand.NewPCG(seed, 7))
				if err := os.WriteFile(file, whole, 0o600); err != nil {
					t.Fatal(err)
				}
				var what []string
				edit(t, file, func(e *editor) {
					for range 1 + rnd.IntN(3) {
						what = append(what, e.damage(rnd))
					}
				})
				if compareVerdicts(t, file); t.Failed() {
					t.Fatalf("seed %d: %v", seed, what)
				}
			}
		})
	}
}

// damage changes one word of the metadata.
func (e *editor) damage(rnd *rand.Rand) string {
	var at int64
	switch rnd.IntN(6) {
	case 0:
		at = e.l1(rnd.Int64N(int64(e.h.l1Size)))
	case 1:
		at = e.refTable(rnd.Int64N(min(8, e.g.clusterSize/8)))
	case 2:
		block := refTableEntry(e.word(e.refTable(0))).host()
		if block <= 0 || block+e.g.clusterSize > int64(len(e.b)) {
			return "nothing"
		}
		at = block + rnd.Int64N(min(e.g.clusterSize/8, 64))*8
	default:
		table := l1Entry(e.word(e.l1(rnd.Int64N(min(4, int64(e.h.l1Size)))))).host()
		if table <= 0 || table+e.g.clusterSize > int64(len(e.b)) {
			return "nothing"
		}
		at = table + rnd.Int64N(min(e.g.clusterSize/8, 128))*8
	}
	old := e.word(at)
	switch rnd.IntN(4) {
	case 0:
		e.put(at, 0)
	case 1:
		e.xor(at, 1<<rnd.IntN(64))
	case 2:
		e.put(at, rnd.Uint64N(uint64(len(e.b)))&^uint64(e.g.clusterSize-1)|rnd.Uint64N(4)<<62)
	case 3:
		e.xor(at, uint64(e.g.clusterSize)<<rnd.IntN(3))
	}
	return fmt.Sprintf("word at %#x: %#x became %#x", at, old, e.word(at))
}

// TestCheckWhileOpen: what is in memory only is no finding.
func TestCheckWhileOpen(t *testing.T) {
	file := qemu.Create(t, "qcow2", "cluster_size=4k", "64M")
	d, err := chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(300) {
		if err := d.WriteAt([]byte("hello"), i*200<<10, 0); err != nil {
			t.Fatal(err)
		}
	}
	res, err := d.(*Image).Check(t.Context(), image.CheckOptions{Report: func(f image.Finding) { t.Error(f.Text) }})
	if err != nil || res.AllocatedClusters != 300 {
		t.Errorf("%+v, %v", res, err)
	}
	if err := d.WriteAt([]byte("hello"), 0, 0); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	compareVerdicts(t, file)
}

// A tallyStore counts the bytes that are read of it, there or past the end.
type tallyStore struct {
	storage.Store
	read int64
}

func (s *tallyStore) ReadAt(p []byte, off int64) (int, error) {
	s.read += int64(len(p))
	return s.Store.ReadAt(p, off)
}

// Few bytes say that an image has many tables of millions of entries, all of them
// in one place or past the end. They are not all read, with counts of any width.
func TestCheckReadsLittle(t *testing.T) {
	const bitmaps, entries, snapshots = 300, 1 << 16, 300
	for _, options := range []string{"cluster_size=512", "cluster_size=512,refcount_bits=1"} {
		for _, past := range []bool{false, true} {
			b := memImage(t, options, "1M", 0).Bytes()
			var directory []byte
			be := binary.BigEndian
			tableAt, l1At := uint64(1<<50), uint64(1<<50)
			if !past {
				tableAt = 1 << 20
				l1At = tableAt + entries*8
			}
			for i := range bitmaps {
				e := bitmapEntry{tableAt: tableAt, tableSize: entries, flags: bitmapInUse, granularity: 16, name: fmt.Sprint(i)}
				directory = append(directory, e.encode()...)
			}
			var table []byte
			for range snapshots {
				sn := snapshot{l1At: l1At, l1Size: entries, extra: make([]byte, snapshotExtra)}
				table = sn.append(table)
			}
			add := func(what []byte) (at uint64) {
				b = append(b, make([]byte, -len(b)&511)...)
				at = uint64(len(b))
				b = append(b, what...)
				return at
			}
			directoryAt, tableOfSnapshots := add(directory), add(table)
			be.PutUint32(b[60:], snapshots)
			be.PutUint64(b[64:], tableOfSnapshots)
			add(nil)
			if !past {
				b = append(b, make([]byte, int(l1At)+entries*8-len(b))...)
			}
			extension := be.AppendUint32(be.AppendUint32(nil, extBitmaps), 24)
			extension = be.AppendUint64(be.AppendUint32(extension, bitmaps), 0)[:16]
			extension = be.AppendUint64(be.AppendUint64(extension, uint64(len(directory))), directoryAt)
			copy(b[be.Uint32(b[100:]):], append(extension, make([]byte, 8)...))
			be.PutUint64(b[88:], uint64(autoclearBitmaps))

			for _, repair := range []image.Repair{image.RepairNothing, image.RepairAll} {
				s := &tallyStore{Store: storagetest.MemOf(bytes.Clone(b))}
				res, err := check(t.Context(), s, image.Options{}, image.CheckOptions{Repair: repair})
				if err != nil || res.Corruptions+res.CorruptionsFixed == 0 {
					t.Errorf("%s, past the end %t, repair %d: %+v, %v", options, past, repair, res, err)
				}
				// A walk reads either table a hundred times, and a repair walks some times.
				if most := int64(2*maxSameTable*entries*8) * 3 / 2; s.read > most*(1+2*int64(repair)) || past && s.read > 10<<20 {
					t.Errorf("%s, past the end %t, repair %d: %d bytes were read", options, past, repair, s.read)
				}
			}
		}
	}
}

// Of many tables in one place the longest is walked to its end: what only that leads
// to is in use. qemu-img, which walks them all, finds what is repaired right.
func TestCheckWalksLongest(t *testing.T) {
	qemu.Require(t, "qemu-img")
	b := memImage(t, "cluster_size=512", "1M", 0).Bytes()
	be := binary.BigEndian
	add := func(what ...byte) (at uint64) {
		b = append(b, make([]byte, -len(b)&511)...)
		at = uint64(len(b))
		b = append(append(b, what...), make([]byte, -len(what)&511)...)
		return at
	}
	word := func(words ...uint64) (b []byte) {
		for _, w := range words {
			b = be.AppendUint64(b, w)
		}
		return b
	}
	l1At := add(word(0, add(word(uint64(flagCopied)|add(1))...)|uint64(flagCopied))...)
	tableAt := add(word(0, add(1))...)
	var directory, snapshots []byte
	for i := range maxSameTable + 5 {
		n := uint32(1)
		if i == maxSameTable+2 {
			n = 2
		}
		e := bitmapEntry{tableAt: tableAt, tableSize: n, flags: bitmapInUse, granularity: 16, name: fmt.Sprint(i)}
		directory = append(directory, e.encode()...)
		sn := snapshot{l1At: l1At, l1Size: n, extra: make([]byte, snapshotExtra)}
		sn.ID = fmt.Sprint(i)
		snapshots = sn.append(snapshots)
	}
	directoryAt, snapshotsAt := add(directory...), add(snapshots...)
	be.PutUint32(b[60:], maxSameTable+5)
	be.PutUint64(b[64:], snapshotsAt)
	extension := be.AppendUint32(be.AppendUint32(nil, extBitmaps), 24)
	extension = be.AppendUint32(be.AppendUint32(extension, maxSameTable+5), 0)
	extension = append(extension, word(uint64(len(directory)), directoryAt, 0)...)
	copy(b[be.Uint32(b[100:]):], extension)
	be.PutUint64(b[88:], uint64(autoclearBitmaps))

	s := storagetest.MemOf(b)
	for _, repair := range []image.Repair{image.RepairAll, image.RepairLeaks} {
		res, err := check(t.Context(), s, image.Options{}, image.CheckOptions{Repair: repair})
		if err != nil || res.Corruptions != 0 || res.Leaks != 0 || repair == image.RepairLeaks && res.LeaksFixed != 0 {
			t.Errorf("%+v, %v", res, err)
		}
		file := filepath.Join(t.TempDir(), "disk.qcow2")
		if err := os.WriteFile(file, s.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		compareVerdicts(t, file)
		if v := qemuVerdict(t, file); v.Corruptions != 0 || v.Leaks != 0 {
			t.Errorf("qemu-img finds %+v", v)
		}
	}
}
