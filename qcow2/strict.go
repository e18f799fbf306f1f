package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// What an image may have that nobody vouches for, see Options.Untrusted of
// package image: enough for disks of 256 TiB with clusters of 64 KiB, and so
// little that opening it costs a few tens of MiB.
const (
	strictL1Size      = 4 << 20 // bytes
	strictRefTable    = 1 << 20 // bytes; or one cluster, which every image has
	strictSnapshots   = 256
	strictBitmaps     = 64
	strictBitmapTable = 1 << 16  // entries
	strictRecording   = 64 << 20 // bytes of bits of all bitmaps that record writes
	strictL2Cache     = 8 << 20  // bytes, unless the user says otherwise
	strictDirtyTables = 1 << 30  // bytes of L2 tables that are checked on opening, see checkStrictDirty
)

// checkStrict returns why an image is too much for one that nobody vouches
// for. It comes before anything is allocated for the image's tables.
func (h *header) checkStrict() error {
	tooMuch := func(what string, has, most int64) error {
		if has <= most {
			return nil
		}
		return unsupported("The %s has %d bytes, that of an untrusted image may have %d", what, has, most)
	}
	if err := tooMuch("L1 table", int64(h.l1Size)*8, strictL1Size); err != nil {
		return err
	}
	if err := tooMuch("reference count table", int64(h.refTableClusters)<<h.clusterBits, max(strictRefTable, int64(1)<<h.clusterBits)); err != nil {
		return err
	}
	if h.snapshotCount > strictSnapshots {
		return unsupported("The image has %d snapshots, an untrusted one may have %d", h.snapshotCount, strictSnapshots)
	}
	x, err := h.bitmapsExtension()
	if err == nil && x.count > strictBitmaps {
		err = unsupported("The image has %d bitmaps, an untrusted one may have %d", x.count, strictBitmaps)
	}
	return err
}

// checkStrictTables is checkStrict for what the header does not tell.
func checkStrictTables(snapshots []snapshot, bitmaps []bitmap) error {
	tables := int64(0)
	for _, s := range snapshots {
		tables += int64(s.l1Size)
		if s.l1Size > strictL1Size/8 {
			return unsupported("The L1 table of snapshot %q has %d entries, in an untrusted image it may have %d", s.ID, s.l1Size, strictL1Size/8)
		}
	}
	if tables > maxGuardedTables {
		return unsupported("The L1 tables of all snapshots have %d entries, in an untrusted image they may have %d", tables, maxGuardedTables)
	}
	for i := range bitmaps {
		if n := bitmaps[i].tableSize; n > strictBitmapTable {
			return unsupported("The table of bitmap %q has %d entries, in an untrusted image it may have %d", bitmaps[i].name, n, strictBitmapTable)
		}
	}
	return nil
}

// checkStrictDirty is checkStrict for an image that was not closed properly. It
// is checked before it is written to, which reads an L2 table as often as an
// entry of an L1 table leads to it: with few tables it may keep us busy for
// hours.
func checkStrictDirty(s storage.Store, h *header, snapshots []snapshot) error {
	tables := int64(0)
	count := func(at, entries int64) error {
		b := make([]byte, entries*8)
		if err := readZeroPadded(s, b, at); err != nil {
			return fmt.Errorf("L1 table at %#x: %w", at, err)
		}
		for ; len(b) > 0; b = b[8:] {
			if binary.BigEndian.Uint64(b) != 0 {
				tables++
			}
		}
		return nil
	}
	err := count(int64(h.l1Offset), int64(h.l1Size))
	for i := range snapshots {
		if err == nil {
			err = count(int64(snapshots[i].l1At), int64(snapshots[i].l1Size))
		}
	}
	if most := int64(strictDirtyTables >> h.clusterBits); err == nil && tables > most {
		err = &image.Hint{
			Err:    unsupported("The image was not closed properly, and has %d L2 tables to check, an untrusted one may have %d", tables, most),
			Advice: "check it with imgnbd check -r all, which may take long",
		}
	}
	return err
}

// recordingRoom returns how many bytes of bits may be kept in memory.
func recordingRoom(opt *image.Options) int64 {
	if opt.Untrusted {
		return strictRecording
	}
	return maxRecording
}
