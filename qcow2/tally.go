package qcow2

import "slices"

// A page holds a small number for each of 4096 clusters. Few that are not 0 are
// kept as records of three bytes, an index and the number, so that an image does
// not take much more memory than its tables have bytes; otherwise it is dense,
// which is up to its user.
type page []uint8

const (
	pageBits  = 12
	sparseMax = 64 * 3 // bytes
)

// dense reports whether the page has no records.
func (p page) dense() bool { return len(p) > sparseMax }

// find returns where the record of cluster i is among ascending ones, or is to
// be. Most come in that order.
func (p page) find(i int64) (at int, found bool) {
	for at = len(p); at > 0; at -= 3 {
		if k := int64(p[at-3]) | int64(p[at-2])<<8; k <= i {
			if k == i {
				return at - 3, true
			}
			break
		}
	}
	return at, false
}

// number returns the number of cluster i in a page of records.
func (p page) number(i int64) uint8 {
	if at, found := p.find(i); found {
		return p[at+2]
	}
	return 0
}

// set sets the number of cluster i in a page of records. It returns false if
// there is no room for it.
func (p *page) set(i int64, n uint8) bool {
	at, found := p.find(i)
	switch {
	case found:
		(*p)[at+2] = n
	case n == 0:
	case len(*p) == sparseMax:
		return false
	default:
		*p = slices.Insert(*p, at, uint8(i), uint8(i>>8), n)
	}
	return true
}

// records calls yield for each record.
func (p page) records(yield func(i int64, n uint8) bool) {
	for ; len(p) > 0 && yield(int64(p[0])|int64(p[1])<<8, p[2]); p = p[3:] {
	}
}

// A tally counts references to clusters, in a byte each: 16 MiB for 1 TiB of
// clusters of 64 KiB. Counts that need more are rare and kept aside; stretches
// of 4096 clusters with few references take little memory, or none.
type tally struct {
	pages []page
	large map[int64]uint64 // counts of 255 and more
}

const tallyFull = 255

func newTally(clusters int64) *tally {
	t := &tally{large: make(map[int64]uint64)}
	t.grow(clusters)
	return t
}

// grow makes room for clusters below n.
func (t *tally) grow(n int64) {
	if pages := (n + 1<<pageBits - 1) >> pageBits; pages > int64(len(t.pages)) {
		t.pages = append(t.pages, make([]page, pages-int64(len(t.pages)))...)
	}
}

// get returns the count of a cluster, 0 if there is no room for it.
func (t *tally) get(cluster int64) uint64 {
	i := cluster >> pageBits
	if i < 0 || i >= int64(len(t.pages)) {
		return 0
	}
	n, p := uint8(0), t.pages[i]
	if k := cluster & (1<<pageBits - 1); p.dense() {
		n = p[k]
	} else {
		n = p.number(k)
	}
	if n < tallyFull {
		return uint64(n)
	}
	return t.large[cluster]
}

// set sets the count of a cluster that there is room for.
func (t *tally) set(cluster int64, n uint64) {
	if n >= tallyFull {
		t.large[cluster] = n
	} else if len(t.large) > 0 {
		delete(t.large, cluster)
	}
	k, p := cluster&(1<<pageBits-1), &t.pages[cluster>>pageBits]
	b := uint8(min(n, tallyFull))
	if !p.dense() && !p.set(k, b) {
		dense := make(page, 1<<pageBits)
		for i, n := range p.records {
			dense[i] = n
		}
		*p = dense
	}
	if p.dense() {
		(*p)[k] = b
	}
}

// skip returns the first cluster from k on that may have a reference.
func (t *tally) skip(k int64) int64 {
	i := k >> pageBits
	for i < int64(len(t.pages)) && t.pages[i] == nil {
		i++
	}
	return max(k, i<<pageBits)
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
	pages map[int64]page
}

func newRoleMap() *roleMap { return &roleMap{pages: make(map[int64]page)} }

func (m *roleMap) get(cluster int64) role {
	if m == nil {
		return roleNone
	}
	p := m.pages[cluster>>pageBits]
	k := cluster & (1<<pageBits - 1)
	if p.dense() {
		return role(p[k/4] >> (k % 4 * 2) & 3)
	}
	return role(p.number(k))
}

// add adds a reference.
func (m *roleMap) add(cluster int64, r role) {
	if m == nil {
		return
	}
	if was := m.get(cluster); was != roleNone && (was != roleTable || r != roleTable) {
		r = roleMixed
	}
	p := m.pages[cluster>>pageBits]
	k := cluster & (1<<pageBits - 1)
	set := func(p page, k int64, r role) { p[k/4] = p[k/4]&^(3<<(k%4*2)) | uint8(r)<<(k%4*2) }
	switch {
	case p.dense():
		set(p, k, r)
	case p.set(k, uint8(r)):
		m.pages[cluster>>pageBits] = p
	default:
		dense := make(page, 1<<(pageBits-2))
		for i, n := range p.records {
			set(dense, i, role(n))
		}
		set(dense, k, r)
		m.pages[cluster>>pageBits] = dense
	}
}
