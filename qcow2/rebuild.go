package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/imgnbd/imgnbd/image"
)

// rebuild makes the refcounts of a dirty image, and the copied flags that
// follow from them, from the references that there are. The dirty bit is taken
// off last, so a rebuild that is cut short is begun again.
func (im *Image) rebuild(ctx context.Context) error {
	var found []string
	c := &checker{im: im, ctx: ctx, blockNo: -1, opt: image.CheckOptions{Report: func(f image.Finding) {
		if !f.Leak {
			found = append(found, f.Text)
		}
	}}}
	l1, _, err := c.references()
	if err == nil && len(found) > 0 {
		err = &image.Hint{Err: corrupt("%s", found[0]), Advice: "run qemu-img check -r all on it, or open it read-only"}
	}
	if err == nil {
		err = im.storeCounts(c)
	}
	if err == nil {
		err = im.storeCopied(c, l1)
	}
	if err == nil {
		err = clearDirty(im)
	}
	if err != nil {
		return fmt.Errorf("rebuilding the refcounts of an image that was not closed properly: %w", err)
	}
	return nil
}

// storeCounts makes each refcount the number of references.
func (im *Image) storeCounts(c *checker) error {
	g := im.geo
	end := int64(1) << (56 - g.clusterBits)
	if im.store.Info().FixedSize {
		end = c.size >> g.clusterBits
	}
	refs, err := openRefcounts(im.store, g, int64(c.h.refTableOffset), int64(c.h.refTableClusters), end, new(defects))
	if err != nil {
		return err
	}
	refs.remade = true
	// First those that have a place.
	var homeless []int64
	for k := int64(0); k < max(c.clusters, refs.coverable()); k++ {
		n := c.refs.get(k)
		switch blk := k >> g.refBlockBits; {
		case blk < int64(len(refs.table)) && refs.table[blk] != 0:
			if err := refs.put(k, n); err != nil {
				return err
			}
		case n > 0:
			homeless = append(homeless, k)
		}
		if len(refs.dirty) >= maxCountSectors {
			if err := refs.writeCounts(); err != nil {
				return err
			}
		}
	}
	a := newAllocator(c.clusters, c.clusters, c.clusters)
	a.limit = max(a.tail, refs.covered(a.tail))
	for _, k := range homeless {
		if err := refs.cover(a, k); err != nil {
			return err
		}
		if err := refs.put(k, c.refs.get(k)); err != nil {
			return err
		}
	}
	b := refs.cut()
	if err := refs.writeCounts(); err != nil {
		return err
	}
	if err := im.store.Sync(); err != nil {
		return err
	}
	if err := refs.link(&b, im.store.Sync); err != nil {
		return err
	}
	return im.store.Sync()
}

// put makes the count of c what it should be.
func (r *refcounts) put(c int64, n uint64) error {
	s, err := r.sector(c)
	if err != nil {
		return err
	}
	i := c % r.perSector()
	if n > maxRefcount(r.g.refcountOrder) {
		return corrupt("host cluster %#x has %d references, more than can be counted", c<<r.g.clusterBits, n)
	}
	if refcount(s.data[:], i, r.g.refcountOrder) == n {
		return nil
	}
	setRefcount(s.data[:], i, r.g.refcountOrder, n)
	r.soil(c, s)
	return nil
}

// storeCopied sets the copied flags of the active tables where there is one
// reference, and clears them elsewhere.
func (im *Image) storeCopied(c *checker, l1 []uint64) error {
	g := im.geo
	flag := func(w uint64, host int64) uint64 {
		w &^= flagCopied
		if g.dataFile || c.refs.get(host>>g.clusterBits) == 1 {
			w |= flagCopied
		}
		return w
	}
	for i, w := range l1 {
		host := l1Entry(w).host()
		if host == 0 {
			continue
		}
		now := w &^ flagCopied
		if c.refs.get(host>>g.clusterBits) == 1 {
			now |= flagCopied
		}
		if now != w {
			var b [8]byte
			binary.BigEndian.PutUint64(b[:], now)
			if err := im.store.WriteAt(b[:], int64(c.h.l1Offset)+int64(i)*8, 0); err != nil {
				return fmt.Errorf("L1 table at %#x: %w", c.h.l1Offset, err)
			}
			im.mapping.l1[i].Store(now)
		}
		t, err := c.table(l1, i)
		if err != nil {
			return fmt.Errorf("L2 table at %#x: %w", host, err)
		}
		changed := false
		for j := range len(t) / 8 / int(g.entryWords) {
			e, _ := entryOf(t, j, g.entryWords)
			if kind := g.kind(e); kind != clusterData && kind != clusterZeroAlloc {
				continue
			}
			if now := flag(uint64(e), e.host()); now != uint64(e) {
				binary.BigEndian.PutUint64(t[j*8*int(g.entryWords):], now)
				changed = true
			}
		}
		if changed {
			if err := im.store.WriteAt(t, host, 0); err != nil {
				return fmt.Errorf("L2 table at %#x: %w", host, err)
			}
		}
	}
	return im.store.Sync()
}

// clearDirty takes the dirty bit off, durably.
func clearDirty(im *Image) error {
	var b [8]byte
	if _, err := im.store.ReadAt(b[:], 72); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])&^uint64(incompatDirty))
	if err := im.store.WriteAt(b[:], 72, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return im.store.Sync()
}
