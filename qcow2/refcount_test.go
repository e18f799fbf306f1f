package qcow2

import "testing"

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
