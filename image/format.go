package image

import (
	"context"
	"io"

	"github.com/imgnbd/imgnbd/storage"
)

// A Format is a row of the table of what can be opened. A nil function means
// that the format cannot do that.
type Format struct {
	Name string

	// NameOnly is set if images of the format are only recognised, to be refused
	// by their name.
	NameOnly bool

	// Probe recognises the format by at most 64 KiB at either end of the
	// store; what it cannot read it does not recognise (see Recognises). nil: the
	// format is never guessed.
	Probe func(r io.ReaderAt, size int64) bool

	// Open gives the bytes of s a meaning. It takes ownership of s only if it
	// succeeds. It never opens anything itself but through opt.Refs.
	Open func(ctx context.Context, s storage.Store, opt Options) (Device, error)

	// Inspect reads what `info` shows, without opening what the image names,
	// and also of an image that Open would refuse, but not with params that it
	// would refuse. s stays the caller's.
	Inspect func(ctx context.Context, s storage.Store, params []Param) (*Inspection, error)

	// Check verifies the structure of an image, and repairs it, without opening
	// what the image names, and also where Open would refuse it. An error means
	// that it came to no end. s stays the caller's.
	Check func(ctx context.Context, s storage.Store, opt Options, what CheckOptions) (CheckResult, error)

	// Create writes an empty image of that format into s, which is empty or
	// will be overwritten. s stays the caller's.
	// What was there does not look like an image any more before anything else
	// is written, and the new one does not before all of it is durable.
	Create func(ctx context.Context, s storage.Store, opt CreateOptions) error

	// CreateParams are the parameters of Create and the size of the disk, in
	// the order in which they are shown.
	CreateParams []CreateParam

	// ShareWrite is set where several processes may write the same image at
	// once, because the format keeps no metadata in it.
	ShareWrite bool

	// Journal is set if the format uses Options.Journal.
	Journal bool

	// Grows is set if writing to an image may change the size of its store.
	Grows bool
}

// Options say how an image is opened.
type Options struct {
	Name     string // the image as the user named it, for messages
	ReadOnly bool
	Refs     Opener       // opens what the image names; nil refuses everything
	Params   []Param      // the format's own options; an unknown key is an error
	Unmap    bool         // what is given up goes back to the host, as with QEMU's discard=unmap
	Warn     func(string) // told of what the user should know; may be nil

	// Notice is told of what the user may want to know, but after a power cut is
	// the usual thing; it may be nil.
	Notice func(string)

	// Untrusted is set for an image that nobody vouches for: it is refused if
	// it asks for more memory than images that are of use do.
	Untrusted bool

	// Journal is memory that outlives the process, such as a shared mapping of
	// a file in tmpfs, for formats that hold changes back in memory: what they
	// have acknowledged survives there if the process dies. If one that died
	// left something in it, Open brings that back first, or fails. Whoever
	// provides it sees to it that its last user is dead, on this boot. It stays
	// mapped until the device has closed the store. nil: none.
	//
	// What is beyond its length, up to its capacity, is untouched until
	// GrowJournal has returned nil. It is called once at most, from any
	// goroutine; an error means that there is no more memory. nil: the length is
	// all there is.
	Journal     []byte
	GrowJournal func() error
}

// CreateOptions say what image is made.
type CreateOptions struct {
	Size   int64   // bytes
	Params []Param // the format's own options; an unknown key is an error

	// NewStore makes a file that the image will name, or opens what is there
	// for being overwritten. The name is as the image will have it. nil: none
	// can be made. Chain.Create sets it.
	NewStore func(ctx context.Context, name string) (storage.Store, error)
}

// A Param is one option of a format, key and value as the user wrote them.
type Param struct{ Key, Value string }

// A Reference is a name found inside an image, or in the parameters of its
// format.
type Reference struct {
	Name   string
	Format string        // as the image declares it; "" if it does not
	From   storage.Store // the image that names it; relative names start beside it. nil: a parameter names it
}

// An Opener opens what an image refers to. Formats have no other way.
type Opener interface {
	// OpenImage opens a backing image, read-only.
	OpenImage(ctx context.Context, ref Reference) (Device, error)
	// OpenStore opens a data file, for writing if write is set.
	OpenStore(ctx context.Context, ref Reference, write bool) (storage.Store, error)
}
