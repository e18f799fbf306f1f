package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"unicode"

	"github.com/imgnbd/imgnbd/image"
)

const (
	magic           = 0x514649fb // "QFI\xfb"
	headerLengthV2  = 72
	headerLengthMin = 104 // of version 3
	headerLengthNew = 112 // what we write: with the compression type
)

// Incompatible features: one that is not known forbids any use of the image.
type incompatible uint64

const (
	incompatDirty       incompatible = 1 << iota // refcounts may be too low
	incompatCorrupt                              // found corrupt by a writer
	incompatDataFile                             // guest data in another file
	incompatCompression                          // compression other than zlib
	incompatExtendedL2                           // subclusters

	incompatKnown = incompatDirty | incompatCorrupt | incompatDataFile | incompatCompression | incompatExtendedL2
)

// Compatible features: one that is not known does not matter.
type compatible uint64

const compatLazyRefcounts compatible = 1 << 0

// Autoclear features: one that is not known is cleared by who writes.
type autoclear uint64

const (
	autoclearBitmaps     autoclear = 1 << iota // the bitmaps extension is valid
	autoclearDataFileRaw                       // the data file reads as the disk
)

// autoclearSeal are the bits of the seal of whoever keeps a journal: a number
// of its own while it writes. No feature of the format is among them, so that
// any other writer breaks the seal as soon as it opens the image.
const autoclearSeal autoclear = 0xffffffff << 32

// Encryption methods.
const (
	cryptNone = iota
	cryptAES
	cryptLUKS
)

// A compression is the method that compressed clusters are made with.
type compression uint8

const (
	compressionZlib compression = iota // raw deflate
	compressionZstd
)

// Header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extCrypto        = 0x0537be77
	extBitmaps       = 0x23852875
	extDataFile      = 0x44415441
)

// A header is what the first cluster of an image says: the fixed fields, the
// extensions in the order found, and the name of the backing image.
type header struct {
	version          uint32
	clusterBits      uint32
	size             uint64 // bytes of the virtual disk
	crypt            uint32
	l1Size           uint32 // entries
	l1Offset         uint64
	refTableOffset   uint64
	refTableClusters uint32
	snapshotCount    uint32
	snapshotOffset   uint64
	incompatible     incompatible
	compatible       compatible
	autoclear        autoclear
	refcountOrder    uint32
	length           uint32 // of the fixed fields; what we do not know of them is in unknown
	compression      compression
	unknown          []byte // bytes 105 to length, kept as they are
	extensions       []extension
	backingOffset    uint64 // of the name; 0: no backing image
	backing          string
}

// An extension of the header, its contents kept as they are.
type extension struct {
	kind uint32
	data []byte
}

// A fault is an error in the words that qemu-img has for it; it wraps what
// callers match.
type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

func corrupt(format string, a ...any) error {
	return &fault{image.ErrCorrupt, fmt.Sprintf(format, a...)}
}

func unsupported(format string, a ...any) error {
	return &fault{errors.ErrUnsupported, fmt.Sprintf(format, a...)}
}

// headerSpan returns how many bytes of an image parseHeader has to see, from
// the first 24 of them: the first cluster. It is 0 if they begin no image.
func headerSpan(b []byte) int64 {
	if len(b) < 24 || binary.BigEndian.Uint32(b) != magic {
		return 0
	}
	if bits := binary.BigEndian.Uint32(b[20:]); bits >= minClusterBits && bits <= maxClusterBits {
		return 1 << bits
	}
	return headerLengthMin
}

// parseHeader reads the header from the first cluster of an image, or all of
// an image that is shorter. With an error it may still return a header, with
// what could be made out; check says whether the values can be used.
func parseHeader(b []byte) (*header, error) {
	be := binary.BigEndian
	if len(b) < 8 || be.Uint32(b) != magic {
		return nil, &fault{image.ErrWrongFormat, "Image is not in qcow2 format"}
	}
	h := &header{version: be.Uint32(b[4:])}
	if h.version != 2 && h.version != 3 {
		return nil, unsupported("Unsupported qcow2 version %d", h.version)
	}
	if len(b) < headerLengthV2 || h.version == 3 && len(b) < headerLengthMin {
		return nil, corrupt("Could not read qcow2 header: the image ends within it")
	}
	h.backingOffset = be.Uint64(b[8:])
	backingLen := be.Uint32(b[16:])
	h.clusterBits = be.Uint32(b[20:])
	h.size = be.Uint64(b[24:])
	h.crypt = be.Uint32(b[32:])
	h.l1Size = be.Uint32(b[36:])
	h.l1Offset = be.Uint64(b[40:])
	h.refTableOffset = be.Uint64(b[48:])
	h.refTableClusters = be.Uint32(b[56:])
	h.snapshotCount = be.Uint32(b[60:])
	h.snapshotOffset = be.Uint64(b[64:])
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return nil, unsupported("Unsupported cluster size: 2^%d", h.clusterBits)
	}
	clusterSize := uint64(1) << h.clusterBits
	if h.version == 2 {
		h.length, h.refcountOrder = headerLengthV2, 4
	} else {
		h.incompatible = incompatible(be.Uint64(b[72:]))
		h.compatible = compatible(be.Uint64(b[80:]))
		h.autoclear = autoclear(be.Uint64(b[88:]))
		h.refcountOrder = be.Uint32(b[96:])
		h.length = be.Uint32(b[100:])
		switch {
		case h.length < headerLengthMin:
			return nil, corrupt("qcow2 header too short")
		case uint64(h.length) > clusterSize:
			return nil, corrupt("qcow2 header exceeds cluster size")
		case uint64(h.length) > uint64(len(b)):
			return nil, corrupt("Could not read unknown qcow2 header fields: the image ends within them")
		}
		if h.length > headerLengthMin {
			h.compression = compression(b[headerLengthMin])
			h.unknown = bytes.Clone(b[headerLengthMin+1 : h.length])
		}
	}
	if h.backingOffset > clusterSize {
		return h, corrupt("Invalid backing file offset")
	}
	end := clusterSize
	if h.backingOffset != 0 {
		end = h.backingOffset
	}
	if err := h.parseExtensions(b, uint64(h.length), end); err != nil {
		return h, err
	}
	if h.backingOffset != 0 {
		if uint64(backingLen) > min(maxBackingName, clusterSize-h.backingOffset) {
			return h, corrupt("Backing file name too long")
		}
		if h.backingOffset+uint64(backingLen) > uint64(len(b)) {
			return h, corrupt("Could not read backing file name: the image ends within it")
		}
		name := b[h.backingOffset:][:backingLen]
		if i := bytes.IndexByte(name, 0); i >= 0 { // a C string to QEMU
			name = name[:i]
		}
		h.backing = string(name)
	}
	return h, nil
}

// parseExtensions reads the extensions in b[off:end]. The area ends at an end
// marker, at its limit, or where the image does: what follows would be zeros if it
// grew.
func (h *header) parseExtensions(b []byte, off, end uint64) error {
	for off < end && off < uint64(len(b)) {
		var head [8]byte
		copy(head[:], b[off:])
		kind := binary.BigEndian.Uint32(head[:])
		n := uint64(binary.BigEndian.Uint32(head[4:]))
		off += 8
		if off > end || n > end-off { // the end marker's length counts too
			return corrupt("Header extension too large")
		}
		if kind == extEnd {
			return nil
		}
		if off+n > uint64(len(b)) {
			return corrupt("Header extension too large")
		}
		h.extensions = append(h.extensions, extension{kind, bytes.Clone(b[off : off+n])})
		off += (n + 7) &^ 7
	}
	return nil
}

// extension returns the contents of the first extension of a kind, nil if
// there is none.
func (h *header) extension(kind uint32) []byte {
	for _, e := range h.extensions {
		if e.kind == kind {
			return e.data
		}
	}
	return nil
}

// setExtension replaces the contents of an extension, adds it, or with nil
// removes it.
func (h *header) setExtension(kind uint32, data []byte) {
	for i, e := range h.extensions {
		if e.kind != kind {
			continue
		}
		if data == nil {
			h.extensions = append(h.extensions[:i:i], h.extensions[i+1:]...)
		} else {
			h.extensions[i].data = data
		}
		return
	}
	if data != nil {
		h.extensions = append(h.extensions, extension{kind, data})
	}
}

// backingFormat returns the declared format of the backing image.
func (h *header) backingFormat() string { return string(h.extension(extBackingFormat)) }

// dataFileName returns the name of the external data file as the image has it.
func (h *header) dataFileName() string { return string(h.extension(extDataFile)) }

// diskSize returns the size of the virtual disk in bytes: whole sectors, as
// QEMU counts.
func (h *header) diskSize() int64 { return int64(h.size &^ 511) }

// A purpose says what an image is opened for; it decides what is tolerated.
type purpose uint8

const (
	forReading purpose = iota
	forWriting
	forChecking
	forRepair
)

// check returns why an image with this header cannot be used. All sizes are
// within their limits, and every table aligned, if it returns nil.
func (h *header) check(p purpose) error {
	if bits := h.incompatible &^ incompatKnown; bits != 0 {
		return h.unknownFeatures(uint64(bits))
	}
	if h.incompatible&incompatCorrupt != 0 && p == forWriting {
		return &image.Hint{
			Err:    corrupt("qcow2: Image is corrupt; cannot be opened read/write"),
			Advice: "repair it with imgnbd check -r all",
		}
	}
	if h.incompatible&incompatExtendedL2 != 0 && 1<<h.clusterBits/subclusters < minSubclusterSize {
		return unsupported("Unsupported subcluster size: %d", 1<<h.clusterBits/subclusters)
	}
	if h.refcountOrder > 6 {
		return corrupt("Reference count entry width too large; may not exceed 64 bits")
	}
	if h.crypt > cryptLUKS {
		return unsupported("Unsupported encryption method %d", h.crypt)
	}
	if err := h.checkCompression(); err != nil {
		return err
	}
	if h.refTableClusters == 0 && p < forChecking {
		return corrupt("Image does not contain a reference count table")
	}
	if p != forRepair {
		if err := h.checkRefTable(); err != nil {
			return err
		}
	}
	if p < forChecking {
		if err := h.checkTable("Snapshot table", h.snapshotOffset, uint64(h.snapshotCount), snapshotFixed, snapshotFixed*maxSnapshots); err != nil {
			return err
		}
	}
	if err := h.checkTable("Active L1 table", h.l1Offset, uint64(h.l1Size), 8, maxL1Size); err != nil {
		return err
	}
	if h.size > math.MaxInt64-1<<maxClusterBits {
		return corrupt("Image is too big")
	}
	if need := newGeometry(h).l1Entries(int64(h.size)); need > math.MaxInt32 {
		return corrupt("Image is too big")
	} else if int64(h.l1Size) < need {
		return corrupt("L1 table is too small")
	}
	return h.checkExtensions()
}

func (h *header) checkRefTable() error {
	return h.checkTable("Reference count table", h.refTableOffset, uint64(h.refTableClusters), 1<<h.clusterBits, maxRefTableSize)
}

func (h *header) checkCompression() error {
	switch {
	case h.compression > compressionZstd:
		return unsupported("qcow2: unknown compression type: %d", h.compression)
	case h.compression == compressionZlib && h.incompatible&incompatCompression != 0:
		return corrupt("qcow2: Compression type incompatible feature bit must not be set")
	case h.compression != compressionZlib && h.incompatible&incompatCompression == 0:
		return corrupt("qcow2: Compression type incompatible feature bit must be set")
	}
	return nil
}

// checkTable checks place and size of a table that begins a cluster.
func (h *header) checkTable(name string, off, entries, entrySize, limit uint64) error {
	if entries > limit/entrySize {
		return corrupt("%s too large", name)
	}
	if off > math.MaxInt64-entries*entrySize || off&(1<<h.clusterBits-1) != 0 {
		return corrupt("%s offset invalid", name)
	}
	return nil
}

func (h *header) checkExtensions() error {
	for _, e := range h.extensions {
		switch e.kind {
		case extBackingFormat:
			if len(e.data) > 15 {
				return corrupt("ERROR: ext_backing_format: len=%d too large (>=16)", len(e.data))
			}
		case extDataFile:
			if len(e.data) > maxBackingName {
				return corrupt("data file name too long: %d bytes", len(e.data))
			}
		case extCrypto:
			if h.crypt != cryptLUKS {
				return corrupt("CRYPTO header extension only expected with LUKS encryption method")
			}
			if len(e.data) != 16 {
				return corrupt("CRYPTO header extension size %d, but expected size 16", len(e.data))
			}
		}
	}
	if h.autoclear&autoclearDataFileRaw != 0 && h.incompatible&incompatDataFile == 0 {
		return corrupt("data-file-raw requires a data file")
	}
	_, err := h.bitmapsExtension()
	return err
}

// A bitmapsExtension says where the directory of bitmaps lies.
type bitmapsExtension struct {
	count  uint32
	size   uint64 // bytes
	offset uint64
}

// bitmapsExtension returns the bitmaps extension, with a count of 0 if there
// is none.
func (h *header) bitmapsExtension() (x bitmapsExtension, err error) {
	b := h.extension(extBitmaps)
	if b == nil {
		return x, nil
	}
	if len(b) != 24 {
		return x, corrupt("bitmaps_ext: Invalid extension length")
	}
	if binary.BigEndian.Uint32(b[4:]) != 0 {
		return x, corrupt("bitmaps_ext: Reserved field is not zero")
	}
	x = bitmapsExtension{binary.BigEndian.Uint32(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])}
	switch {
	case x.count > maxBitmaps:
		err = corrupt("bitmaps_ext: image has %d bitmaps, exceeding the QEMU supported maximum of %d", x.count, maxBitmaps)
	case x.count == 0:
		err = corrupt("bitmaps_ext: found bitmaps extension with zero bitmaps")
	case x.offset&(1<<h.clusterBits-1) != 0 || x.offset > math.MaxInt64-maxBitmapDirectory:
		err = corrupt("bitmaps_ext: invalid bitmap directory offset")
	case x.size > maxBitmapDirectory:
		err = corrupt("bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)", x.size, maxBitmapDirectory)
	}
	return x, err
}

// encode returns the contents of the extension.
func (x bitmapsExtension) encode() []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint32(b, x.count)
	binary.BigEndian.PutUint64(b[8:], x.size)
	binary.BigEndian.PutUint64(b[16:], x.offset)
	return b
}

// unknownFeatures names incompatible features by the image's own table.
func (h *header) unknownFeatures(bits uint64) error {
	var names []string
	for t := h.extension(extFeatureNames); len(t) >= 48; t = t[48:] {
		if t[0] != 0 || t[1] > 63 || bits&(1<<t[1]) == 0 {
			continue
		}
		bits &^= 1 << t[1]
		name, _, _ := bytes.Cut(t[2:48], []byte{0})
		names = append(names, printable(string(name)))
	}
	if bits != 0 {
		names = append(names, fmt.Sprintf("Unknown incompatible feature: %x", bits))
	}
	return unsupported("Unsupported qcow2 feature(s): %s", strings.Join(names, ", "))
}

// printable keeps a name in an image from making lines of its own in a message.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, name)
}

// encodeFixed returns the fixed fields, which lie in the first sector and may
// be rewritten alone.
func (h *header) encodeFixed() []byte {
	be := binary.BigEndian
	b := make([]byte, h.length)
	be.PutUint32(b, magic)
	be.PutUint32(b[4:], h.version)
	be.PutUint64(b[8:], h.backingOffset)
	be.PutUint32(b[16:], uint32(len(h.backing)))
	be.PutUint32(b[20:], h.clusterBits)
	be.PutUint64(b[24:], h.size)
	be.PutUint32(b[32:], h.crypt)
	be.PutUint32(b[36:], h.l1Size)
	be.PutUint64(b[40:], h.l1Offset)
	be.PutUint64(b[48:], h.refTableOffset)
	be.PutUint32(b[56:], h.refTableClusters)
	be.PutUint32(b[60:], h.snapshotCount)
	be.PutUint64(b[64:], h.snapshotOffset)
	if h.version == 2 {
		return b
	}
	be.PutUint64(b[72:], uint64(h.incompatible))
	be.PutUint64(b[80:], uint64(h.compatible))
	be.PutUint64(b[88:], uint64(h.autoclear))
	be.PutUint32(b[96:], h.refcountOrder)
	be.PutUint32(b[100:], h.length)
	if h.length > headerLengthMin {
		b[headerLengthMin] = byte(h.compression)
		copy(b[headerLengthMin+1:], h.unknown)
	}
	return b
}

// encode returns all that the header occupies of the first cluster: fixed
// fields, extensions, name of the backing image, whose place it sets. It fails
// if that does not fit.
func (h *header) encode() ([]byte, error) {
	ext := make([]byte, 0, 512)
	for _, e := range append(h.extensions[:len(h.extensions):len(h.extensions)], extension{kind: extEnd}) {
		ext = binary.BigEndian.AppendUint32(ext, e.kind)
		ext = binary.BigEndian.AppendUint32(ext, uint32(len(e.data)))
		ext = append(ext, e.data...)
		ext = append(ext, make([]byte, -len(e.data)&7)...)
	}
	h.backingOffset = 0
	if h.backing != "" {
		h.backingOffset = uint64(h.length) + uint64(len(ext))
	}
	b := append(h.encodeFixed(), ext...)
	b = append(b, h.backing...)
	if len(b) > 1<<h.clusterBits {
		return nil, fmt.Errorf("header: %d bytes do not fit into a cluster of %d", len(b), 1<<h.clusterBits)
	}
	return b, nil
}
