package file

import (
	"syscall"

	"github.com/imgnbd/imgnbd/storage"
)

// maxExtents bounds one answer, as each extent costs up to two system calls.
const maxExtents = 64

// AppendExtents asks the file system. Each answer was true at some moment
// during the call, whatever others do meanwhile; where the file system
// contradicts itself because of them, the rest is called data, which is always
// right.
func (s *store) AppendExtents(dst []storage.Extent, off, n int64) ([]storage.Extent, error) {
	if err := s.enter(off, n); err != nil {
		return dst, err
	}
	defer s.gate.Leave()
	s.writers.long() // a file in memory is locked while it is looked through
	defer s.writers.longDone()
	size, err := s.size()
	if err != nil {
		return dst, err
	}
	end := min(off+n, size)
	for range maxExtents {
		if off >= end {
			break
		}
		var e storage.Extent
		if e, err = s.extent(off, end); err != nil {
			return dst, err
		}
		dst = append(dst, e)
		off += e.Length
	}
	return dst, nil
}

// extent returns the extent that begins at off, cut at end, which was within
// the size.
func (s *store) extent(off, end int64) (storage.Extent, error) {
	all := storage.Extent{Offset: off, Length: end - off}
	if s.block || s.noSeek.Load() {
		return all, nil
	}
	data, err := seek(s.fd, off, seekData)
	switch {
	case err == syscall.ENXIO: // no data from here on
		all.Hole = true
		return all, nil
	case err == syscall.EINVAL || unsupported(err):
		s.noSeek.Store(true)
		return all, nil
	case err != nil:
		return all, err
	case data > off:
		return storage.Extent{Offset: off, Length: min(data, end) - off, Hole: true}, nil
	}
	hole, err := seek(s.fd, off, seekHole)
	switch {
	case err == syscall.ENXIO: // cut short since
		return all, nil
	case err != nil:
		return all, err
	case hole > off:
		all.Length = min(hole, end) - off
	}
	return all, nil
}
