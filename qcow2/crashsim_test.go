package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// The crash simulator. Workers send random requests to an image on a store
// that records everything in one order: writes, syncs, requests, answers. Then,
// for points of that record, it builds images that a crash at that point may
// leave, and lets an independent reader judge them: is the structure sound,
// and does every guest sector hold what the requests until then allow?
//
// Sectors carry the number of the request that wrote them, and their own.

const sim512 = storagetest.SectorSize

// A simKind is a kind of image, and a workload for it.
type simKind struct {
	name     string
	options  string // of qemu-img create
	size     int64  // bytes of the disk; hot: of its part that gets most requests
	hot      int64
	workers  int
	ops      int
	backing  bool
	device   int64      // bytes of a device of fixed size that holds the image; 0: a file
	before   []string   // commands of qemu-io on the new image
	after    [][]string // arguments of qemu-img then, before FILE
	l2cache  string
	journal  int  // records, of which the first quarter is there at once; 0: none
	tight    bool // the journal does not grow
	dataFile bool
	bitmaps  []string // granularities; the image is closed in the end, to store them
}

// A simOp is a request. Its times are positions in the record.
type simOp struct {
	id         int
	kind       byte // w write, z zero, d discard, f flush
	off, n     int64
	start, end int // end is never if it failed
}

const never = 1 << 60

// A simRead is what a request found in one sector.
type simRead struct {
	sector     int64
	value      uint64
	start, end int
}

type sim struct {
	kind    *simKind
	seed    uint64
	defects defects
	log     *storagetest.Log
	store   *storagetest.Recorder
	inject  storagetest.Injector  // what of the store fails besides what log does; nil: nothing
	data    *storagetest.Recorder // nil: no external data file
	backing []byte
	initial []byte        // what the disk read as before
	journal []byte        // nil: none
	bitmaps []crashBitmap // as they were

	mu     sync.Mutex
	ops    []*simOp
	sector [][]*simOp // which may have changed it
	reads  []simRead
	failed int // requests
}

// simBlank makes the image of a kind, once.
func simBlank(t testing.TB, k *simKind) []byte {
	simBlanks.Lock()
	defer simBlanks.Unlock()
	if b := simBlanks.m[k.name]; b != nil {
		return b
	}
	options := k.options
	if k.backing {
		back := filepath.Join(t.TempDir(), "back")
		if err := os.WriteFile(back, simBacking(k), 0o600); err != nil {
			t.Fatal(err)
		}
		options += ",backing_fmt=raw,backing_file=" + back
	}
	if k.dataFile {
		options += ",data_file=" + filepath.Join(t.TempDir(), "data")
	}
	file := qemu.Create(t, "qcow2", options, fmt.Sprint(k.size))
	if len(k.before) > 0 {
		qemu.IO(t, "qcow2", file, k.before...)
	}
	for _, args := range k.after {
		qemu.Img(t, append(args, file)...)
	}
	for i, g := range k.bitmaps {
		qemu.Img(t, "bitmap", "--add", "-g", g, file, fmt.Sprint("b", i))
	}
	if len(k.bitmaps) > 0 {
		qemu.Img(t, "bitmap", "--add", "--disable", file, "off")
		qemu.IO(t, "qcow2", file, "write -P 9 0 1k", fmt.Sprintf("write -P 9 %d 1k", k.size/2))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if k.device > 0 {
		dev := make([]byte, k.device)
		for i := range dev {
			dev[i] = 0xe5 // whatever was there before
		}
		copy(dev, b)
		b = dev
	}
	simBlanks.m[k.name] = b
	return b
}

var simBlanks = struct {
	sync.Mutex
	m map[string][]byte
}{m: map[string][]byte{}}

func newSim(t testing.TB, k *simKind, seed uint64, d defects) *sim {
	blank := simBlank(t, k)
	s := &sim{kind: k, seed: seed, defects: d, log: &storagetest.Log{Yield: k.workers > 1}}
	s.store = s.log.NewStore(blank, storage.Info{NewReadsZero: k.device == 0, FixedSize: k.device > 0})
	if k.backing {
		s.backing = simBacking(k)
	}
	if k.dataFile {
		s.data = s.log.NewStore(make([]byte, k.size), storage.Info{NewReadsZero: true})
		s.initial = crashJudge(blank, s.data.Bytes(), s.backing).guest
	} else {
		s.initial = crashJudge(blank, nil, s.backing).guest
	}
	if k.journal > 0 {
		s.journal = newJournalMemory(k.journal)
	}
	s.bitmaps = crashJudge(blank, make([]byte, k.size), s.backing).bitmaps
	s.sector = make([][]*simOp, k.size/sim512)
	return s
}

// simBacking returns a backing image that is shorter than the disk.
func simBacking(k *simKind) []byte {
	b := make([]byte, k.size*3/4/sim512*sim512)
	simFill(b, 1, 0)
	return b
}

func simWord(op int, sector int64) uint64 { return uint64(op)<<32 | uint64(sector) + 1 }

func simFill(p []byte, op int, off int64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], simWord(op, (off+int64(i))/sim512))
	}
}

// torn is the value of a sector that no request wrote.
const torn = ^uint64(0)

// simValue returns which request wrote a sector, 0 if it is zeros. A sector
// that the image had from the start has its own value.
func (s *sim) value(p []byte, sector int64) uint64 {
	w := binary.LittleEndian.Uint64(p)
	for i := 8; i < sim512; i += 8 {
		if binary.LittleEndian.Uint64(p[i:]) != w {
			return torn
		}
	}
	switch {
	case w == 0:
		return 0
	case int64(w&0xffffffff)-1 == sector:
		return w >> 32
	case bytes.Equal(p[:sim512], s.initial[sector*sim512:][:sim512]):
		return initialValue
	}
	return torn
}

const initialValue = 1 << 40

// newJournalMemory returns aligned memory.
func newJournalMemory(records int) []byte {
	words := make([]uint64, (journalHeader+records*recordSize)/8)
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
}

// A simStored is a note of what was stored in the memory of the journal.
type simStored struct {
	off int
	b   []byte
}

// open opens the image in a store as the sim does, and notes in log what
// happens to its journal.
func (s *sim) open(store, data storage.Store, journal []byte, log *storagetest.Log) (*Image, error) {
	opt := image.Options{Refs: simRefs{s.backing, data}, Unmap: true}
	if journal != nil {
		opt.Journal = journal[:max(journalHeader+s.kind.journal/4*recordSize, minJournal)]
		opt.GrowJournal = func() error {
			if s.kind.tight {
				return syscall.ENOSPC
			}
			return nil
		}
	}
	if s.kind.l2cache != "" {
		opt.Params = []image.Param{{Key: "l2-cache-size", Value: s.kind.l2cache}}
	}
	return open(context.Background(), store, opt, &hooks{
		defects: s.defects,
		stored:  func(off int, b []byte) { log.Note(simStored{off, bytes.Clone(b)}) },
	})
}

// simRefs opens the backing image, bytes in memory, and the data file.
type simRefs struct {
	backing []byte
	data    storage.Store
}

func (r simRefs) OpenImage(ctx context.Context, _ image.Reference) (image.Device, error) {
	return raw.Format().Open(ctx, storagetest.MemOf(r.backing), image.Options{ReadOnly: true})
}

func (r simRefs) OpenStore(context.Context, image.Reference, bool) (storage.Store, error) {
	return r.data, nil
}

// begin enters a request in the record.
func (s *sim) begin(kind byte, off, n int64) *simOp {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := &simOp{id: len(s.ops) + 2, kind: kind, off: off, n: n, end: never}
	s.ops = append(s.ops, o)
	o.start = s.log.Note(o)
	for i := off / sim512; i < (off+n)/sim512; i++ {
		s.sector[i] = append(s.sector[i], o)
	}
	return o
}

func (s *sim) end(o *simOp, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.log.Note(o)
	if err == nil {
		o.end = at
	} else {
		s.failed++
	}
}

// run carries out the workload, and leaves the image as it is after a last
// flush, without closing it.
func (s *sim) run() error {
	store := storagetest.Fault(s.store, nil)
	im, err := s.open(store, s.data, s.journal, s.log)
	if err != nil {
		return err
	}
	store.Inject(s.inject)
	var wg sync.WaitGroup
	for w := range s.kind.workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(s.seed, uint64(w)))
			for range s.kind.ops / s.kind.workers {
				s.request(im, r)
			}
		})
	}
	wg.Wait()
	o := s.begin('f', 0, 0)
	if len(s.kind.bitmaps) > 0 {
		s.end(o, im.writer.close())
	} else {
		s.end(o, im.Flush())
		im.writer.commit.stop()
	}
	im.mapping.close()
	return nil
}

func (s *sim) request(im *Image, r *rand.Rand) {
	cs := im.geo.clusterSize
	unit := max(cs, 2048)
	limit := s.kind.size
	if r.IntN(4) > 0 {
		limit = s.kind.hot
	}
	at := func(n int64) (int64, int64) {
		off := r.Int64N(limit/sim512) * sim512
		return off, min(n, s.kind.size-off)
	}
	sectors := func(max int64) int64 { return (r.Int64N(max/sim512) + 1) * sim512 }
	switch k := r.IntN(100); {
	case k < 55:
		off, n := at(sectors(3 * unit))
		if r.IntN(3) == 0 {
			n = min(cs*(1+r.Int64N(3)), s.kind.size-off)
		}
		if r.IntN(3) == 0 {
			off = off / cs * cs
		}
		b := make([]byte, n)
		o := s.begin('w', off, n)
		simFill(b, o.id, off)
		s.end(o, im.WriteAt(b, off, 0))
	case k < 66:
		off, n := at(sectors(2 * unit))
		o := s.begin('z', off, n)
		s.end(o, im.WriteZeroes(off, n, image.WriteFlags(r.IntN(2))*image.MayUnmap))
	case k < 78:
		off := r.Int64N(max(limit/cs, 1)) * cs
		n := min(cs*(1+r.Int64N(4)), s.kind.size-off)
		o := s.begin('d', off, n)
		s.end(o, im.Discard(off, n))
	case k < 92:
		off, n := at(sectors(3 * unit))
		b := make([]byte, n)
		start := s.log.Len()
		if _, err := im.ReadAt(b, off); err != nil {
			s.mu.Lock()
			s.failed++
			s.mu.Unlock()
			return
		}
		end := s.log.Len()
		s.mu.Lock()
		defer s.mu.Unlock()
		for i := int64(0); i < n; i += sim512 {
			sec := (off + i) / sim512
			s.reads = append(s.reads, simRead{sec, s.value(b[i:], sec), start, end})
		}
	default:
		o := s.begin('f', 0, 0)
		s.end(o, im.Flush())
	}
}

// legal reports whether a sector may hold a value at position p of the record,
// if all that was answered before position floor counts as done.
func (s *sim) legal(sector int64, value uint64, floor, p int) bool {
	if value == torn {
		return false
	}
	last := -1
	for _, o := range s.sector[sector] {
		if o.end < floor && o.start > last && o.kind != 'd' {
			last = o.start
		}
	}
	// A discard leaves what was there or zeros, so it replaces nothing.
	if last < 0 && value == s.value(s.initial[sector*sim512:], sector) {
		return true
	}
	for _, o := range s.sector[sector] {
		if o.start < p && o.end >= last {
			v := uint64(0)
			if o.kind == 'w' {
				v = uint64(o.id)
			}
			if v == value {
				return true
			}
		}
	}
	return false
}

// illegal says what is wrong with the contents of the disk, "" if nothing is.
func (s *sim) illegal(guest []byte, floor, p int) string {
	for sec := range int64(len(guest)) / sim512 {
		if v := s.value(guest[sec*sim512:], sec); !s.legal(sec, v, floor, p) {
			return fmt.Sprintf("guest sector %d holds %d (%x) at %d, floor %d", sec, int64(v), guest[sec*sim512:][:8], p, floor)
		}
	}
	return ""
}

// floor returns the position before which everything that was answered has to
// have survived a power cut at p.
func (s *sim) floor(p int) int {
	f := 0
	for _, o := range s.ops {
		if o.kind == 'f' && o.end < p && o.start > f {
			f = o.start
		}
	}
	return f
}

// A simTally counts what was looked at.
type simTally struct {
	cuts, reads, leaky, judged int
	kills, killCuts            int // takeovers, and power cuts during them
}

func (t *simTally) add(more *simTally) {
	t.cuts += more.cuts
	t.reads += more.reads
	t.leaky += more.leaky
	t.judged += more.judged
	t.kills += more.kills
	t.killCuts += more.killCuts
}

// verify looks at a share of the crash points, and returns what is wrong with
// the first that is. At some it kills the process instead, and lets another
// take over.
func (s *sim) verify(points, kills int, tally *simTally) error {
	r := rand.New(rand.NewPCG(s.seed, 99))
	for _, o := range s.reads {
		tally.reads++
		if !s.legal(o.sector, o.value, o.start, o.end+1) {
			return fmt.Errorf("a read between %d and %d found %d in sector %d", o.start, o.end, int64(o.value), o.sector)
		}
	}
	events := s.log.Events()
	disk := s.log.NewDisk(r)
	var memory []byte
	killAt := map[int]bool{}
	if s.journal != nil {
		memory = newJournalMemory(s.kind.journal)
		for range kills {
			killAt[r.IntN(len(events))] = true
		}
	}
	each := max(float64(len(events))/float64(points), 0.5)
	next := 0.0
	for i := 0; i <= len(events); i++ {
		if i > 0 {
			disk.Step(events[i-1])
			if n, ok := events[i-1].Note.(simStored); ok {
				copy(memory[n.off:], n.b)
			}
		}
		for ; next <= float64(i); next += each {
			tally.cuts++
			leaky, err := s.cut(disk, s.floor(i), i)
			if err != nil {
				return fmt.Errorf("power cut at %d of %d: %w", i, len(events), err)
			}
			if leaky {
				tally.leaky++
			}
		}
		if killAt[i] {
			if err := s.kill(disk, memory, i, r, tally, true); err != nil {
				return fmt.Errorf("killed at %d of %d: %w", i, len(events), err)
			}
		}
	}
	return nil
}

// cut looks at one image that a power cut may leave.
func (s *sim) cut(disk *storagetest.Disk, floor, p int) (leaky bool, err error) {
	left := disk.Crash()
	var data []byte
	if s.data != nil {
		data = left[1]
	}
	v := crashJudge(left[0], data, s.backing)
	if len(v.corrupt) > 0 {
		return false, errors.New(v.corrupt[0])
	}
	if w := s.illegal(v.guest, floor, p); w != "" {
		return false, errors.New(w)
	}
	if w := s.illegalBitmap(&v); w != "" {
		return false, errors.New(w)
	}
	return v.leaks > 0, nil
}

// illegalBitmap says what is wrong with the bitmaps, "" if nothing is: one that
// is not in use has a bit for every change that is there, and for no other. That
// the header vouches for none is not right either: one of them is not touched.
func (s *sim) illegalBitmap(v *crashVerdict) string {
	if len(s.kind.bitmaps) == 0 {
		return ""
	}
	if len(v.bitmaps) != len(s.kind.bitmaps)+1 {
		return fmt.Sprintf("%d bitmaps", len(v.bitmaps))
	}
	for i, b := range v.bitmaps {
		first := s.bitmaps[i]
		if first.flags&bitmapAuto == 0 {
			if b.flags != first.flags || !bytes.Equal(b.bits, first.bits) {
				return fmt.Sprintf("bitmap %d was touched", i)
			}
			continue
		}
		if b.flags&bitmapInUse != 0 {
			continue
		}
		set := func(bits []byte, k uint64) bool { return bits[k/8]>>(k%8)&1 != 0 }
		may := bytes.Clone(first.bits) // and what was asked for
		for _, o := range s.ops {
			for at := uint64(o.off); at < uint64(o.off+o.n); at += sim512 {
				k := at / b.granularity
				may[k/8] |= 1 << (k % 8)
			}
		}
		for k := range (uint64(len(v.guest))-1)/b.granularity + 1 {
			if set(b.bits, k) && !set(may, k) {
				return fmt.Sprintf("bitmap %d: bit %d is set", i, k)
			}
			if set(first.bits, k) && !set(b.bits, k) {
				return fmt.Sprintf("bitmap %d: bit %d is gone", i, k)
			}
		}
		for at := uint64(0); at < uint64(len(v.guest)); at += sim512 {
			if !set(b.bits, at/b.granularity) && !bytes.Equal(v.guest[at:at+sim512], s.initial[at:at+sim512]) {
				return fmt.Sprintf("bitmap %d does not have the change at %#x", i, at)
			}
		}
	}
	return ""
}

// kill ends the process at position p and lets another one take over: what
// was acknowledged is there. Then it cuts the power at every step of the
// takeover, and kills that too, once.
func (s *sim) kill(disk *storagetest.Disk, memory []byte, p int, r *rand.Rand, tally *simTally, again bool) error {
	tally.kills++
	log := new(storagetest.Log)
	store := log.NewStore(disk.Cache(0), s.store.Info())
	var data *storagetest.Recorder
	if s.data != nil {
		data = log.NewStore(disk.Cache(1), s.data.Info())
	}
	journal := newJournalMemory(s.kind.journal)
	copy(journal, memory)
	im, err := s.open(store, data, journal, log)
	if err != nil {
		return fmt.Errorf("takeover: %w", err)
	}
	taken := log.Len()
	guest := make([]byte, s.kind.size)
	_, err = im.ReadAt(guest, 0)
	im.writer.commit.stop()
	im.mapping.close()
	if err != nil {
		return err
	}
	if w := s.illegal(guest, p, p); w != "" {
		return fmt.Errorf("taken over: %s", w)
	}
	var bytesOfData []byte
	if data != nil {
		bytesOfData = data.Bytes()
	}
	if v := crashJudge(store.Bytes(), bytesOfData, s.backing); len(v.corrupt) > 0 {
		return fmt.Errorf("taken over: %s", v.corrupt[0])
	}
	events := log.Events()
	during := disk.Fork()
	second := r.IntN(len(events) + 1)
	memory = bytes.Clone(memory)
	floor, synced := s.floor(p), false
	aligned := newJournalMemory(s.kind.journal)
	for i := 0; i <= len(events); i++ {
		if i > 0 {
			during.Step(events[i-1])
			if n, ok := events[i-1].Note.(simStored); ok {
				copy(memory[n.off:], n.b)
			}
			synced = synced || events[i-1].Kind == storagetest.EventSyncEnd
		}
		if i >= taken && synced {
			floor = p // what was in the journal is durable, and so is the data
		}
		tally.killCuts++
		if _, err := s.cut(during, floor, p); err != nil {
			return fmt.Errorf("power cut at %d of %d of the takeover: %w", i, len(events), err)
		}
		if again && i == second {
			copy(aligned, memory)
			if err := s.kill(during, aligned, p, r, tally, false); err != nil {
				return fmt.Errorf("killed again at %d of %d of the takeover: %w", i, len(events), err)
			}
		}
	}
	return nil
}

// judgeByQEMU lets qemu-img look at what the store holds at the end.
func (s *sim) judgeByQEMU(t testing.TB, tally *simTally) {
	if s.data != nil {
		return // it is not where the image says
	}
	img := s.store.Bytes()
	file := filepath.Join(t.TempDir(), "crash.qcow2")
	if err := os.WriteFile(file, img, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(qemu.Require(t, "qemu-img"), "check", "-f", "qcow2", file).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) { // 3: leaks
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
	tally.judged++
}
