package qcow2

import (
	"encoding/binary"
	"fmt"
	"iter"
	"syscall"
)

// refTableSpan yields the clusters of the refcount table.
func (h *header) refTableSpan() iter.Seq[int64] {
	first := int64(h.refTableOffset >> h.clusterBits)
	return func(yield func(int64) bool) {
		for k := first; k < first+int64(h.refTableClusters) && h.checkRefTable() == nil; k++ {
			if !yield(k) {
				return
			}
		}
	}
}

// rebuild makes a new refcount table with new blocks, where nothing refers to.
// The old ones stay as they are until the header names the new table, which
// counts them as free. errors is how many parts could not be checked for other
// reasons than the old structure.
func (c *checker) rebuild(errors int64) error {
	g := c.g
	c.report(false, "Rebuilding refcount structure")
	leaks := c.res.Leaks
	c.old, c.anew = c.roles, true
	if err := c.recount(); err != nil {
		return err
	}
	c.anew = false
	c.res.LeaksFixed += leaks
	c.res.CheckErrors = errors

	first, tableClusters, groups, err := c.place()
	if err != nil {
		return err
	}
	n := tableClusters + int64(len(groups))
	c.count(first<<g.clusterBits, n<<g.clusterBits, roleOther)
	c.refTable = make([]uint64, tableClusters<<(g.clusterBits-3))
	block := make([]byte, g.clusterSize)
	for i, group := range groups {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		at := (first + tableClusters + int64(i)) << g.clusterBits
		c.refTable[group] = uint64(at)
		clear(block)
		for k := range int64(1) << g.refBlockBits {
			refs := c.refs.get(group<<g.refBlockBits + k)
			if refs == 0 {
				continue
			}
			setRefcount(block, k, g.refcountOrder, refs)
			c.last = max(c.last, group<<g.refBlockBits+k)
		}
		if err := c.store.WriteAt(block, at, 0); err != nil {
			return fmt.Errorf("new refcount block at %#x: %w", at, err)
		}
	}
	b := make([]byte, 0, tableClusters<<g.clusterBits)
	for _, w := range c.refTable {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	if err := c.store.WriteAt(b, first<<g.clusterBits, 0); err != nil {
		return fmt.Errorf("new refcount table at %#x: %w", first<<g.clusterBits, err)
	}
	c.h.refTableOffset, c.h.refTableClusters = uint64(first)<<g.clusterBits, uint32(tableClusters)
	c.broken = false
	c.forget()
	return c.switchHeader(40, 20) // with the L1 table, which may be new too
}

// place finds room for a refcount table and the blocks behind it. groups are
// the blocks by number: those with references, and those that count the new
// structure itself.
func (c *checker) place() (first, tableClusters int64, groups []int64, err error) {
	g := c.g
	used := c.groups()
	tail, size := c.tail, c.size
	for n := int64(1); ; {
		c.tail, c.size = tail, size
		if first, err = c.alloc(n); err != nil {
			return 0, 0, nil, err
		}
		own, end := first>>g.refBlockBits, (first+n-1)>>g.refBlockBits
		groups = groups[:0]
		for _, group := range used {
			for ; own <= end && own < group; own++ {
				groups = append(groups, own)
			}
			if own == group {
				own++
			}
			groups = append(groups, group)
		}
		for ; own <= end; own++ {
			groups = append(groups, own)
		}
		entries := groups[len(groups)-1] + 1
		if entries > maxRefTableSize/8 {
			return 0, 0, nil, fmt.Errorf("a refcount table of %d entries: %w", entries, syscall.EFBIG)
		}
		tableClusters = g.clusters(entries * 8)
		need := tableClusters + int64(len(groups))
		if need <= n {
			return first, n - int64(len(groups)), groups, nil
		}
		n = need
	}
}

// groups returns the numbers of the refcount blocks that have something to
// count, ascending.
func (c *checker) groups() (list []int64) {
	for k := c.refs.skip(0); k < c.clusters; k = c.refs.skip(k + 1) {
		if c.refs.get(k) == 0 {
			continue
		}
		group := k >> c.g.refBlockBits
		list = append(list, group)
		k = (group+1)<<c.g.refBlockBits - 1
	}
	return list
}
