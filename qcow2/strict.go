package qcow2

import "github.com/imgnbd/imgnbd/image"

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

// recordingRoom returns how many bytes of bits may be kept in memory.
func recordingRoom(opt *image.Options) int64 {
	if opt.Untrusted {
		return strictRecording
	}
	return maxRecording
}
