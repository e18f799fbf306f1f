package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/imgnbd/imgnbd/storage"
)

// Create makes an empty image of a format, overwriting what is there unless
// somebody uses it. The image is durable on return. Files that were not there
// before are gone if it fails, also with the cause of ctx when that is cancelled.
func (c *Chain) Create(ctx context.Context, name, format string, opt CreateOptions) error {
	src, err := parseName(name)
	if err != nil {
		return &Error{"create", name, err}
	}
	return Wrap("create", src.name, c.create(ctx, src, format, opt))
}

func (c *Chain) create(ctx context.Context, src source, format string, opt CreateOptions) (err error) {
	if err := c.settle(&src, format); err != nil {
		return err
	}
	f, err := c.format(src.format)
	if err != nil {
		return err
	}
	if f.Create == nil {
		return fmt.Errorf("images of format %s cannot be made", f.Name)
	}
	m := maker{chain: c}
	s, err := m.open(ctx, src)
	if err != nil {
		return err
	}
	// Removed before they are closed: while the lock is held nobody else can
	// have taken them into use.
	defer func() {
		if err != nil {
			err = errors.Join(err, m.remove(ctx))
		}
		err = errors.Join(err, s.Close())
	}()
	if opt.NewStore == nil {
		opt.NewStore = func(ctx context.Context, name string) (storage.Store, error) {
			return m.openBeside(ctx, src.name, name, s)
		}
	}
	opt.Params = append(src.params, opt.Params...)
	if err := f.Create(ctx, s, opt); err != nil {
		return err
	}
	if err := s.Sync(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// A maker opens what is about to be overwritten, and knows what it made.
type maker struct {
	chain *Chain
	made  []source
}

// open makes a store, or opens the one that is there for being overwritten. A part
// of a file that is not there cannot be made.
func (m *maker) open(ctx context.Context, src source) (storage.Store, error) {
	s, err := m.chain.openStore(ctx, src, storage.Options{Access: storage.WriteGrow, Create: !src.part, Direct: src.direct})
	if err != nil {
		return nil, err
	}
	info := s.Info()
	if info.New {
		m.made = append(m.made, src)
	} else if m.chain.Journals != nil {
		s = &overwritten{s, sync.OnceValue(func() error { return m.chain.Journals.Remove(info) })}
	}
	return &cancellable{s, ctx}, nil
}

// A cancellable store writes no more once ctx is cancelled. Formats need not look
// for that, however much they write.
type cancellable struct {
	storage.Store
	ctx context.Context
}

func (s *cancellable) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	return s.Store.WriteAt(p, off, flags)
}

// WriteZeroes goes in pieces: the store below may have to write them.
func (s *cancellable) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	const piece = 1 << 30
	for {
		if err := context.Cause(s.ctx); err != nil {
			return err
		}
		part := min(n, piece)
		if err := s.Store.WriteZeroes(off, part, flags); err != nil || part == n {
			return err
		}
		off, n = off+part, n-part
	}
}

func (s *cancellable) Truncate(size int64) error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	return s.Store.Truncate(size)
}

func (s *cancellable) Sync() error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	return s.Store.Sync()
}

// An overwritten store gives up its journal before its first change, and not
// sooner: who fails until then leaves the image as it was, with all that was
// acknowledged.
type overwritten struct {
	storage.Store
	begin func() error
}

func (s *overwritten) WriteAt(p []byte, off int64, flags storage.WriteFlags) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.Store.WriteAt(p, off, flags)
}

func (s *overwritten) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.Store.WriteZeroes(off, n, flags)
}

func (s *overwritten) Discard(off, n int64) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.Store.Discard(off, n)
}

// Truncate takes nothing from what was there if it makes it longer, and may not
// be able to.
func (s *overwritten) Truncate(size int64) error {
	now, err := s.Store.Size()
	if err == nil && size < now {
		err = s.begin()
	}
	if err != nil {
		return err
	}
	return s.Store.Truncate(size)
}

// openBeside is open for what the image base, which lies in s, will name.
func (m *maker) openBeside(ctx context.Context, base, name string, s storage.Store) (storage.Store, error) {
	src, err := resolve(s, base, name)
	if err != nil {
		return nil, &Error{"create", name, err}
	}
	if err := src.plain(); err != nil {
		return nil, &Error{"create", src.name, err}
	}
	// Before it is opened: one file cannot be locked twice.
	if id := m.chain.identify(ctx, src); id != "" && id == identity(s) {
		return nil, &Error{"create", src.name, errors.New("it is the image itself")}
	}
	below, err := m.open(ctx, src)
	return below, Wrap("create", src.name, err)
}

// remove removes what was made.
func (m *maker) remove(ctx context.Context) error {
	var errs []error
	for _, src := range m.made {
		i := slices.IndexFunc(m.chain.Protocols, func(p storage.Protocol) bool { return p.Name == src.url.Scheme })
		if remove := m.chain.Protocols[i].Remove; remove != nil {
			errs = append(errs, Wrap("remove", src.name, remove(ctx, src.url)))
		}
	}
	return errors.Join(errs...)
}

// Beside returns what an image called base means by ref: a relative path
// starts where base lies.
func Beside(base, ref string) string { return combine(base, ref) }
