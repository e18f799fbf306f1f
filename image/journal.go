package image

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// Journals keeps the journals of images: memory that outlives the process, for
// formats that use it ([Format.Journal]). Images are told apart by ID and
// Generation of their store, which a Chain has locked before it asks. All
// methods may be called concurrently.
type Journals interface {
	// Open returns the journal of an image that is being opened for writing:
	// the one that a process left which died, or an empty one. nil: there is
	// none, and none is to be kept.
	Open(image storage.Info) (Journal, error)

	// Left returns the name of a journal that a process left which died, for
	// who opens the image for reading and so cannot bring it back; "" if there
	// is none.
	Left(image storage.Info) string

	// Remove gives up what a process left which died: the image is about to be
	// overwritten.
	Remove(image storage.Info) error
}

// A Journal is the journal of one image.
type Journal interface {
	Name() string // for messages: what to remove, if what it holds is given up

	// Memory begins zeroed. Whoever has it sets the first eight bytes while
	// there is anything in it, and makes them zero when there is nothing. Its
	// length can be used; its capacity, once Grow has returned nil, or if a
	// process that died had grown it.
	Memory() []byte
	Grow() error

	// Close ends the use of the memory. If there is nothing in it the journal
	// is gone, otherwise the next Open finds it. A second Close does nothing.
	Close() error
}

// ErrJournal is wrapped by the error of opening an image whose journal cannot
// be brought back. The journal is as it was.
var ErrJournal = errors.New("what a process left that died cannot be brought back")

// openJournal returns the journal of an image that l opens for writing, nil if
// it has none.
func (l *layer) openJournal(s storage.Store, f *Format) (Journal, error) {
	if l.chain.Journals == nil || !f.Journal {
		return nil, nil
	}
	return l.chain.Journals.Open(s.Info())
}

// missed warns of what is not seen because an image is opened for reading.
func (l *layer) missed(s storage.Store, f *Format) {
	if l.chain.Journals == nil || !f.Journal {
		return
	}
	if name := l.chain.Journals.Left(s.Info()); name != "" {
		l.chain.warn("the process that wrote to %s died, and writes that it acknowledged may be in its journal %s alone; opening the image for writing brings them back.", l.name, name)
	}
}

// settled returns an error if a process that died left a journal of an image
// that is about to be repaired: a repair moves what the journal relies on.
func (l *layer) settled(s storage.Store, f *Format) error {
	if l.chain.Journals == nil || !f.Journal {
		return nil
	}
	name := l.chain.Journals.Left(s.Info())
	if name == "" {
		return nil
	}
	return &Hint{
		Err:    errors.New("the process that wrote to it died, and writes that it acknowledged may be in its journal alone"),
		Advice: fmt.Sprintf("serve the image for writing once, which brings them back, or give them up: remove %s", name),
	}
}

// journalError adds what can be done about a journal that is in the way.
func journalError(err error, j Journal) error {
	if j == nil || !errors.Is(err, ErrJournal) {
		return err
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return &Hint{Err: err, Advice: fmt.Sprintf("they stay in %s, and are brought back when this can be done without %q", j.Name(), errno.Error())}
	}
	return &Hint{Err: err, Advice: fmt.Sprintf("to use the image without them, remove %s", j.Name())}
}

// A journaled store holds the journal of the image in it, which ends before
// the lock on the image does.
type journaled struct {
	storage.Store
	journal Journal
}

func (s *journaled) Close() error { return errors.Join(s.journal.Close(), s.Store.Close()) }
