// Package storage says where bytes are kept.
//
// A [Store] is a run of bytes with a name: a file, a block device, a remote
// object. The package declares the contract, the errors and the options of
// opening; each back end lives in a directory of its own below. It knows
// nothing of image formats, and imports nothing of this module.
package storage

import (
	"context"
	"errors"
	"net/url"
	"os"
	"syscall"
	"time"
)

// A Store is a run of bytes with a name.
//
// All methods may be called concurrently. Calls that overlap in range and
// time take effect in some order per byte. Any offset and length is accepted;
// Info().Alignment is advice, a back end hides what its medium demands.
//
// Calls that begin after Close return [fs.ErrClosed]. Close waits for calls
// in progress, and its error means that data may be lost. Close twice returns
// fs.ErrClosed.
//
// A method that fails returns an error that wraps one of the sentinels below
// or a syscall.Errno; it carries no name or offset, which the caller adds once.
type Store interface {
	// Info describes the store. It does no I/O and never changes, but for
	// Size, which is asked for.
	Info() Info

	// ReadAt is io.ReaderAt: short only at the end, then with io.EOF.
	ReadAt(p []byte, off int64) (int, error)

	// TryReadAt reads all of p or returns ErrWouldBlock if that would wait
	// for a medium or a network; p is undefined then. A store without a cheap
	// answer always returns ErrWouldBlock, one that has begun to fetch all of
	// the range ErrUnderWay. Other errors are as for ReadAt; a
	// range past the end is io.EOF.
	TryReadAt(p []byte, off int64) error

	// WriteAt writes all of p. Past the end a store that may grow is
	// extended, with a gap reading as zeros; one of fixed size answers
	// syscall.ENOSPC. With FUA the data is durable on return.
	WriteAt(p []byte, off int64, flags WriteFlags) error

	// WriteZeroes makes the range read as zeros, extending as WriteAt does.
	// With MayUnmap the space may be given back. With FastOnly it answers
	// errors.ErrUnsupported, having changed nothing, unless it is certainly
	// faster than writing.
	WriteZeroes(off, n int64, flags WriteFlags) error

	// Discard says that the range is not needed. Afterwards each byte reads
	// as before, as at the last Sync or as zero. It never changes the size. A store that cannot
	// give space back returns nil and does nothing.
	Discard(off, n int64) error

	// Sync makes durable all that returned before the call, the size included.
	Sync() error

	// Size returns the present length in bytes.
	Size() (int64, error)

	// Truncate sets the length; what it adds reads as zeros. A store of fixed
	// size returns errors.ErrUnsupported unless size is what it is.
	Truncate(size int64) error

	// AppendExtents describes [off, off+n) as data and holes, clipped to the
	// size: it appends at least one extent if off is below the size, the first
	// beginning at off, each following the one before. It may stop early.
	// A store that cannot tell says that all is data.
	AppendExtents(dst []Extent, off, n int64) ([]Extent, error)

	// File returns the host file behind the store if sending from it is the
	// same as ReadAt, else nil. A wrapper returns nil unless it would not
	// have seen, changed or delayed the bytes. The caller never closes it, and
	// never uses its file position.
	File() *os.File

	Close() error
}

// Info describes a Store.
type Info struct {
	URL *url.URL // how to open it again; file URLs have an absolute path
	ID  string   // identity: equal for two names of the same bytes; "" if unknown

	// Generation differs between bytes that had the same ID one after the
	// other: a file and the one made in its place, a device and what was
	// attached under its number later. "" if unknown.
	Generation string

	New          bool // made by this opening ([Options.Create])
	ReadOnly     bool // every method that writes returns ErrReadOnly
	FixedSize    bool // cannot grow (a block device)
	NewReadsZero bool // bytes that were never written read as zeros after growing
	FastZero     bool // WriteZeroes is cheaper than writing
	Discard      bool // Discard gives space back
	Rotational   bool
	Alignment    int // offsets and lengths that avoid read-modify-write; at least 1
	PreferredIO  int // bytes; a good size of one request, at least Alignment
	MaxIO        int // bytes; larger requests are split by the store, 0: no limit
	QueueDepth   int // calls worth having in progress at once, at least 1
}

// An Extent is a run of a Store. A hole reads as zeros and occupies nothing.
type Extent struct {
	Offset, Length int64
	Hole           bool
}

// WriteFlags modify WriteAt and WriteZeroes.
type WriteFlags uint8

const (
	// FUA makes what this call writes durable before it returns.
	FUA WriteFlags = 1 << iota
	// MayUnmap lets WriteZeroes give the space back.
	MayUnmap
	// FastOnly makes WriteZeroes fail with errors.ErrUnsupported, quickly and
	// changing nothing, where it would be no faster than writing.
	FastOnly
)

// Access says what a Store is opened for.
type Access uint8

const (
	Read      Access = iota // reading
	Write                   // reading and writing within the size that it has
	WriteGrow               // reading, writing and changing the size
)

// Sharing says what others may do with the bytes while a Store is open. How
// far that is enforced depends on the back end; the file back end takes the
// byte locks that QEMU takes, so that both respect each other.
type Sharing uint8

const (
	// ShareRead lets others read and refuses others who write or resize.
	ShareRead Sharing = iota
	// ShareWrite lets others write too (a raw image whose clients agree).
	ShareWrite
	// ShareNoLock takes no lock and looks at none. Only for looking at an
	// image that someone else has open.
	ShareNoLock
)

// Options say how a Store is opened.
type Options struct {
	Access  Access
	Share   Sharing
	Create  bool          // make it if it does not exist; an existing one is opened as it is, and has its name once it is locked
	Direct  bool          // bypass the host's page cache
	Timeout time.Duration // bound of one operation of a remote store; 0: the back end's default

	// Taken is called when the store has its own locks, and has not looked at
	// those of others yet: who holds some in its place lets go of them. nil:
	// nobody does. It is not called where there are no locks.
	Taken func(Info)

	// SyncFailed is called once, before the first sync that fails returns: what
	// was written may be lost, and who opens the bytes next is not told. nil:
	// nobody wants to know.
	SyncFailed func()
}

// A LockHolder is a Store whose locks can be kept beyond Close.
type LockHolder interface {
	// HoldLocks returns a file that has the locks that the Store has. They end
	// when no process has it open any more. nil: there are none.
	HoldLocks() (*os.File, error)
}

// A Protocol opens one kind of URL.
type Protocol struct {
	Name string // the URL scheme
	Open func(ctx context.Context, u *url.URL, opt Options) (Store, error)

	// Remove makes the name that Options.Create made go away. nil: it cannot.
	Remove func(ctx context.Context, u *url.URL) error
}

// Errors of a Store. Package image declares the same values under its name.
var (
	// ErrReadOnly is returned by what would write to a store opened for
	// reading.
	ErrReadOnly = errors.New("read-only")
	// ErrInUse is wrapped by the error of opening a store that another process
	// uses in a way that excludes ours.
	ErrInUse = errors.New("in use by another process")
	// ErrOutOfRange is returned for a negative offset or length, and where
	// their sum overflows.
	ErrOutOfRange = errors.New("outside the range")
	// ErrWouldBlock is returned by TryReadAt instead of waiting.
	ErrWouldBlock = errors.New("would wait")
	// ErrUnderWay is an ErrWouldBlock by errors.Is: all of the range is on its
	// way from the medium, and ReadAt only waits until it arrives.
	ErrUnderWay error = underWay{}
)

type underWay struct{}

func (underWay) Error() string        { return "would wait for what is under way" }
func (underWay) Is(target error) bool { return target == ErrWouldBlock }

// A Hint is an error with advice: what the user can do about it. The advice is
// printed on a line of its own, so Error does not include it.
type Hint struct {
	Err    error
	Advice string
}

func (h *Hint) Error() string { return h.Err.Error() }

func (h *Hint) Unwrap() error { return h.Err }

// CheckRange returns ErrOutOfRange unless off and n describe a range of
// non-negative offset, length and end.
func CheckRange(off, n int64) error {
	if off < 0 || n < 0 || off+n < off {
		return ErrOutOfRange
	}
	return nil
}

// Clear makes s, which may grow, size bytes that read as zeros. What was there
// remains if that is more than s can be.
func Clear(s Store, size int64) error {
	now, err := s.Size()
	if err == nil && now < size {
		err = s.Truncate(size)
	}
	if err == nil {
		err = s.Truncate(0)
	}
	if err == nil {
		err = s.Truncate(size)
	}
	return err
}

// NoSpace reports whether err means that space ran out, of the medium, of a
// quota or of the largest file.
func NoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}
