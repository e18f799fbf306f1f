package qcow2

import (
	"math/rand/v2"
	"testing"
)

// Whatever is taken and given back, no cluster is handed out twice, none past
// the limit, and the changes of counts add up to what is held.
func TestAllocatorRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	a := newAllocator(10, 2000, 10)
	held := map[int64]bool{}
	var runs []hostRun
	written := map[int64]bool{}
	counts := map[int64]int64{}
	for range 20000 {
		if len(runs) > 0 && r.IntN(2) == 0 {
			i := r.IntN(len(runs))
			give := runs[i]
			if keep := r.Int64N(give.n); keep > 0 { // only its end
				runs[i].n = keep
				give = hostRun{give.first + keep, give.n - keep}
			} else {
				runs[i] = runs[len(runs)-1]
				runs = runs[:len(runs)-1]
			}
			for c := give.first; c < give.end(); c++ {
				delete(held, c)
			}
			a.give(give)
		} else if run, fresh, ok := a.take(1 + r.Int64N(20)); ok {
			for c := run.first; c < run.end(); c++ {
				if held[c] || c < 10 || c >= 2000 || fresh && written[c] {
					t.Fatalf("cluster %d handed out: held %v, fresh %v, written %v", c, held[c], fresh, written[c])
				}
				held[c], written[c] = true, true
			}
			runs = append(runs, run)
		}
		if r.IntN(100) == 0 {
			changes, _, _ := a.takeChanges()
			for _, ch := range changes {
				for c := ch.first; c < ch.end(); c++ {
					if counts[c] += ch.delta; counts[c] != 0 && counts[c] != 1 {
						t.Fatalf("cluster %d has count %d", c, counts[c])
					}
				}
			}
			for c := int64(10); c < 2000; c++ {
				if (counts[c] == 1) != held[c] {
					t.Fatalf("cluster %d: count %d, held %v", c, counts[c], held[c])
				}
			}
		}
	}
	for i := 1; i < len(a.free); i++ {
		if a.free[i-1].end() >= a.free[i].first {
			t.Errorf("free runs %v and %v", a.free[i-1], a.free[i])
		}
	}
}

func TestAllocatorDry(t *testing.T) {
	a := newAllocator(5, 8, 5)
	if r, fresh, ok := a.take(10); !ok || !fresh || r != (hostRun{5, 3}) {
		t.Errorf("got %v, %v, %v", r, fresh, ok)
	}
	if _, _, ok := a.take(1); ok {
		t.Error("handed out a cluster that has no refcount block")
	}
	a.give(hostRun{6, 1})
	if r, fresh, ok := a.take(10); !ok || fresh || r != (hostRun{6, 1}) {
		t.Errorf("after giving back: %v, fresh %v, %v", r, fresh, ok)
	}
}
