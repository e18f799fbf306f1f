// Package qcow2 reads images in QEMU's copy-on-write format, versions 2 and 3.
//
// It is built in three strata, each of which knows only those above it here:
//
//   - pure: header.go, entry.go, geometry.go turn bytes into values and back.
//     They do no I/O, and check every limit before anything is allocated.
//   - metadata: cache.go keeps slices of L2 tables, mapping.go turns guest
//     ranges into segments, runs of guest bytes that come from one place.
//   - device: image.go opens an image, read.go serves it; compress.go,
//     datafile.go, backing.go, snapshot.go, bitmap.go, check.go and
//     inspect.go are the features on top.
//
// The unit of everything is the segment: reads, extents and locations are
// folds over the segments of a range, so a long read costs one lookup per
// slice and one read per run, not one per cluster.
//
// # Reading without locks
//
// L2 entries are loaded atomically from slices that lie in the sets of the
// cache. A lookup that hits takes no lock. A miss reads its part of the table
// while holding nothing; others who want the same slice wait for it, everybody
// else goes on. Nothing is locked while guest data is read.
//
// # Trust
//
// An image is input. Sizes are checked against the limits of the format before
// anything is allocated, entries when they are used: an offset that is not
// aligned or lies past the end of its store, a reserved bit, a zero flag in an
// image of version 2 wrap [image.ErrCorrupt] and name structure and place. What
// the image names is opened by the caller's [image.Opener] only.
package qcow2
