package image

import (
	"errors"
	"fmt"

	"github.com/imgnbd/imgnbd/storage"
)

// What a caller may match. Besides these, an error wraps a syscall.Errno,
// fs.ErrClosed, fs.ErrNotExist or errors.ErrUnsupported (cannot, or not fast).
var (
	ErrReadOnly   = storage.ErrReadOnly   // written where writing is off
	ErrInUse      = storage.ErrInUse      // locked by another process
	ErrOutOfRange = storage.ErrOutOfRange // range outside the device
	ErrWouldBlock = storage.ErrWouldBlock // TryReadAt would have had to wait
	ErrUnderWay   = storage.ErrUnderWay   // and has begun what it would wait for

	ErrCorrupt     = errors.New("image is corrupt")   // the image contradicts itself
	ErrWrongFormat = errors.New("not in this format") // not this format; try the next
	ErrReference   = errors.New("refused by policy")  // the policy refuses what the image names
	ErrNoCheck     = errors.New("images of this format cannot be checked")
	ErrKey         = errors.New("key missing or wrong") // the image is encrypted
)

// An Error says where something went wrong. It is added once, by the layer
// that knows the name of the image.
type Error struct {
	Op   string // open, read, write, zero, discard, flush, check, close
	Name string // the image, as the user named it
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("%s %s: %v", e.Op, e.Name, e.Err) }

func (e *Error) Unwrap() error { return e.Err }

// A Hint is an error with advice.
type Hint = storage.Hint

// Wrap returns err as an Error, unless err is nil or already names an image:
// of several layers the one where it happened is named.
func Wrap(op, name string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	return &Error{Op: op, Name: name, Err: err}
}
