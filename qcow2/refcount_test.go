package qcow2

import (
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
