package qcow2

import (
	"encoding/binary"
	"fmt"
)

// foreign looks for what somebody else did to the image after the process died
// that kept the journal: a host cluster that the journal names and that others
// use by now. Those may have been free by what the image said.
//
// Every L2 table is read for that. It cannot see writes that changed no
// mapping, nor those whose clusters were given back.
func (t *takeover) foreign() error {
	g := t.geo
	size, err := t.store.Size()
	if err != nil {
		return err
	}
	for c := range t.used {
		switch {
		case t.tables.has(c):
			return fmt.Errorf("host cluster %#x, which the journal names, holds a table: the image was changed since", c<<g.clusterBits)
		case c<<g.clusterBits >= size:
			return fmt.Errorf("host cluster %#x, which the journal names, is past the end of the store: the image was changed since", c<<g.clusterBits)
		}
	}
	buf := make([]byte, g.sliceSize())
	for i := range t.mapping.l1 {
		if l1Entry(t.mapping.l1[i].Load()).host() == 0 {
			continue
		}
		first := t.geo.sliceNo(int64(i) << (g.clusterBits + g.l2Bits))
		for no := first; no < first+1<<(g.l2Bits-g.sliceBits); no++ {
			if err := t.mapping.readSlice(no, buf, true); err != nil {
				return err
			}
			if err := t.foreignEntries(no, buf); err != nil {
				return err
			}
		}
	}
	return nil
}

// foreignEntries looks at one slice as it is in the store.
func (t *takeover) foreignEntries(no uint64, b []byte) error {
	g := t.geo
	for i := range uint64(1) << g.sliceBits {
		var e entry
		words := b[i*uint64(g.entryWords)*8:]
		e.word = l2Entry(binary.BigEndian.Uint64(words))
		if g.entryWords == 2 {
			e.bitmap = l2Bitmap(binary.BigEndian.Uint64(words[8:]))
		}
		host, length := e.word.host(), int64(1)
		if e.word.compressed() {
			host, length = g.compressed(e.word)
		}
		if host == 0 {
			continue
		}
		guest := no<<g.sliceBits + i
		for c := host >> g.clusterBits; c <= (host+length-1)>>g.clusterBits; c++ {
			if (t.used[c] || t.past[c]) && !t.known[guest][e] {
				return fmt.Errorf("guest cluster %d uses host cluster %#x, of which the journal does not know: the image was changed since", guest, c<<g.clusterBits)
			}
		}
	}
	return nil
}
