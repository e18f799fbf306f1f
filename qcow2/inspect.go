package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Specific is what qemu-img info shows under "format-specific", with its names
// in its order. What version 2 does not have is nil.
type Specific struct {
	Compat          string       `json:"compat"`
	CompressionType string       `json:"compression-type"`
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps         []BitmapFlag `json:"bitmaps,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	DataFile        string       `json:"data-file,omitempty"`
	Encrypt         *Encryption  `json:"encrypt,omitempty"`
	DataFileRaw     *bool        `json:"data-file-raw,omitempty"`
	Corrupt         *bool        `json:"corrupt,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
}

// A BitmapFlag describes a bitmap; the flags are "in-use" and "auto".
type BitmapFlag struct {
	Flags       []string `json:"flags"`
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes per bit
}

// Encryption says how an image is encrypted; of method aes only that it is.
type Encryption struct {
	IVGenAlg       string    `json:"ivgen-alg,omitempty"`
	HashAlg        string    `json:"hash-alg,omitempty"`
	CipherAlg      string    `json:"cipher-alg,omitempty"`
	UUID           string    `json:"uuid,omitempty"`
	IVGenHashAlg   string    `json:"ivgen-hash-alg,omitempty"`
	Format         string    `json:"format"`
	CipherMode     string    `json:"cipher-mode,omitempty"`
	Slots          []KeySlot `json:"slots,omitempty"`
	PayloadOffset  int64     `json:"payload-offset,omitempty"` // bytes
	MasterKeyIters int64     `json:"master-key-iters,omitempty"`
}

// A KeySlot is one of the keys that open an encrypted image.
type KeySlot struct {
	Active    bool  `json:"active"`
	Iters     int64 `json:"iters,omitempty"`
	KeyOffset int64 `json:"key-offset"` // bytes
	Stripes   int64 `json:"stripes,omitempty"`
}

// inspect reads what can be read, and says why Open would refuse the rest.
func inspect(_ context.Context, s storage.Store, params []image.Param) (*image.Inspection, error) {
	if _, err := parseOptions(params); err != nil {
		return nil, err
	}
	h, err := readHeader(s)
	if h == nil {
		if errors.Is(err, image.ErrCorrupt) || errors.Is(err, errors.ErrUnsupported) {
			return &image.Inspection{Format: "qcow2", VirtualSize: -1, Problem: err}, nil
		}
		return nil, err
	}
	in := &image.Inspection{
		Format:        "qcow2",
		VirtualSize:   h.diskSize(),
		ClusterSize:   1 << h.clusterBits,
		Encrypted:     h.crypt != cryptNone,
		Dirty:         h.incompatible&incompatDirty != 0,
		BackingName:   h.backing,
		BackingFormat: h.backingFormat(),
		DataFile:      h.dataFileName(),
		Problem:       err,
	}
	sp := h.specific()
	in.Specific = sp
	if err := h.check(forReading); err != nil {
		in.Problem = errors.Join(in.Problem, err)
		return in, nil
	}
	if h.crypt != cryptNone {
		in.Problem = errEncrypted
		sp.Encrypt = readEncryption(s, h)
	}
	snapshots, err := readSnapshots(s, h)
	if err != nil {
		in.Problem = fmt.Errorf("Could not read snapshots: %w", err)
	}
	for i := range snapshots {
		in.Snapshots = append(in.Snapshots, snapshots[i].Snapshot)
	}
	bitmaps, err := readBitmaps(s, h, nil)
	if err != nil {
		in.Problem = err
	}
	for i := range bitmaps {
		b := &bitmaps[i]
		if b.lost.Load() {
			break // qemu-img shows none then
		}
		f := BitmapFlag{Flags: []string{}, Name: b.name, Granularity: 1 << b.granularity}
		if b.flags&bitmapInUse != 0 {
			f.Flags = append(f.Flags, "in-use")
		}
		if b.flags&bitmapAuto != 0 {
			f.Flags = append(f.Flags, "auto")
		}
		sp.Bitmaps = append(sp.Bitmaps, f)
	}
	return in, nil
}

// specific returns what the header alone says.
func (h *header) specific() *Specific {
	sp := &Specific{Compat: "0.10", CompressionType: "zlib", RefcountBits: 1 << min(h.refcountOrder, 6), DataFile: h.dataFileName()}
	if h.version < 3 {
		return sp
	}
	has := func(b bool) *bool { return &b }
	sp.Compat = "1.1"
	if h.compression == compressionZstd {
		sp.CompressionType = "zstd"
	}
	sp.LazyRefcounts = has(h.compatible&compatLazyRefcounts != 0)
	if h.incompatible&incompatDataFile != 0 {
		sp.DataFileRaw = has(h.autoclear&autoclearDataFileRaw != 0)
	}
	sp.Corrupt = has(h.incompatible&incompatCorrupt != 0)
	sp.ExtendedL2 = has(h.incompatible&incompatExtendedL2 != 0)
	return sp
}

// readEncryption describes the encryption of an image as far as it can be read.
func readEncryption(s storage.Store, h *header) *Encryption {
	if h.crypt == cryptAES {
		return &Encryption{Format: "aes"}
	}
	e := &Encryption{Format: "luks"}
	x := h.extension(extCrypto)
	if len(x) != 16 {
		return e
	}
	b := make([]byte, luksHeader)
	if n, err := s.ReadAt(b, int64(binary.BigEndian.Uint64(x))); n == len(b) && (err == nil || errors.Is(err, io.EOF)) {
		e.parseLUKS(b)
	}
	return e
}

const luksHeader = 592 // bytes of a LUKS header, version 1

// parseLUKS fills in what a LUKS header says, nothing if it is none.
func (e *Encryption) parseLUKS(b []byte) {
	be := binary.BigEndian
	if !bytes.HasPrefix(b, []byte("LUKS\xba\xbe\x00\x01")) {
		return
	}
	text := func(b []byte) string {
		s, _, _ := bytes.Cut(b, []byte{0})
		return strings.ToValidUTF8(string(s), "?")
	}
	keyBits := int64(be.Uint32(b[108:])) * 8
	e.CipherMode, e.IVGenAlg, _ = strings.Cut(text(b[40:72]), "-")
	e.IVGenAlg, e.IVGenHashAlg, _ = strings.Cut(e.IVGenAlg, ":")
	if e.CipherMode == "xts" {
		keyBits /= 2 // two keys
	}
	e.CipherAlg = fmt.Sprintf("%s-%d", text(b[8:40]), keyBits)
	e.HashAlg = text(b[72:104])
	e.PayloadOffset = int64(be.Uint32(b[104:])) * 512
	e.MasterKeyIters = int64(be.Uint32(b[164:]))
	e.UUID = text(b[168:208])
	for slot := b[208:luksHeader]; len(slot) > 0; slot = slot[48:] {
		k := KeySlot{Active: be.Uint32(slot) == 0x00ac71f3, KeyOffset: int64(be.Uint32(slot[40:])) * 512}
		if k.Active {
			k.Iters, k.Stripes = int64(be.Uint32(slot[4:])), int64(be.Uint32(slot[44:]))
		}
		e.Slots = append(e.Slots, k)
	}
}
