package image

import (
	"context"
	"time"
)

// Optional abilities of a Device, for tools. They exist only on the value
// that a Format returned, before anything wraps it.

// As returns d as a T, and whether it is one. It never looks through a wrapper.
func As[T any](d Device) (T, bool) {
	t, ok := d.(T)
	return t, ok
}

// A Checker verifies the structure of its image.
type Checker interface {
	Check(ctx context.Context, opt CheckOptions) (CheckResult, error)
}

// CheckOptions say how an image is checked.
type CheckOptions struct {
	Repair   Repair
	Report   func(Finding)           // told of each finding; may be nil
	Progress func(done, total int64) // told now and then; may be nil
}

// Repair says what a check repairs. Whatever it is, guest data that could be
// read before reads the same, also after a power cut in the middle; a repair
// that was cut off is begun again.
type Repair uint8

const (
	RepairNothing Repair = iota
	RepairLeaks          // only what is safe however much else is wrong
	RepairAll
)

// A Finding is one thing that is wrong with an image.
type Finding struct {
	Leak bool   // space that nothing refers to; otherwise corruption
	Text string // as qemu-img words it, without a newline
}

// CheckResult is what a check found. The fields are those of qemu-img check.
type CheckResult struct {
	Corruptions, Leaks int64
	CheckErrors        int64 // parts that could not be checked
	ImageEndOffset     int64 // bytes; 0 if it does not apply
	TotalClusters      int64
	AllocatedClusters  int64
	FragmentedClusters int64
	CompressedClusters int64

	// What was repaired, and is not counted above.
	CorruptionsFixed, LeaksFixed int64
}

// A Snapshotter has internal snapshots.
type Snapshotter interface {
	Snapshots() []Snapshot
	// OpenSnapshot opens a snapshot read-only. The device shares the image,
	// which is closed when both are. A snapshot that is not there wraps
	// fs.ErrNotExist.
	OpenSnapshot(sel SnapshotSelector) (Device, error)
}

// A Snapshot is one internal snapshot.
type Snapshot struct {
	ID, Name    string
	Created     time.Time
	VMStateSize int64         // bytes
	VMClock     time.Duration // guest time since boot
	ICount      int64         // instructions executed; -1 if not recorded
	Size        int64         // bytes of the disk when it was taken
}

// A SnapshotSelector names a snapshot. Any alone matches an id first, then a
// name; otherwise all fields that are set have to match.
type SnapshotSelector struct {
	ID, Name, Any string
}

// A BitmapSource has dirty bitmaps, its own or in its backing chain.
type BitmapSource interface {
	// Bitmaps lists the bitmaps of the image itself.
	Bitmaps() []BitmapInfo
	// Bitmap finds a bitmap by name, down the backing chain. One that is not
	// there wraps fs.ErrNotExist; one that is marked as in use by a writer
	// that never finished wraps ErrCorrupt.
	Bitmap(name string) (Bitmap, error)
}

// BitmapInfo describes a dirty bitmap.
type BitmapInfo struct {
	Name         string
	Granularity  int64 // bytes per bit
	Enabled      bool  // records writes ("auto" in qcow2)
	Inconsistent bool  // was not stored by its last writer ("in-use" in qcow2)
}

// A Bitmap tells which parts of a device were written.
type Bitmap interface {
	Info() BitmapInfo
	// AppendDirty appends a prefix of the description of [off, off+n), by the
	// rules of Device.AppendExtents.
	AppendDirty(dst []DirtyExtent, off, n int64) ([]DirtyExtent, error)
}

// A DirtyExtent is a run of a device that a Bitmap marks, or does not.
type DirtyExtent struct {
	Offset, Length int64
	Dirty          bool
}
