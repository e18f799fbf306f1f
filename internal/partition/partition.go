// Package partition reads the partition tables of disks: MBR with its logical
// partitions, and GPT. It takes for partitions what Linux does, under the same
// numbers, and believes nothing that a table says before it was checked. It
// never writes.
package partition

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// ErrNone is the error of a disk that has no table of a kind known here.
var ErrNone = errors.New("no partition table (MBR or GPT)")

// A Scheme is a kind of table, by the name that sfdisk has for it.
type Scheme string

const (
	MBR Scheme = "dos"
	GPT Scheme = "gpt"
)

// A Table is what is written on a disk.
type Table struct {
	Scheme     Scheme
	ID         string // of the disk, as sfdisk prints it
	SectorSize int64  // bytes; the unit of all numbers of sectors

	// First and Last are the sectors that partitions of a GPT may have.
	First, Last uint64

	Partitions []Partition // in the order of the table

	// Damage says what of the table could not be read, or is not as it
	// should be. The partitions are right all the same.
	Damage []error
}

// A Partition is one entry of a table.
type Partition struct {
	Number   int    // from 1, as Linux counts
	Start    uint64 // sector
	Sectors  uint64
	Type     string // a GUID, or two hexadecimal digits
	ID       string // a GUID; "" in an MBR
	Name     string // of a GPT, as it stands there
	Attrs    string // of a GPT, as sfdisk prints them
	Bootable bool   // of an MBR: the active one
	Extended bool   // of an MBR: it holds the logical ones

	// Problem is why the partition cannot be used, nil if it can.
	Problem error
}

// Read reads the table of a disk of size bytes. A disk without one is ErrNone;
// errors of r are passed on. It reads a few sectors, and of a GPT up to 4 MiB.
func Read(r io.ReaderAt, size int64) (*Table, error) {
	d := &disk{r, size}
	b := make([]byte, sector)
	if size < sector {
		return nil, ErrNone
	}
	if err := d.read(b, 0); err != nil {
		return nil, err
	}
	m, ok := parseMBR(b)
	switch {
	case !ok:
		return nil, ErrNone
	case m.protective():
		return d.readGPT()
	case m.displaced():
		return nil, errors.New("the MBR is there to protect a GPT, but not from sector 1 on: neither is taken for a table")
	}
	return d.readMBR(m)
}

// sector is the unit of an MBR, in bytes. That of disks with larger sectors
// counts those, but does not say so.
const sector = 512

// A disk is what a table is read from.
type disk struct {
	io.ReaderAt
	size int64
}

// read fills p, which has to be within the disk.
func (d *disk) read(p []byte, off int64) error {
	if off < 0 || off > d.size-int64(len(p)) {
		return fmt.Errorf("%d bytes at %d are past the end of the disk (%d)", len(p), off, d.size)
	}
	n, err := d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// add appends a partition, and looks whether the disk has all of it.
func (t *Table) add(d *disk, p Partition) {
	sectors := uint64(d.size / t.SectorSize)
	if p.Sectors == 0 || p.Start > math.MaxUint64-p.Sectors {
		p.Problem = fmt.Errorf("partition %d: it ends before it begins, at sector %d", p.Number, p.Start)
	} else if end := p.Start + p.Sectors; end > sectors {
		p.Problem = fmt.Errorf("partition %d: it ends at sector %d, the disk at %d", p.Number, end, sectors)
	}
	t.Partitions = append(t.Partitions, p)
}

// Find returns the partition of a number if it can be used, and where it is,
// in bytes.
func (t *Table) Find(number int) (p Partition, off, n int64, err error) {
	i := slices.IndexFunc(t.Partitions, func(p Partition) bool { return p.Number == number })
	if i < 0 {
		return p, 0, 0, together(append([]error{t.missing(number)}, t.Damage...)...)
	}
	p = t.Partitions[i]
	switch {
	case p.Problem != nil:
		return p, 0, 0, p.Problem
	case p.Extended:
		return p, 0, 0, fmt.Errorf("partition %d: it only holds the logical ones, which begin with 5", number)
	}
	return p, int64(p.Start) * t.SectorSize, int64(p.Sectors) * t.SectorSize, nil
}

// together makes one error, of one line.
func together(errs ...error) error {
	all := errs[0]
	for _, err := range errs[1:] {
		all = fmt.Errorf("%w; %w", all, err)
	}
	return all
}

func (t *Table) missing(number int) error {
	if len(t.Partitions) == 0 {
		return fmt.Errorf("there is no partition %d: the table is empty", number)
	}
	const most = 16 // a table may have thousands
	var numbers []string
	for _, p := range t.Partitions[:min(len(t.Partitions), most)] {
		numbers = append(numbers, strconv.Itoa(p.Number))
	}
	if len(t.Partitions) > most {
		numbers = append(numbers, "...")
	}
	return fmt.Errorf("there is no partition %d, only %s", number, strings.Join(numbers, ", "))
}
