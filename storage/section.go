package storage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Section returns the n bytes of s from begin on as a store of fixed size; with
// n < 0, all of them, however many there will be. Its identity tells it from what
// begins elsewhere in s. Closing it closes s, of which it never touches other bytes.
func Section(s Store, begin, n int64) (Store, error) {
	size, err := s.Size()
	if err != nil {
		return nil, err
	}
	if err := CheckSection(size, begin, n); err != nil {
		return nil, err
	}
	info := s.Info()
	info.FixedSize = info.FixedSize || n >= 0
	if begin%int64(info.Alignment) != 0 {
		info.Alignment = 1
	}
	if begin > 0 && info.ID != "" {
		info.ID += fmt.Sprintf(" from %d", begin)
	}
	return &section{s, info, begin, n}, nil
}

// CheckSection returns an error, in QEMU's words, unless total bytes have n from
// begin on. n < 0 stands for those that there are.
func CheckSection(total, begin, n int64) error {
	switch {
	case begin < 0:
		return ErrOutOfRange
	case begin > total:
		return fmt.Errorf("Offset (%d) cannot be greater than size of the containing file (%d)", begin, total)
	case n > total-begin:
		return fmt.Errorf("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)", begin, n, total)
	}
	return nil
}

type section struct {
	Store
	info  Info
	begin int64
	size  int64 // -1: as far as the store goes
}

func (s *section) Info() Info { return s.info }

// within cuts n bytes at off to those that there are. What lies past the end of
// the store is for that to find, if the section has no end of its own.
func (s *section) within(off, n int64) (int64, error) {
	if err := CheckRange(off, n); err != nil {
		return 0, err
	}
	if err := CheckRange(s.begin+off, n); err != nil {
		return 0, err
	}
	if s.size >= 0 {
		n = max(0, min(n, s.size-off))
	}
	return n, nil
}

func (s *section) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.within(off, int64(len(p)))
	switch {
	case err != nil:
		return 0, err
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	m, err := s.Store.ReadAt(p[:n], s.begin+off)
	if err == nil && m < len(p) {
		err = io.EOF
	}
	return m, err
}

func (s *section) TryReadAt(p []byte, off int64) error {
	n, err := s.within(off, int64(len(p)))
	switch {
	case err != nil:
		return err
	case n < int64(len(p)):
		return io.EOF
	}
	return s.Store.TryReadAt(p, s.begin+off)
}

// room returns an error unless n bytes at off may be written.
func (s *section) room(off, n int64) error {
	has, err := s.within(off, n)
	switch {
	case err != nil:
		return err
	case s.info.ReadOnly:
		return ErrReadOnly
	case has < n:
		return syscall.ENOSPC
	}
	return nil
}

func (s *section) WriteAt(p []byte, off int64, flags WriteFlags) error {
	if err := s.room(off, int64(len(p))); err != nil {
		return err
	}
	return s.Store.WriteAt(p, s.begin+off, flags)
}

func (s *section) WriteZeroes(off, n int64, flags WriteFlags) error {
	if err := s.room(off, n); err != nil {
		return err
	}
	return s.Store.WriteZeroes(s.begin+off, n, flags)
}

func (s *section) Discard(off, n int64) error {
	n, err := s.within(off, n)
	if err != nil {
		return err
	}
	return s.Store.Discard(s.begin+off, n)
}

func (s *section) Size() (int64, error) {
	size, err := s.Store.Size()
	if size = max(0, size-s.begin); s.size >= 0 {
		size = min(size, s.size) // less, if somebody has cut the store short
	}
	return size, err
}

func (s *section) Truncate(size int64) error {
	switch {
	case size < 0 || s.begin+size < s.begin:
		return ErrOutOfRange
	case s.info.ReadOnly:
		return ErrReadOnly
	case s.size < 0:
		return s.Store.Truncate(s.begin + size)
	}
	now, err := s.Size()
	if err == nil && size != now {
		err = errors.ErrUnsupported
	}
	return err
}

func (s *section) AppendExtents(dst []Extent, off, n int64) ([]Extent, error) {
	n, err := s.within(off, n)
	if err != nil || n == 0 {
		return dst, err
	}
	first := len(dst)
	dst, err = s.Store.AppendExtents(dst, s.begin+off, n)
	for i := range dst[first:] {
		dst[first+i].Offset -= s.begin
	}
	return dst, err
}

// File is nil: what is sent from it would begin elsewhere.
func (s *section) File() *os.File { return nil }
