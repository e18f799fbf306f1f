package qcow2

import (
	"testing"

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
