package asif

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/imgnbd/imgnbd/storage"
)

// A segment says where a run of the disk lies.
type segment struct {
	off, n int64
	host   int64 // offset in the file; -1: it reads as zeros
}

// A mapping finds the segments of a disk. The image does not change, so
// nothing that was read is ever read again for being old.
type mapping struct {
	geometry
	store    storage.Store
	fileSize int64
	tables   []int64 // chunk numbers, 0: all zeros

	mu    sync.RWMutex
	pages map[int64]*[pageSize]byte // of tables and bitmaps, by file offset
}

const (
	pageSize = 4096
	maxPages = 1024 // 4 MiB
)

// status of a data chunk: the two highest bits of its entry.
const (
	statusFull = 1
	statusPart = 3

	chunkMask    = 1<<55 - 1
	reservedMask = 0x7f << 55
)

// next returns the first segment of [off, off+n). With try it answers
// storage.ErrWouldBlock rather than wait for metadata.
func (m *mapping) next(off, n int64, try bool) (segment, error) {
	t := off / m.tableSpan
	inTable := off - t*m.tableSpan
	if m.tables[t] == 0 {
		return segment{off, min(n, m.tableSpan-inTable), -1}, nil
	}
	group := m.tables[t]*m.chunk + inTable/m.groupSpan*m.groupSize
	inGroup := inTable % m.groupSpan
	i, inChunk := inGroup/m.chunk, inGroup%m.chunk
	n = min(n, m.chunk-inChunk)
	entry, err := m.word(group+8*i, try)
	if err != nil {
		return segment{}, err
	}
	number := int64(entry & chunkMask)
	status := entry >> 62
	fail := func(what string, args ...any) (segment, error) {
		return segment{}, fmt.Errorf("entry %#x of the chunk at %#x: %w", entry, off-inChunk, corrupt(what, args...))
	}
	switch {
	case entry == 0:
		return segment{off, n, -1}, nil
	case entry&reservedMask != 0 || status != statusFull && status != statusPart:
		return segment{}, fmt.Errorf("entry %#x of the chunk at %#x, which means something unknown: %w", entry, off-inChunk, errors.ErrUnsupported)
	case number == 0:
		return fail("it points to the header")
	case number > m.fileSize/m.chunk:
		return fail("it points past the end (%#x)", m.fileSize)
	}
	host := number*m.chunk + inChunk
	if status == statusFull {
		if host > m.fileSize-n {
			return fail("its data ends past the end (%#x)", m.fileSize)
		}
		return segment{off, n, host}, nil
	}

	bitmap, err := m.word(group+8*m.perGroup, try)
	if err != nil {
		return segment{}, err
	}
	bitmap &= chunkMask
	if bitmap == 0 || bitmap > uint64(m.fileSize/m.chunk) {
		return fail("its bitmap is said to be at chunk %#x", bitmap)
	}
	written, run, err := m.sectors(int64(bitmap)*m.chunk, inGroup/m.sector, (inChunk+n-1)/m.sector-inChunk/m.sector+1, try)
	if err != nil {
		return segment{}, fmt.Errorf("chunk at %#x: %w", off-inChunk, err)
	}
	n = min(n, run*m.sector-inChunk%m.sector)
	if !written {
		host = -1
	} else if host > m.fileSize-n {
		return fail("its data ends past the end (%#x)", m.fileSize)
	}
	return segment{off, n, host}, nil
}

// sectors looks up, in the bitmap at a file offset, how many of at most n
// sectors from first on are alike, and whether they were written.
func (m *mapping) sectors(bitmap, first, n int64, try bool) (written bool, run int64, err error) {
	for ; run < n; run++ {
		s := first + run
		b, err := m.word(bitmap+s/4&^7, try)
		if err != nil {
			return false, 0, err
		}
		// The word is big-endian: byte k of it holds sectors 4k to 4k+3, the
		// first in the lowest bits.
		state := byte(b>>(8*(7-s/4%8))) >> (s % 4 * 2) & 3
		if state > 1 {
			return false, 0, fmt.Errorf("sector state %d, which means something unknown: %w", state, errors.ErrUnsupported)
		}
		if run == 0 {
			written = state == 1
		} else if written != (state == 1) {
			break
		}
	}
	return written, run, nil
}

// word reads 8 bytes of metadata at an offset that is a multiple of 8.
func (m *mapping) word(off int64, try bool) (uint64, error) {
	if off > m.fileSize-8 {
		return 0, corrupt("metadata at %#x is past the end (%#x)", off, m.fileSize)
	}
	at := off &^ (pageSize - 1)
	m.mu.RLock()
	page := m.pages[at]
	m.mu.RUnlock()
	if page == nil {
		var err error
		if page, err = m.load(at, try); err != nil {
			return 0, err
		}
	}
	return binary.BigEndian.Uint64(page[off-at:]), nil
}

func (m *mapping) load(at int64, try bool) (*[pageSize]byte, error) {
	page := new([pageSize]byte)
	p := page[:min(pageSize, m.fileSize-at)]
	var err error
	if try {
		err = m.store.TryReadAt(p, at)
	} else {
		err = readFull(m.store, p, at)
	}
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.pages) >= maxPages {
		for at := range m.pages { // any will do
			delete(m.pages, at)
			break
		}
	}
	m.pages[at] = page
	return page, nil
}
