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

// A role says what the references to a cluster are.
type role uint8

const (
	roleNone  role = iota
	roleTable      // of L1 tables to an L2 table, however many
	roleOther      // one that is none of those
	roleMixed      // several, not all of them to an L2 table
)

// A roleMap knows the roles of clusters, in two bits each. Nil knows nothing.
type roleMap struct {
	pages map[int64]*[1 << (tallyBits - 2)]uint8
}

func newRoleMap() *roleMap {
	return &roleMap{pages: make(map[int64]*[1 << (tallyBits - 2)]uint8)}
}

func (m *roleMap) get(cluster int64) role {
	if m == nil || m.pages[cluster>>tallyBits] == nil {
		return roleNone
	}
	k := cluster & (1<<tallyBits - 1)
	return role(m.pages[cluster>>tallyBits][k/4] >> (k % 4 * 2) & 3)
}

// add adds a reference.
func (m *roleMap) add(cluster int64, r role) {
	if m == nil {
		return
	}
	p := m.pages[cluster>>tallyBits]
	if p == nil {
		p = new([1 << (tallyBits - 2)]uint8)
		m.pages[cluster>>tallyBits] = p
	}
	if was := m.get(cluster); was != roleNone && (was != roleTable || r != roleTable) {
		r = roleMixed
	}
	k := cluster & (1<<tallyBits - 1)
	p[k/4] = p[k/4]&^(3<<(k%4*2)) | uint8(r)<<(k%4*2)
}
