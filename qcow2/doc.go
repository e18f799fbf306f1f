// Package qcow2 reads and writes images in QEMU's copy-on-write format,
// versions 2 and 3.
//
// It is built in three strata, each of which knows only those above it here:
//
//   - pure: header.go, entry.go, geometry.go turn bytes into values and back.
//     They do no I/O, and check every limit before anything is allocated.
//   - metadata: cache.go keeps slices of L2 tables, mapping.go turns guest
//     ranges into segments, runs of guest bytes that come from one place.
//     link.go changes the mapping, alloc.go hands out host clusters, refcount.go
//     counts them, guard.go knows which are tables, flight.go which are being
//     written to, epoch.go tells who may still know of one, and loans.go whether
//     replies refer to one. commit.go brings it all to the store, and is the
//     only place that orders writes. journal.go and replay.go are for the death
//     of the process.
//   - device: image.go opens an image, read.go serves it, writer.go, write.go
//     and zero.go change it; compress.go, datafile.go, backing.go, snapshot.go,
//     bitmap.go, recording.go, create.go and inspect.go are the features on top.
//   - check: check.go compares with what references.go counts; repair.go puts
//     it right, in an order of its own, and rebuild.go makes refcounts anew.
//     They need no open image.
//
// The unit of reading is the segment: reads, extents and locations are folds
// over the segments of a range, so a long read costs one lookup per slice and
// one read per run, not one per cluster.
//
// # Reading without locks
//
// L2 entries are loaded atomically from slices that lie in the sets of the
// cache. A lookup that hits takes no lock. A miss reads its part of the table
// while holding nothing; others who want the same slice wait for it, everybody
// else goes on. Nothing is locked while guest data is read.
//
// # Writing
//
// The entries in memory are what is true; the store follows. An overwrite of a
// cluster that is ours alone (a data cluster with the copied flag) is a write
// to the store and takes no lock. Everything else changes entries: it claims
// them, takes clusters from the allocator, writes to these what the request has
// and around it what was there, and then links them: it sets the entries under
// the lock of their slice. Who meets a claim waits. No lock is held across I/O.
//
// What an entry pointed to before is dropped. It becomes free when two things
// are certain: that no table in the store points to it any more, and that no
// request can. The first is the committer's business, the second that of the
// epochs: a request is inside one from before it looks at the mapping until it
// is done with the host offsets that it found.
//
// Lock order: cacheSet.mu, slice.mu, changes.tableMu, allocator.mu. All others
// are leaves. Nobody holds one of them while waiting for a commit; a request
// may hold its epoch, for the committer never waits for requests. What needs
// the image for itself freezes the epochs.
//
// # What a commit does, and in which order
//
// The committer is one goroutine. A batch is cut: the entries that changed are
// copied out as they are now. Stage A writes what nothing in the store points
// to: refcounts, new refcount blocks, new L2 tables. A sync makes that durable,
// and the guest data too. Stage B writes the pointers: refcount table entries,
// L2 entries, L1 entries, the header. Another sync makes the batch durable; it
// also serves stage A of the next. So a flush costs two syncs, one if no entry
// changed, and one each in a stream of flushes.
//
// The rules. For each there is a switch among the defects, and a test that
// shows that the crash simulator notices when it is off.
//
//	R1   an entry is set after all that it points to was handed to the store
//	R2   a sync lies between stage A and stage B
//	R3   a sync lies between stage B and the answer to a flush
//	R4   stage B writes entries as they were at the cut
//	R5   a count is lowered in a batch cut after the pointer's removal was durable
//	R6   a cluster is reused after that, after all requests that can know it, and
//	     after all replies that were sent from it have been received
//	R7   filling is skipped only in clusters that were never written
//	R8   the mapping of a cluster is changed by one request at a time
//	R9   zeroing a part of a cluster never zeroes more than was asked for
//	R10  a table whose L1 entry may have been written is not new any more, even if
//	     its batch failed: it is changed in place
//	R11  what a new refcount block covers is handed out once a batch has the block;
//	     if that batch fails, the next syncs between blocks and entries; a block
//	     is counted by itself or by one that is linked durably
//	R12  a record is in the journal before its entry is visible, and its slice on
//	     the dirty list before the record has a number; a cut reads the journal's
//	     end first, the list second
//	R13  records are dropped when the batch is durable, not at its cut
//	R14  what replay frees goes through the same quarantine
//	R15  after a failed sync no metadata is written, and no flush succeeds
//	R16  a bitmap that records is marked as in use durably before the first
//	     change; at the end its bits are durable before its entry points to them,
//	     and that is durable before the mark is taken off
//
// Why it holds, in short: take any state of the store after a power cut. Every
// pointer in it was written by a stage B, so its target and its count were made
// durable before, and the target was not given to another since, for that takes
// a later durable batch without the pointer. So what can be reached is what
// belongs there, whichever of the unsynced writes survived; what is lost are
// clusters that are counted and not used, which are leaks.
//
// If the process dies and not the machine, the store is such a state, and the
// journal has every entry that differs from it. A successor links these again
// by the ordinary path; until that is durable it changes nothing in the journal,
// so it may die as well. Whether the store is still in that state a seal tells,
// a number among the autoclear bits of the header, which any other writer clears:
// it is there before the first record is, and as long as there are any.
//
// Errors leave the state as it was. A request that fails before it links gives
// back what it took. A batch that fails is dirty again, whole, and the next
// commit tries again. So what a batch has to read is read before it is relied
// on: a table that is to be copied by who changes it, and counts before a cluster
// is handed out. A count that cannot be read afterwards fails the batches that
// raise it; to be lowered it waits, and is a leak at worst. Only a failed sync is
// for good: the host forgets which pages it could not write, and a later sync
// tells nothing about them.
//
// # Bitmaps
//
// The bits of bitmaps that record are in memory while the image is open for
// writing. A request sets them before it changes anything, without a lock, and
// for its whole range: zeroing and discarding count as changes, as in QEMU. What
// the store has is marked as in use from the first change until Close puts the
// bits into clusters of their own and frees the old ones. The directory and the
// header extension stay where they are, and what changes in the directory are
// fields within a sector, so the header vouches for all bitmaps all the time.
// Whoever dies before the end leaves the mark: the bitmap is inconsistent from
// then on, journal or not, and a backup has to begin anew.
//
// # Trust
//
// An image is input. Sizes are checked against the limits of the format before
// anything is allocated, entries when they are used: an offset that is not
// aligned or lies past the end of its store, a reserved bit, a zero flag in an
// image of version 2 wrap [image.ErrCorrupt] and name structure and place. An
// entry that points to a table, or a count that cannot be, marks the image as
// corrupt and ends all writing to it. What the image names is opened by the
// caller's [image.Opener] only.
package qcow2
