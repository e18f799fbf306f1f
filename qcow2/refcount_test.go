package qcow2

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A block whose own count is in a block that is not linked durably has to
// wait: after a power cut its link could be there and the other's not.
func TestBlocksWaitForTheirCounters(t *testing.T) {
	s := memImage(t, "cluster_size=512,refcount_bits=64", "1M", 0)
	h, err := parseHeader(s.Bytes()[:512])
	if err != nil {
		t.Fatal(err)
	}
	g := newGeometry(h)
	r, err := openRefcounts(s, g, int64(h.refTableOffset), int64(h.refTableClusters), 1<<40, new(defects))
	if err != nil {
		t.Fatal(err)
	}
	r.tables = new(tableGuard)
	first := r.covered(0) // nothing from here on has a count
	a := newAllocator(first, first, first)
	i := first >> g.refBlockBits
	if made, err := r.makeBlock(a, i); !made || err != nil {
		t.Fatalf("a block that counts itself: %v, %v", made, err)
	}
	if made, err := r.makeBlock(a, i+1); made || err != nil {
		t.Fatalf("a block counted by one that is not linked: %v, %v", made, err)
	}
	b := r.cut()
	if made, err := r.makeBlock(a, i+1); made || err != nil {
		t.Fatalf("while its counter is in a batch: %v, %v", made, err)
	}
	r.settle(&b, true)
	if made, err := r.makeBlock(a, i+1); !made || err != nil {
		t.Fatalf("after that was durable: %v, %v", made, err)
	}
}

// The last count that is not zero is found wherever it lies in its block.
func TestLastUsed(t *testing.T) {
	const cluster = 512
	for order := range uint(7) {
		g := &geometry{clusterBits: 9, clusterSize: cluster, refcountOrder: order, refBlockBits: 12 - order}
		perBlock := int64(1) << g.refBlockBits
		for last := int64(-1); last < perBlock; last++ {
			b := make([]byte, 2*cluster)
			if last >= 0 {
				setRefcount(b[cluster:], last, order, 1)
			}
			r := &refcounts{store: storagetest.MemOf(b), g: g, table: []refTableEntry{cluster, 0}}
			if got, err := r.lastUsed(0); err != nil || got != last+1 {
				t.Fatalf("order %d, cluster %d: got %d, %v", order, last, got, err)
			}
		}
	}
}

// A takeover that looks for room passes over counts that cannot be read, and says
// so if there is no room elsewhere.
func TestGapBehindUnreadableCounts(t *testing.T) {
	const cluster, perBlock = 512, 256
	g := &geometry{clusterBits: 9, clusterSize: cluster, refcountOrder: 4, refBlockBits: 8}
	for gap, want := range map[int64]error{
		-1:             syscall.EIO, // nowhere
		5:              syscall.EIO, // where it cannot be seen
		perBlock + 77:  nil,
		2*perBlock - 1: nil,
	} {
		counts := bytes.Repeat([]byte{0, 1}, 2*perBlock)
		if gap >= 0 && gap < 2*perBlock {
			counts[2*gap+1] = 0
		}
		s := storagetest.Fault(storagetest.MemOf(append(make([]byte, cluster), counts...)), nil)
		s.Inject(storagetest.Within(storagetest.OpRead, cluster, cluster, storagetest.Failure{Err: syscall.EIO}))
		tables := new(tableGuard)
		refs := &refcounts{
			store: s, g: g, end: 3 * perBlock, tables: tables, table: []refTableEntry{cluster, 2 * cluster, 0},
			sectors: map[int64]*countSector{}, blank: map[int64]bool{}, unknown: map[int64]bool{}, late: map[int64]map[int64]bool{},
		}
		a := newAllocator(3*perBlock, 3*perBlock, 3*perBlock)
		takeover := &takeover{writer: &writer{alloc: a, tables: tables, commit: &committer{refs: refs}}, used: map[int64]bool{}}
		for c := range int64(perBlock) {
			takeover.used[2*perBlock+c] = true
		}
		err := takeover.coverWithin(2)
		if !errors.Is(err, want) || want == nil && refs.table[2].host() != gap*cluster {
			t.Errorf("room at %d: the block is made at %#x, %v", gap, refs.table[2].host(), err)
		}
	}
}

// A zeroStore is empty, and counts what is read of it.
type zeroStore struct {
	storage.Store
	read int64
}

func (s *zeroStore) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	s.read += int64(len(p))
	return len(p), nil
}

// However many counts are zero, few are read to find the last one that is not.
// Clusters that were not looked at count as used.
func TestLastUsedReadsLittle(t *testing.T) {
	for _, blocks := range []int64{1, 31, 32, 33, 1 << 17} {
		s := new(zeroStore)
		g := &geometry{clusterBits: 21, clusterSize: 2 << 20, refcountOrder: 4, refBlockBits: 20}
		r := &refcounts{store: s, g: g, table: make([]refTableEntry, blocks)}
		for i := range r.table {
			r.table[i] = refTableEntry(i+1) << 21
		}
		got, err := r.lastUsed(5)
		if want := max(5, (blocks-32)<<20); err != nil || got != want {
			t.Errorf("%d blocks: got %d, %v, want %d", blocks, got, err, want)
		}
		if s.read > 64<<20 {
			t.Errorf("%d blocks: %d bytes were read", blocks, s.read)
		}
	}
}
