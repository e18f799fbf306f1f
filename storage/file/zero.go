package file

import (
	"errors"
	"sync/atomic"
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

func (s *store) WriteZeroes(off, n int64, flags storage.WriteFlags) error {
	if err := s.enterToWrite(off, n); err != nil {
		return err
	}
	defer s.gate.Leave()
	if n == 0 {
		return nil
	}
	s.writers.long()
	defer s.writers.longDone()
	zero := s.zeroFile
	if s.block {
		zero = s.zeroBlocks
	}
	err := zero(off, n, flags)
	if errors.Is(err, errors.ErrUnsupported) && flags&storage.FastOnly == 0 {
		err = s.zeroByWriting(off, n)
	}
	if err != nil {
		return err
	}
	return s.finish(flags)
}

// zeroFile zeroes a range of a regular file without writing it. It answers
// errors.ErrUnsupported, having changed nothing, if the file system cannot.
func (s *store) zeroFile(off, n int64, flags storage.WriteFlags) error {
	if flags&storage.MayUnmap != 0 {
		err := s.punch(off, n)
		if err == nil {
			return s.extend(off + n)
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return s.zeroRange(off, n)
}

// extend makes a regular file at least end long, by writing the last byte of
// what is being zeroed. Setting the size could cut off what another call has
// just written behind it.
func (s *store) extend(end int64) error {
	size, err := s.size()
	if err != nil || size >= end {
		return err
	}
	return s.write(zeroes[:1], end-1)
}

// zeroBlocks zeroes a range of a block device: whole sectors by the device or
// the kernel, the rest by writing.
func (s *store) zeroBlocks(off, n int64, flags storage.WriteFlags) error {
	start, end := s.sectors(off, n)
	if start >= end {
		return errors.ErrUnsupported
	}
	if err := s.zeroSectors(start, end-start, flags); err != nil {
		return err
	}
	if err := s.zeroByWriting(off, start-off); err != nil {
		return err
	}
	return s.zeroByWriting(end, off+n-end)
}

func (s *store) zeroSectors(off, n int64, flags storage.WriteFlags) error {
	if flags&storage.MayUnmap != 0 {
		if err := s.punch(off, n); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	// Where the device cannot, the kernel writes zeros for it.
	if flags&storage.FastOnly != 0 && !s.info.FastZero {
		return errors.ErrUnsupported
	}
	return s.zeroRange(off, n)
}

func (s *store) Discard(off, n int64) error {
	if err := s.enterToDiscard(off, n); err != nil {
		return err
	}
	defer s.gate.Leave()
	if n == 0 {
		return nil
	}
	s.writers.long()
	defer s.writers.longDone()
	size, err := s.size()
	if err != nil {
		return err
	}
	n = min(n, size-off)
	if s.block {
		start, end := s.sectors(off, n)
		off, n = start, end-start
	}
	if n <= 0 {
		return nil
	}
	// What is punched reads as zeros, by contract of the kernel. Devices that
	// can only discard keep the bytes or zero them too, but for some drives.
	err = s.punch(off, n)
	if s.block && errors.Is(err, errors.ErrUnsupported) {
		err = s.ask(&s.noDiscard, off, n, discardBlocks)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

func (s *store) enterToDiscard(off, n int64) error {
	if s.info.ReadOnly {
		return storage.ErrReadOnly
	}
	return s.enter(off, n)
}

// punch gives the range back. Of a device the kernel forgets what is in the page
// cache first, also if it then finds that the device cannot: so until that has been
// seen to work, what was written is safe on the device before.
func (s *store) punch(off, n int64) error {
	if s.block && !s.noPunch.Load() && !s.punches.Load() {
		if err := s.barrier.sync(s.datasync); err != nil {
			return err
		}
	}
	err := s.ask(&s.noPunch, off, n, punchHole)
	if err == nil && s.block && !s.punches.Load() {
		s.punches.Store(true)
	}
	return err
}

func (s *store) zeroRange(off, n int64) error { return s.ask(&s.noZero, off, n, zeroRange) }

// sectors returns the whole sectors within [off, off+n); start may be past end.
func (s *store) sectors(off, n int64) (start, end int64) {
	return roundUp(off, s.sector), roundDown(off+n, s.sector)
}

// zeroes is what zeroByWriting writes; nobody writes to it.
var zeroes [256 << 10]byte

func (s *store) zeroByWriting(off, n int64) error {
	for n > 0 {
		p := zeroes[:min(n, int64(len(zeroes)))]
		if err := s.write(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// ask does something to a range that the medium may not know. If it does not,
// that is remembered in no, and is errors.ErrUnsupported. So is EINVAL, for that
// once: some file systems mean by it that they cannot, or not with this range.
func (s *store) ask(no *atomic.Bool, off, n int64, do func(fd int, off, n int64) error) error {
	if no.Load() {
		return errors.ErrUnsupported
	}
	defer s.lockRange(off, n)()
	err := retry(func() error { return do(s.fd, off, n) })
	if unsupported(err) {
		no.Store(true)
		return errors.ErrUnsupported
	}
	if err == syscall.EINVAL {
		return errors.ErrUnsupported
	}
	return err
}
