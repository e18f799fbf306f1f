package storagetest

import (
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/imgnbd/imgnbd/storage"
)

// An OpKind says which method of a Store was called.
type OpKind uint16

const (
	OpRead OpKind = 1 << iota
	OpTryRead
	OpWrite
	OpZero
	OpDiscard
	OpSync
	OpTruncate
	OpExtents
	OpSize
	OpClose

	// OpChange is what changes bytes or the size.
	OpChange = OpWrite | OpZero | OpDiscard | OpTruncate
	// OpAny is every method.
	OpAny = 1<<10 - 1
)

var opNames = [...]string{"read", "try read", "write", "zero", "discard", "sync", "truncate", "extents", "size", "close"}

func (k OpKind) String() string {
	var names []string
	for i, name := range opNames {
		if k>>i&1 != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "|")
}

// An Op is one call of a method.
type Op struct {
	Kind           OpKind
	Offset, Length int64 // Truncate: Offset is the size
	Flags          storage.WriteFlags
	Number         int // of calls of any kind, counted from 1
}

func (o Op) String() string {
	return fmt.Sprintf("operation %d, %v of %d bytes at %d, flags %d", o.Number, o.Kind, o.Length, o.Offset, o.Flags)
}

// A Failure says how a call fails.
type Failure struct {
	Err error
	// Done is how many bytes of a WriteAt or a WriteZeroes take effect all the
	// same. Other calls take effect as a whole if it is not 0.
	Done int64
}

// An Injector says how a call fails, or returns nil if it does not. It is
// called before the call, concurrently where calls are concurrent, and may
// sleep or block to delay it.
type Injector func(Op) *Failure

// Nth fails the k-th call of the kinds, counted from 1.
func Nth(kinds OpKind, k int, f Failure) Injector {
	return nth(kinds, f, func(n int) bool { return n == k })
}

// From fails the k-th call of the kinds, counted from 1, and all later ones.
func From(kinds OpKind, k int, f Failure) Injector {
	return nth(kinds, f, func(n int) bool { return n >= k })
}

func nth(kinds OpKind, f Failure, fails func(int) bool) Injector {
	var mu sync.Mutex
	n := 0
	return func(op Op) *Failure {
		if op.Kind&kinds == 0 {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if n++; fails(n) {
			return &f
		}
		return nil
	}
}

// Within fails calls of the kinds that touch [off, off+n).
func Within(kinds OpKind, off, n int64, f Failure) Injector {
	return func(op Op) *Failure {
		if op.Kind&kinds != 0 && op.Offset < off+n && off < op.Offset+op.Length {
			return &f
		}
		return nil
	}
}

// FirstOf asks the injectors in order and takes the first failure.
func FirstOf(in ...Injector) Injector {
	return func(op Op) *Failure {
		for _, i := range in {
			if f := i(op); f != nil {
				return f
			}
		}
		return nil
	}
}

// Hold blocks calls of the kinds until release is closed, and says on started
// (if not nil, and if somebody listens or it has room) that one began.
func Hold(kinds OpKind, started chan<- Op, release <-chan struct{}) Injector {
	return func(op Op) *Failure {
		if op.Kind&kinds != 0 {
			select {
			case started <- op:
			default:
			}
			<-release
		}
		return nil
	}
}

// A Faulty is a Store that fails when it is told to.
type Faulty struct {
	below storage.Store
	gate  storage.Gate

	mu       sync.Mutex
	inject   Injector
	calls    int
	injected []string
}

// Fault returns s with the failures of inject, which may be nil.
func Fault(s storage.Store, inject Injector) *Faulty { return &Faulty{below: s, inject: inject} }

// Inject exchanges the injector, for calls that begin afterwards.
func (f *Faulty) Inject(inject Injector) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inject = inject
}

// Calls returns how many calls there were.
func (f *Faulty) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Injected returns what was injected so far, a line each, for a test to print.
func (f *Faulty) Injected() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.injected[:len(f.injected):len(f.injected)]
}

// ask counts a call and returns how it is to fail.
func (f *Faulty) ask(op Op) *Failure {
	f.mu.Lock()
	f.calls++
	op.Number = f.calls
	inject := f.inject
	f.mu.Unlock()
	if inject == nil {
		return nil
	}
	failure := inject(op)
	if failure != nil {
		f.mu.Lock()
		f.injected = append(f.injected, fmt.Sprintf("%v: %v after %d bytes", op, failure.Err, failure.Done))
		f.mu.Unlock()
	}
	return failure
}

// do runs a call that is done as a whole or not at all.
func (f *Faulty) do(op Op, call func() error) error {
	if !f.gate.Enter() {
		return fs.ErrClosed
	}
	defer f.gate.Leave()
	failure := f.ask(op)
	if failure == nil {
		return call()
	}
	if failure.Done != 0 {
		if err := call(); err != nil {
			return err
		}
	}
	return failure.Err
}

// doPart runs a call that is done as far as the failure says.
func (f *Faulty) doPart(op Op, call func(n int64) error) error {
	if !f.gate.Enter() {
		return fs.ErrClosed
	}
	defer f.gate.Leave()
	failure := f.ask(op)
	if failure == nil {
		return call(op.Length)
	}
	if n := min(failure.Done, op.Length); n > 0 {
		if err := call(n); err != nil {
			return err
		}
	}
	return failure.Err
}

func (f *Faulty) Info() storage.Info { return f.below.Info() }

// File is nil, as bytes must not go round the injector.
func (f *Faulty) File() *os.File { return nil }

func (f *Faulty) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.do(Op{Kind: OpRead, Offset: off, Length: int64(len(p))}, func() error {
		n, err = f.below.ReadAt(p, off)
		return err
	})
	return n, err
}

func (f *Faulty) TryReadAt(p []byte, off int64) error {
	return f.do(Op{Kind: OpTryRead, Offset: off, Length: int64(len(p))}, func() error {
		return f.below.TryReadAt(p, off)
	})
}

func (f *Faulty) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	return f.doPart(Op{Kind: OpWrite, Offset: off, Length: int64(len(p)), Flags: flags}, func(n int64) error {
		return f.below.WriteAt(p[:n], off, flags)
	})
}

func (f *Faulty) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	return f.doPart(Op{Kind: OpZero, Offset: off, Length: n, Flags: flags}, func(n int64) error {
		return f.below.WriteZeroes(off, n, flags)
	})
}

func (f *Faulty) Discard(off, n int64) error {
	return f.do(Op{Kind: OpDiscard, Offset: off, Length: n}, func() error { return f.below.Discard(off, n) })
}

func (f *Faulty) Sync() error { return f.do(Op{Kind: OpSync}, f.below.Sync) }

func (f *Faulty) Size() (size int64, err error) {
	err = f.do(Op{Kind: OpSize}, func() error {
		size, err = f.below.Size()
		return err
	})
	return size, err
}

func (f *Faulty) Truncate(size int64) error {
	return f.do(Op{Kind: OpTruncate, Offset: size}, func() error { return f.below.Truncate(size) })
}

func (f *Faulty) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	err := f.do(Op{Kind: OpExtents, Offset: off, Length: n}, func() (err error) {
		dst, err = f.below.AppendExtents(dst, off, n)
		return err
	})
	return dst, err
}

// Close closes the store below even if it is to fail.
func (f *Faulty) Close() error {
	if !f.gate.Close() {
		return fs.ErrClosed
	}
	failure := f.ask(Op{Kind: OpClose})
	err := f.below.Close()
	if failure != nil {
		return failure.Err
	}
	return err
}
