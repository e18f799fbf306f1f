//go:build linux

// Logwrites replays a log of the kernel's dm-log-writes, which has what reached
// a disk, in the order in which flushes made it durable:
//
//	logwrites LOG            prints the number of entries, and for each mark its own and its name
//	logwrites LOG FILE N     makes FILE what the disk was after N entries
//
// FILE is made anew. The format of the log is described by the kernel's
// Documentation/admin-guide/device-mapper/log-writes.rst.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
)

const (
	logMagic    = 0x6a736677736872
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "logwrites: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) != 1 && len(args) != 3 {
		return errors.New("usage: logwrites LOG [FILE N]")
	}
	log, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer log.Close()
	r, err := newReader(log)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	if len(args) == 1 {
		return r.list(out)
	}
	n, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil || n > r.entries {
		return fmt.Errorf("%q is not a number of up to %d entries", args[2], r.entries)
	}
	file, err := os.Create(args[1])
	if err != nil {
		return err
	}
	defer file.Close()
	if err := r.replay(file, n); err != nil {
		return err
	}
	return file.Close()
}

// A reader goes through a log.
type reader struct {
	log     io.ReaderAt
	entries uint64
	sector  int64 // bytes
	at      int64
}

// An entry is what was done in one step: data, if it is neither a discard nor
// a mark, was written at an offset.
type entry struct {
	offset, length int64 // bytes
	flags          uint64
	data           int64 // where it lies in the log
	mark           string
}

func newReader(log io.ReaderAt) (*reader, error) {
	b := make([]byte, 512)
	if _, err := log.ReadAt(b, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint64(b) != logMagic || le.Uint64(b[8:]) != 1 {
		return nil, errors.New("no log of dm-log-writes, version 1")
	}
	r := &reader{log: log, entries: le.Uint64(b[16:]), sector: int64(le.Uint32(b[24:]))}
	if r.sector < 512 || r.sector > 1<<16 {
		return nil, fmt.Errorf("sectors of %d bytes", r.sector)
	}
	r.at = r.sector
	return r, nil
}

func (r *reader) next() (e entry, err error) {
	b := make([]byte, r.sector)
	if _, err := r.log.ReadAt(b, r.at); err != nil {
		return e, fmt.Errorf("log entry at %d: %w", r.at, err)
	}
	r.at += r.sector
	le := binary.LittleEndian
	e = entry{offset: int64(le.Uint64(b)) * r.sector, length: int64(le.Uint64(b[8:])) * r.sector, flags: le.Uint64(b[16:]), data: r.at}
	if e.flags&flagMark != 0 {
		n := min(le.Uint64(b[24:]), uint64(len(b)-32))
		e.mark = string(b[32 : 32+n])
		return e, nil
	}
	if e.flags&flagDiscard == 0 {
		r.at += e.length
	}
	return e, nil
}

func (r *reader) list(out io.Writer) error {
	fmt.Fprintln(out, r.entries)
	for i := range r.entries {
		e, err := r.next()
		if err != nil {
			return err
		}
		if e.flags&flagMark != 0 {
			fmt.Fprintln(out, i, e.mark)
		}
	}
	return nil
}

func (r *reader) replay(file *os.File, n uint64) error {
	var buf []byte
	zeros := make([]byte, 1<<20)
	for range n {
		e, err := r.next()
		if err != nil {
			return err
		}
		end := e.offset + e.length
		if st, err := file.Stat(); err != nil {
			return err
		} else if st.Size() < end && e.flags&flagMark == 0 {
			if err := file.Truncate(end); err != nil {
				return err
			}
		}
		switch {
		case e.flags&flagMark != 0 || e.length == 0:
		case e.flags&flagDiscard != 0:
			for at := e.offset; at < end; at += int64(len(zeros)) {
				if _, err := file.WriteAt(zeros[:min(end-at, int64(len(zeros)))], at); err != nil {
					return err
				}
			}
		default:
			if int64(cap(buf)) < e.length {
				buf = make([]byte, e.length)
			}
			buf = buf[:e.length]
			if _, err := r.log.ReadAt(buf, e.data); err != nil {
				return fmt.Errorf("data at %d: %w", e.data, err)
			}
			if _, err := file.WriteAt(buf, e.offset); err != nil {
				return err
			}
		}
	}
	return nil
}
