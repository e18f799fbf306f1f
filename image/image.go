// Package image says what a virtual disk can do.
//
// A [Device] is a virtual disk. A [Format] gives the bytes of a
// [storage.Store] that meaning. A [Chain] opens an image by name, together
// with what the image itself names, by a policy. The package holds the
// contract, the errors, small wrappers and the helpers that walk extents; it
// knows no format and no network.
package image

import (
	"github.com/imgnbd/imgnbd/storage"
)

// A Device is a virtual disk: Info().Size bytes, numbered from zero.
//
// Methods may be called concurrently. Calls that overlap in range and time
// take effect in some order per byte; a call never changes a byte outside its
// range. A range outside the device is ErrOutOfRange; an empty range inside it
// does nothing. Nothing is short and nothing returns io.EOF.
//
// Calls that begin after Close return fs.ErrClosed. Close waits for calls in
// progress, makes everything durable and releases what the device has opened;
// its error means that data may be lost.
//
// No method keeps a slice that it is given.
type Device interface {
	// Info describes the device. It does no I/O and never changes.
	Info() Info

	// ReadAt is io.ReaderAt: n is len(p) unless err is not nil.
	ReadAt(p []byte, off int64) (n int, err error)

	// TryReadAt reads all of p, or returns ErrWouldBlock if that would wait
	// for a medium, a network, a lock held across I/O, or decompression; p is
	// undefined then. It is ErrUnderWay if ReadAt only waits for a medium that
	// fetches all of it already.
	TryReadAt(p []byte, off int64) error

	// WriteAt writes all of p; with FUA it is durable on return.
	WriteAt(p []byte, off int64, flags WriteFlags) error

	// WriteZeroes makes the range read as zeros. Without MayUnmap the space
	// stays allocated where the format can say so. With FastOnly it answers
	// errors.ErrUnsupported, quickly and changing nothing, where it would be no
	// faster than writing.
	WriteZeroes(off, n int64, flags WriteFlags) error

	// Discard says that the range is not needed. Afterwards each byte reads as
	// before, as at the last Flush (on some block devices) or as zero.
	Discard(off, n int64) error

	// Flush makes durable all that returned before it was called.
	Flush() error

	// AppendExtents appends a prefix of the description of [off, off+n), n > 0:
	// at least one extent, the first starting exactly at off, each following
	// the one before, none past off+n. want says what has to be right; the
	// rest may be left at its zero value or be coarser. However large n is, an
	// answer has no more than MaxExtents, and ends early rather than take long
	// to find: who wants the rest asks for it.
	AppendExtents(dst []Extent, off, n int64, want Want) ([]Extent, error)

	// Pin keeps the locations valid that are asked for until Release.
	Pin() Pin

	Close() error
}

// Info describes a Device.
type Info struct {
	Size       int64 // bytes
	Format     string
	ReadOnly   bool
	Rotational bool
	BlockSize  BlockSize
	Discard    bool // Discard gives space back
	FastZero   bool // WriteZeroes is cheaper than writing
	QueueDepth int  // calls worth having in progress at once; at least 1
}

// BlockSize is advice to clients, in bytes; a Device accepts any alignment.
type BlockSize struct {
	Min, Preferred, Max int
}

// An Extent says what a run of the device holds and where.
type Extent struct {
	Offset, Length int64
	Zero           bool // reads as zeros
	Data           bool // has bytes of its own to be read; a zero cluster has none, though it may keep space
	Allocated      bool // some layer of the chain holds it
	Compressed     bool
	Depth          int      // the layer that holds it: 0 is the top; meaningful if Allocated
	At             Location // where its bytes lie; At.Store is nil if they lie nowhere as they are
}

// MaxExtents is how many extents one answer of AppendExtents has at most.
const MaxExtents = 64

// A Location is the host position of an extent; the extent's bytes lie there
// verbatim. It holds while the Pin that was taken before the question is held:
// until then no other guest bytes will lie there. A reply that was sent from
// there refers to it until it has been received. Where a driver cannot promise
// that, it gives no location.
type Location struct {
	Store  storage.Store
	Offset int64
}

// Want says what an answer of AppendExtents has to get right. A question that
// costs (two lseeks on a raw file) is not asked for nothing.
type Want uint8

const (
	WantZero      Want = 1 << iota // Zero and Data
	WantAllocated                  // Allocated, Depth and Compressed
	WantLocation                   // At
)

// A Pin is held by who uses locations. The zero Pin is valid and pins nothing.
type Pin struct {
	pinner Pinner
	token  uint64
}

// A Pinner gives out Pins.
type Pinner interface {
	Unpin(token uint64) // a Pin was released
	Recalled() bool     // Pins are wanted back
}

// NewPin returns a Pin that calls p.Unpin(token) when it is released.
func NewPin(p Pinner, token uint64) Pin { return Pin{p, token} }

// Held reports whether the pin pins anything.
func (p Pin) Held() bool { return p.pinner != nil }

// Recalled reports whether the pin keeps more from being done than it should.
// Who cannot release it has to part from what it is held for.
func (p Pin) Recalled() bool { return p.pinner != nil && p.pinner.Recalled() }

// Release ends the pin. It is called once.
func (p Pin) Release() {
	if p.pinner != nil {
		p.pinner.Unpin(p.token)
	}
}

// WriteFlags modify WriteAt and WriteZeroes.
type WriteFlags = storage.WriteFlags

const (
	FUA      = storage.FUA
	MayUnmap = storage.MayUnmap
	FastOnly = storage.FastOnly
)
