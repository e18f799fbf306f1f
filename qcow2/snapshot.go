package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

const snapshotFixed = 40 // bytes of a snapshot table entry before its variable part

// A snapshot is one entry of the snapshot table.
type snapshot struct {
	image.Snapshot
	l1At   uint64
	l1Size uint32 // entries
	extra  []byte // as it is, what we do not know of it included
}

// readSnapshots reads the snapshot table, whose place and count were checked.
func readSnapshots(s storage.Store, h *header) ([]snapshot, error) {
	if h.snapshotCount == 0 {
		return nil, nil
	}
	r := &tableReader{r: bufio.NewReaderSize(io.NewSectionReader(s, int64(h.snapshotOffset), maxSnapshotTable), 64<<10)}
	var list []snapshot
	for i := range h.snapshotCount {
		sn, err := readSnapshot(r, h)
		if err != nil {
			return list, fmt.Errorf("snapshot table entry %d: %w", i, err)
		}
		list = append(list, sn)
	}
	return list, nil
}

// readSnapshot reads one entry.
func readSnapshot(r *tableReader, h *header) (sn snapshot, err error) {
	be := binary.BigEndian
	r.align()
	b, err := r.next(snapshotFixed)
	if err != nil {
		return sn, err
	}
	sn.l1At, sn.l1Size = be.Uint64(b), be.Uint32(b[8:])
	idLen, nameLen, extraLen := be.Uint16(b[12:]), be.Uint16(b[14:]), be.Uint32(b[36:])
	sn.Created = time.Unix(int64(be.Uint32(b[16:])), int64(be.Uint32(b[20:])))
	sn.VMClock = time.Duration(be.Uint64(b[24:]))
	sn.VMStateSize = int64(be.Uint32(b[32:]))
	sn.Size, sn.ICount = h.diskSize(), -1
	if extraLen > maxSnapshotExtra {
		return sn, corrupt("too much extra metadata: %d bytes", extraLen)
	}
	if sn.extra, err = r.next(int(extraLen)); err != nil {
		return sn, err
	}
	if extraLen >= 8 {
		sn.VMStateSize = int64(be.Uint64(sn.extra))
	}
	if extraLen >= 16 {
		sn.Size = int64(be.Uint64(sn.extra[8:]) &^ 511)
	}
	if extraLen >= 24 {
		sn.ICount = int64(be.Uint64(sn.extra[16:]))
	}
	id, err := r.next(int(idLen))
	if err != nil {
		return sn, err
	}
	name, err := r.next(int(nameLen))
	sn.ID, sn.Name = string(id), string(name)
	return sn, err
}

// A tableReader reads records that follow each other.
type tableReader struct {
	r   *bufio.Reader
	off int64
}

func (t *tableReader) next(n int) ([]byte, error) {
	b := make([]byte, n)
	m, err := io.ReadFull(t.r, b)
	t.off += int64(m)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = corrupt("it is cut off")
	}
	return b, err
}

// align skips to a multiple of eight bytes.
func (t *tableReader) align() {
	n, _ := t.r.Discard(int(-t.off & 7)) // what is missing is missed by next
	t.off += int64(n)
}

// Snapshots lists the internal snapshots in the order of the table.
func (im *Image) Snapshots() []image.Snapshot {
	list := make([]image.Snapshot, len(im.snapshots))
	for i := range im.snapshots {
		list[i] = im.snapshots[i].Snapshot
	}
	return list
}

// OpenSnapshot opens a snapshot. Reading it does not disturb the image.
func (im *Image) OpenSnapshot(sel image.SnapshotSelector) (image.Device, error) {
	v, err := im.epochs.enter()
	if err != nil {
		return nil, err
	}
	defer v.leave()
	sn := im.findSnapshot(sel)
	if sn == nil {
		return nil, fmt.Errorf("snapshot %q: %w", sel.ID+sel.Name+sel.Any, fs.ErrNotExist)
	}
	if err := im.header.checkTable("Snapshot L1 table", sn.l1At, uint64(sn.l1Size), 8, maxL1Size); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", sn.Name, err)
	}
	// No L1 table covers more. Near 2^63, sums of offsets would overflow.
	if sn.Size < 0 || im.geo.l1Entries(sn.Size) > maxL1Size/8 {
		return nil, fmt.Errorf("snapshot %q: %w", sn.Name, corrupt("the disk is too big"))
	}
	d, err := newDisk(im.files, im.name, int64(sn.l1At), int(sn.l1Size), sn.Size, im.opt.l2Budget())
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", sn.Name, err)
	}
	return d, nil
}

func (im *Image) findSnapshot(sel image.SnapshotSelector) *snapshot {
	find := func(match func(*snapshot) bool) *snapshot {
		for i := range im.snapshots {
			if match(&im.snapshots[i]) {
				return &im.snapshots[i]
			}
		}
		return nil
	}
	if sel.ID == "" && sel.Name == "" {
		if sn := find(func(sn *snapshot) bool { return sn.ID == sel.Any }); sn != nil {
			return sn
		}
		return find(func(sn *snapshot) bool { return sn.Name == sel.Any })
	}
	return find(func(sn *snapshot) bool {
		return (sel.ID == "" || sn.ID == sel.ID) && (sel.Name == "" || sn.Name == sel.Name)
	})
}
