package qcow2

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// Every image has one cluster of refcount table, however large a cluster is.
func TestStrictClusterSizes(t *testing.T) {
	open := func(b []byte, readOnly bool) error {
		im, err := Open(t.Context(), storagetest.MemOf(b), image.Options{Name: "mem", ReadOnly: readOnly, Untrusted: true})
		if err == nil {
			err = im.Close()
		}
		return err
	}
	for bits := uint32(minClusterBits); bits <= maxClusterBits; bits++ {
		for _, readOnly := range []bool{true, false} {
			if err := open(build(bits, 1<<20).bytes(), readOnly); err != nil {
				t.Errorf("clusters of 2^%d bytes, read-only %v: %v", bits, readOnly, err)
			}
		}
	}
	x := build(maxClusterBits, 1<<20)
	x.h.refTableClusters = 2
	if err := open(x.bytes(), true); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("two clusters of 2^%d bytes: %v", maxClusterBits, err)
	}
}

// What is too much for an untrusted image is fine for others, and the most
// that it may have is not too much.
func TestStrict(t *testing.T) {
	table := func(x *builder, entries uint32) {
		x.h.l1Size = entries
		x.h.l1Offset = uint64(x.alloc((int64(entries)*8-1)>>x.h.clusterBits + 1))
	}
	snapshots := func(x *builder, n uint32, l1Size uint32) {
		x.h.snapshotCount = n
		at := x.alloc((int64(n)*(snapshotFixed+8) + x.cs - 1) >> x.h.clusterBits)
		x.h.snapshotOffset = uint64(at)
		for i := range int64(n) {
			x.put(at+i*(snapshotFixed+8), x.h.l1Offset)
			x.put(at+i*(snapshotFixed+8)+8, uint64(l1Size)<<32|1<<16) // an id of one byte
			copy(x.b[at+i*(snapshotFixed+8)+snapshotFixed:], "1")
		}
	}
	for _, tt := range []struct {
		name      string
		fine, bad func(x *builder)
		want      string
	}{
		{"L1",
			func(x *builder) { table(x, strictL1Size/8) },
			func(x *builder) { table(x, strictL1Size/8+1) },
			"The L1 table has 4194312 bytes, that of an untrusted image may have 4194304"},
		{"refcounts",
			func(x *builder) { x.h.refTableClusters = strictRefTable >> 16 },
			func(x *builder) { x.h.refTableClusters = strictRefTable>>16 + 1 },
			"The reference count table has"},
		{"snapshots",
			func(x *builder) { snapshots(x, strictSnapshots, 1) },
			func(x *builder) { snapshots(x, strictSnapshots+1, 1) },
			"The image has 257 snapshots, an untrusted one may have 256"},
		{"L1 of a snapshot",
			func(x *builder) { snapshots(x, 1, strictL1Size/8) },
			func(x *builder) { snapshots(x, 1, strictL1Size/8+1) },
			`The L1 table of snapshot "1" has 524289 entries, in an untrusted image it may have 524288`},
		{"L1 of all snapshots",
			func(x *builder) { snapshots(x, 2, strictL1Size/8) },
			func(x *builder) { snapshots(x, 3, strictL1Size/8) },
			"The L1 tables of all snapshots have 1572864 entries, in an untrusted image they may have 1048576"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			open := func(edit func(x *builder), untrusted bool) error {
				x := build(16, 1<<20)
				edit(x)
				im, err := Open(t.Context(), storagetest.MemOf(x.bytes()), image.Options{Name: "mem", ReadOnly: true, Untrusted: untrusted})
				if err == nil {
					im.Close()
				}
				return err
			}
			if err := open(tt.fine, true); err != nil {
				t.Error(err)
			}
			if err := open(tt.bad, false); err != nil {
				t.Error(err)
			}
			if err := open(tt.bad, true); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
	o := Options{L2CacheSize: -1, CacheSize: -1}
	if o.strictCache(); o.l2Budget() != strictL2Cache {
		t.Error(o)
	}
	o = Options{L2CacheSize: -1, CacheSize: 64 << 20}
	if o.strictCache(); o.l2Budget() != 64<<20 {
		t.Error("the user's word does not count")
	}
}

// An untrusted image that was not closed properly is checked when it is opened
// for writing, but not for long, and not if it is too much as it is.
func TestStrictDirty(t *testing.T) {
	for _, tt := range []struct {
		name              string
		active, snapshots int // entries that lead to the same L2 table
		want              string
	}{
		{"most", strictDirtyTables>>16 - 1000, 1000, ""},
		{"active", strictDirtyTables>>16 + 1, 0, "16385 L2 tables to check, an untrusted one may have 16384"},
		{"snapshots", 5000, strictDirtyTables>>16 - 4999, "16385 L2 tables to check, an untrusted one may have 16384"},
		{"strict", 1, strictL1Size/8 + 1, "The L1 table of snapshot"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			open := func(untrusted bool) (changed bool, err error) {
				x := build(16, 1<<20)
				x.h.incompatible |= incompatDirty
				l2 := x.l2(0) &^ (x.cs - 1)
				tables := func(n int) uint64 {
					at := x.alloc((int64(n)*8-1)>>16 + 1)
					for i := range int64(n) {
						x.put(at+i*8, uint64(l2))
					}
					return uint64(at)
				}
				x.h.l1Size, x.h.l1Offset = uint32(tt.active), tables(tt.active)
				if tt.snapshots > 0 {
					l1At, at := tables(tt.snapshots), x.alloc(1)
					x.h.snapshotCount, x.h.snapshotOffset = 1, uint64(at)
					x.put(at, l1At)
					x.put(at+8, uint64(tt.snapshots)<<32|1<<16)
					copy(x.b[at+snapshotFixed:], "1")
				}
				b := x.bytes()
				mem := storagetest.MemOf(b)
				im, err := Open(t.Context(), shared{mem}, image.Options{Name: "mem", Untrusted: untrusted})
				if err == nil {
					im.Close()
				}
				return !bytes.Equal(mem.Bytes(), b), err
			}
			said := func(err error) bool {
				return err != nil && strings.Contains(err.Error(), "untrusted")
			}
			changed, err := open(true)
			if said(err) != (tt.want != "") || tt.want != "" && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if changed != (tt.want == "") {
				t.Errorf("changed: %v", changed)
			}
			if _, err := open(false); said(err) {
				t.Errorf("trusted: %v", err)
			}
		})
	}
}
