package asif

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/imgnbd/imgnbd/image"
)

const (
	magic      = "shdw"
	headerSize = 0x50 // bytes of the header that have a meaning for us

	// Bounds of what is accepted. They keep arithmetic within 63 bits and the
	// directory, which is held in memory, within 8 MiB.
	maxSize    = 1 << 60
	maxChunk   = 64 << 20
	maxEntries = 1 << 20
)

// A header is the first sector of an image.
type header struct {
	directories [2]int64 // byte offsets
	size        int64    // of the disk, in bytes
	chunk       int64    // bytes
	sector      int64    // bytes
}

// geometry is what follows from the header: how much of the disk each
// structure describes.
type geometry struct {
	chunk, sector int64
	perGroup      int64 // data chunks of a group
	groupSize     int64 // bytes of a group within its table
	groupSpan     int64 // bytes of the disk
	tableSpan     int64 // bytes of the disk
}

func probe(r io.ReaderAt, _ int64) bool {
	var b [8]byte
	_, err := r.ReadAt(b[:], 0)
	// A version is part of it, so that a text file that begins so is none.
	return err == nil && string(b[:4]) == magic && binary.BigEndian.Uint32(b[4:]) < 256
}

func readHeader(r io.ReaderAt) (h header, err error) {
	var b [headerSize]byte
	if _, err := r.ReadAt(b[:], 0); err != nil {
		if errors.Is(err, io.EOF) {
			return h, fmt.Errorf("%w: the file ends within the header", image.ErrWrongFormat)
		}
		return h, err
	}
	be := binary.BigEndian
	if string(b[:4]) != magic {
		return h, image.ErrWrongFormat
	}
	if v := be.Uint32(b[4:]); v != 1 {
		return h, fmt.Errorf("ASIF version %d: %w", v, errors.ErrUnsupported)
	}
	if n := be.Uint32(b[8:]); n < headerSize {
		return h, corrupt("the header says that it has %d bytes", n)
	}
	if n := be.Uint16(b[0x46:]); n > 1 {
		return h, fmt.Errorf("an image of %d segments: %w", n, errors.ErrUnsupported)
	}
	sectors, most := be.Uint64(b[0x30:]), be.Uint64(b[0x38:])
	h.chunk, h.sector = int64(be.Uint32(b[0x40:])), int64(be.Uint16(b[0x44:]))
	switch {
	case h.sector < 512 || h.sector > 4096 || h.sector&(h.sector-1) != 0:
		return h, corrupt("sectors of %d bytes", h.sector)
	case h.chunk > maxChunk || h.chunk < 8*(4*h.sector+1) || h.chunk%h.sector != 0:
		return h, corrupt("chunks of %d bytes with sectors of %d", h.chunk, h.sector)
	case sectors > most:
		return h, corrupt("%d sectors where there may be %d", sectors, most)
	case sectors > maxSize/uint64(h.sector):
		return h, corrupt("%d sectors are too many", sectors)
	}
	h.size = int64(sectors) * h.sector
	for i := range h.directories {
		off := be.Uint64(b[0x10+8*i:])
		if off < headerSize || off > maxSize || off%8 != 0 {
			return h, corrupt("directory at %#x", off)
		}
		h.directories[i] = int64(off)
	}
	return h, nil
}

func (h *header) geometry() geometry {
	g := geometry{chunk: h.chunk, sector: h.sector, perGroup: 4 * h.sector}
	g.groupSize = 8 * (g.perGroup + 1)
	g.groupSpan = g.perGroup * h.chunk
	g.tableSpan = h.chunk / g.groupSize * g.groupSpan
	return g
}

// tables returns how many tables describe the disk.
func (h *header) tables() int64 {
	span := h.geometry().tableSpan
	return (h.size + span - 1) / span
}

// readDirectory returns the chunk numbers of the tables, from the directory
// that was written last.
func readDirectory(r io.ReaderAt, h *header, fileSize int64) ([]int64, error) {
	n := h.tables()
	if n > maxEntries {
		return nil, corrupt("%d tables are too many", n)
	}
	var newest, at int64 = -1, 0
	for _, off := range h.directories {
		if off > fileSize-8*(n+1) {
			return nil, corrupt("directory at %#x ends past the end (%#x)", off, fileSize)
		}
		var b [8]byte
		if err := readFull(r, b[:], off); err != nil {
			return nil, err
		}
		sequence := binary.BigEndian.Uint64(b[:])
		if sequence > 1<<62 {
			return nil, corrupt("directory at %#x: sequence number %#x", off, sequence)
		}
		if int64(sequence) > newest {
			newest, at = int64(sequence), off
		}
	}
	b := make([]byte, 8*n)
	if err := readFull(r, b, at+8); err != nil {
		return nil, err
	}
	tables := make([]int64, n)
	for i := range tables {
		e := binary.BigEndian.Uint64(b[8*i:])
		if e > uint64(fileSize/h.chunk) {
			return nil, corrupt("directory at %#x, entry %d: chunk %#x is past the end (%#x)", at, i, e, fileSize)
		}
		tables[i] = int64(e)
	}
	return tables, nil
}

// readFull reads what has to be there.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) && (err == nil || errors.Is(err, io.EOF)) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return corrupt("%d bytes at %#x: the file ends before", len(p), off)
	}
	return err
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", image.ErrCorrupt, fmt.Sprintf(format, args...))
}
