package qcow2

// A tally counts references to clusters, in a byte each: 16 MiB for 1 TiB of
// clusters of 64 KiB. Counts that need more are rare and kept aside; stretches
// of 4096 clusters without any reference take no memory.
type tally struct {
	pages [][]uint8
	large map[int64]uint64 // counts of 255 and more
}

const (
	tallyBits = 12
	tallyFull = 255
)

func newTally(clusters int64) *tally {
	t := &tally{large: make(map[int64]uint64)}
	t.grow(clusters)
	return t
}

// grow makes room for clusters below n.
func (t *tally) grow(n int64) {
	if pages := (n + 1<<tallyBits - 1) >> tallyBits; pages > int64(len(t.pages)) {
		t.pages = append(t.pages, make([][]uint8, pages-int64(len(t.pages)))...)
	}
}

// get returns the count of a cluster, 0 if there is no room for it.
func (t *tally) get(cluster int64) uint64 {
	i := cluster >> tallyBits
	if i < 0 || i >= int64(len(t.pages)) || t.pages[i] == nil {
		return 0
	}
	if n := t.pages[i][cluster&(1<<tallyBits-1)]; n < tallyFull {
		return uint64(n)
	}
	return t.large[cluster]
}

// set sets the count of a cluster that there is room for.
func (t *tally) set(cluster int64, n uint64) {
	p := &t.pages[cluster>>tallyBits]
	if *p == nil {
		if n == 0 {
			return
		}
		*p = make([]uint8, 1<<tallyBits)
	}
	b := &(*p)[cluster&(1<<tallyBits-1)]
	if *b == tallyFull {
		delete(t.large, cluster)
	}
	if *b = uint8(min(n, tallyFull)); n >= tallyFull {
		t.large[cluster] = n
	}
}

// skip returns the first cluster from k on that may have a reference.
func (t *tally) skip(k int64) int64 {
	i := k >> tallyBits
	for i < int64(len(t.pages)) && t.pages[i] == nil {
		i++
	}
	return max(k, i<<tallyBits)
}
