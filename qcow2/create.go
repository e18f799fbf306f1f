package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// A preallocation says how much of an empty disk occupies storage.
type preallocation uint8

const (
	preallocOff      preallocation = iota
	preallocMetadata               // L2 tables that point to clusters of zeros
	preallocFalloc                 // for whose data the space is reserved
	preallocFull                   // and written
)

// createParams are the parameters of create, in QEMU's order and words.
func createParams() []image.CreateParam {
	const noEncryption = "this version makes no encrypted images"
	encrypted := func(name string, kind image.ParamKind) image.CreateParam {
		return image.CreateParam{Name: name, Kind: kind, Refused: noEncryption}
	}
	return []image.CreateParam{
		encrypted("encryption", image.BoolParam),
		encrypted("encrypt.format", image.TextParam),
		encrypted("encrypt.key-secret", image.TextParam),
		encrypted("encrypt.cipher-alg", image.TextParam),
		encrypted("encrypt.cipher-mode", image.TextParam),
		encrypted("encrypt.ivgen-alg", image.TextParam),
		encrypted("encrypt.ivgen-hash-alg", image.TextParam),
		encrypted("encrypt.hash-alg", image.TextParam),
		encrypted("encrypt.iter-time", image.NumberParam),
		{Name: "cluster_size", Kind: image.SizeParam, Default: "65536", Help: "qcow2 cluster size"},
		{Name: "extended_l2", Kind: image.BoolParam, Default: "off", Help: "Extended L2 tables"},
		{Name: "preallocation", Help: "Preallocation mode (allowed values: off, metadata, falloc, full)"},
		{Name: "compression_type", Default: "zlib", Help: "Compression method used for image cluster compression"},
		{Name: "size", Kind: image.SizeParam, Help: "Virtual disk size"},
		{Name: "compat", Help: "Compatibility level (v2 [0.10] or v3 [1.1])"},
		{Name: "backing_file", Help: "File name of a base image"},
		{Name: "backing_fmt", Help: "Image format of the base image"},
		{Name: "data_file", Help: "File name of an external data file"},
		{Name: "data_file_raw", Kind: image.BoolParam, Help: "The external data file must stay valid as a raw image"},
		{Name: "lazy_refcounts", Kind: image.BoolParam, Default: "off", Help: "Postpone refcount updates"},
		{Name: "refcount_bits", Kind: image.NumberParam, Default: "16", Help: "Width of a reference count entry in bits"},
		{Name: "nocow", Kind: image.BoolParam, Refused: image.NoCOWAdvice},
		{Name: "extent_size_hint", Kind: image.SizeParam, Refused: image.ExtentSizeAdvice},
	}
}

// sector is what a medium writes whole or not at all, in bytes.
const sector = 512

// A plan is all that is known of a new image before it is made.
type plan struct {
	header   header
	prealloc preallocation
	geo      *geometry
	layout
}

// A layout says where the parts of a new image lie: each begins at a cluster,
// they follow one another in this order, and nothing else is there.
type layout struct {
	refTable, refBlocks, l1, l2, data, end int64 // host offsets
}

// create makes an empty image.
func create(ctx context.Context, s storage.Store, opt image.CreateOptions) (err error) {
	p, err := newPlan(opt)
	if err != nil {
		return err
	}
	head, err := p.head()
	if err != nil {
		return err
	}
	if err := p.fits(s); err != nil {
		return err
	}
	if name := p.header.dataFileName(); p.geo.dataFile {
		if opt.NewStore == nil {
			return fmt.Errorf("data file %q: %w", name, image.ErrReference)
		}
		data, err := opt.NewStore(ctx, name)
		if err != nil {
			return err
		}
		if err := errors.Join(p.makeDataFile(data), data.Close()); err != nil {
			return image.Wrap("create", name, err)
		}
	}
	if err := p.erase(s); err != nil {
		return err
	}
	if err := preallocate(s, p.data, p.end-p.data, p.prealloc); err != nil {
		return err
	}
	if err := p.writeTables(s); err != nil {
		return err
	}
	// Its first sector makes the image one. That is on its own and last: no
	// power cut leaves a part of an image that looks like all of it.
	if err := s.WriteAt(head[sector:], sector, 0); err != nil {
		return err
	}
	if err := s.Sync(); err != nil {
		return err
	}
	return s.WriteAt(head[:sector], 0, storage.FUA)
}

var (
	errOption   = errors.New("invalid option")
	errTooLarge = &fault{syscall.EFBIG, "The image size is too large for file format 'qcow2' (try using a larger cluster size)"}
)

// wrong is a mistake in the options, in QEMU's words.
func wrong(format string, a ...any) error { return &fault{errOption, fmt.Sprintf(format, a...)} }

// newPlan makes sense of the options. Of several mistakes the first one is
// told that QEMU would tell.
func newPlan(opt image.CreateOptions) (*plan, error) {
	if opt.Size < 0 || opt.Size > math.MaxInt64-511 {
		return nil, errTooLarge
	}
	p := &plan{header: header{
		version: 3, length: headerLengthNew, clusterBits: 16, refcountOrder: 4,
		size: uint64(opt.Size+511) &^ 511,
	}}
	o, err := p.parse(opt.Params)
	if err != nil {
		return nil, err
	}
	if err := p.checkOptions(o); err != nil {
		return nil, err
	}
	h := &p.header
	if h.version == 2 {
		h.length = headerLengthV2
	}
	if h.autoclear&autoclearDataFileRaw != 0 && p.prealloc == preallocOff {
		p.prealloc = preallocMetadata // where the data lies must not depend on the order of writes
	}
	p.geo = newGeometry(h)
	return p, p.place()
}

// createNumbers are the numbers of the options, as they were asked for.
type createNumbers struct {
	clusterSize, refcountBits uint64
	backingFormat             string
}

// parse reads the parameters into the header.
func (p *plan) parse(params []image.Param) (createNumbers, error) {
	n := createNumbers{clusterSize: 1 << 16, refcountBits: 16}
	h := &p.header
	for _, param := range params {
		var err error
		v := param.Value
		switch param.Key {
		case "compat":
			err = oneOf(v, "version", func(version uint32) { h.version = version }, map[string]uint32{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3})
		case "preallocation":
			err = oneOf(v, "preallocation", func(m preallocation) { p.prealloc = m }, map[string]preallocation{
				"off": preallocOff, "metadata": preallocMetadata, "falloc": preallocFalloc, "full": preallocFull,
			})
		case "compression_type":
			err = oneOf(v, "compression-type", h.setCompression, map[string]compression{"zlib": compressionZlib, "zstd": compressionZstd})
		case "cluster_size":
			n.clusterSize, err = image.ParseSize(v)
		case "refcount_bits":
			n.refcountBits, err = image.ParseNumber(v)
		case "extended_l2":
			err = setBit(&h.incompatible, incompatExtendedL2, v)
		case "lazy_refcounts":
			err = setBit(&h.compatible, compatLazyRefcounts, v)
		case "data_file_raw":
			err = setBit(&h.autoclear, autoclearDataFileRaw, v)
		case "data_file":
			h.incompatible |= incompatDataFile
			h.setExtension(extDataFile, []byte(v))
		case "backing_file":
			h.backing = v
		case "backing_fmt":
			n.backingFormat = v
		default:
			return n, fmt.Errorf("qcow2: unknown option %s", param.Key)
		}
		switch {
		case errors.Is(err, errOption):
			return n, err
		case err != nil:
			return n, fmt.Errorf("qcow2: %s=%s: %w", param.Key, v, err)
		}
	}
	return n, nil
}

func (h *header) setCompression(c compression) {
	h.compression = c
	h.incompatible &^= incompatCompression
	if c != compressionZlib {
		h.incompatible |= incompatCompression
	}
}

// oneOf sets what a word stands for.
func oneOf[T any](word, name string, set func(T), words map[string]T) error {
	v, ok := words[word]
	if !ok {
		return wrong("Parameter '%s' does not accept value '%s'", name, word)
	}
	set(v)
	return nil
}

func setBit[T ~uint64](features *T, bit T, value string) error {
	on, err := image.ParseBool(value)
	*features &^= bit
	if on {
		*features |= bit
	}
	return err
}

// checkOptions finds what does not go together, in QEMU's order and words.
func (p *plan) checkOptions(n createNumbers) error {
	h := &p.header
	extended := h.incompatible&incompatExtendedL2 != 0
	raw := h.autoclear&autoclearDataFileRaw != 0
	dataFile := h.incompatible&incompatDataFile != 0
	backing := h.backing != ""
	v2 := h.version < 3
	const v3 = " supported with compatibility level 1.1 and above (use version=v3 or greater)"
	switch {
	case extended && v2:
		return wrong("Extended L2 entries are only%s", v3)
	case bits.OnesCount64(n.clusterSize) != 1 || n.clusterSize < 1<<minClusterBits || n.clusterSize > 1<<maxClusterBits:
		return wrong("Cluster size must be a power of two between 512 and 2048k")
	case extended && n.clusterSize < subclusters*minSubclusterSize:
		return wrong("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
	case backing && p.prealloc != preallocOff && !extended:
		return wrong("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	case n.backingFormat != "" && !backing:
		return wrong("Backing format cannot be used without backing file")
	case h.compatible&compatLazyRefcounts != 0 && v2:
		return wrong("Lazy refcounts only%s", v3)
	case bits.OnesCount64(n.refcountBits) != 1 || n.refcountBits > 64:
		return wrong("Refcount width must be a power of two and may not exceed 64 bits")
	case n.refcountBits != 16 && v2:
		return wrong("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)")
	case raw && !dataFile:
		return wrong("data-file-raw requires data-file")
	case raw && backing:
		return wrong("Backing file and data-file-raw cannot be used at the same time")
	case dataFile && v2:
		return wrong("External data files are only%s", v3)
	case h.compression != compressionZlib && v2:
		return wrong("Non-zlib compression type is only%s", v3)
	case len(h.dataFileName()) > maxBackingName:
		return wrong("data file name too long")
	case len(h.backing) > maxBackingName || len(n.backingFormat) > 15:
		return wrong("Could not assign backing file '%s' with format '%s': Invalid argument", h.backing, n.backingFormat)
	}
	h.clusterBits = uint32(bits.TrailingZeros64(n.clusterSize))
	h.refcountOrder = uint32(bits.TrailingZeros64(n.refcountBits))
	if n.backingFormat != "" {
		h.setExtension(extBackingFormat, []byte(n.backingFormat))
	}
	return nil
}

// place decides where everything lies. How many refcount blocks there are
// depends on how many clusters there are, themselves among them.
func (p *plan) place() error {
	g, h := p.geo, &p.header
	l1Entries := g.l1Entries(int64(h.size))
	if l1Entries > maxL1Size/8 {
		return errTooLarge
	}
	l1 := g.clusters(l1Entries * 8)
	var l2, data int64
	if p.prealloc != preallocOff {
		l2 = l1Entries
		if !g.dataFile {
			data = g.clusters(int64(h.size))
		}
	}
	const maxHostOffset = 1 << 56 // what entries have room for
	table, blocks := int64(1), int64(1)
	for {
		total := 1 + table + blocks + l1 + l2 + data
		if total > maxHostOffset>>g.clusterBits {
			return errTooLarge
		}
		needBlocks := (total-1)>>g.refBlockBits + 1
		needTable := g.clusters(needBlocks * 8)
		if needBlocks == blocks && needTable == table {
			break
		}
		table, blocks = needTable, needBlocks
	}
	if table > maxRefTableSize>>g.clusterBits {
		return errTooLarge
	}
	at := func(clusters int64) int64 { return clusters << g.clusterBits }
	p.refTable = at(1)
	p.refBlocks = p.refTable + at(table)
	p.l1 = p.refBlocks + at(blocks)
	p.l2 = p.l1 + at(l1)
	p.data = p.l2 + at(l2)
	p.end = p.data + at(data)
	h.refTableOffset, h.refTableClusters = uint64(p.refTable), uint32(table)
	h.l1Size = uint32(l1Entries)
	if l1Entries > 0 {
		h.l1Offset = uint64(p.l1)
	}
	return nil
}

// head returns the header and what belongs to it, at least a sector. The rest
// of the first cluster is zero.
func (p *plan) head() ([]byte, error) {
	h := &p.header
	if h.version >= 3 && h.clusterBits >= 12 { // smaller ones may need the room for names
		h.setExtension(extFeatureNames, featureNames())
	}
	b, err := h.encode()
	switch {
	case err != nil && h.backing == "":
		return nil, err
	case err != nil:
		return nil, wrong("Could not assign backing file '%s' with format '%s': No space left on device", h.backing, h.backingFormat())
	}
	return append(b, make([]byte, max(0, sector-len(b)))...), nil
}

// featureNames returns the table that lets older programs name what they do
// not know.
func featureNames() []byte {
	var b []byte
	for kind, names := range [][]string{
		{"dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries"},
		{"lazy refcounts"},
		{"bitmaps", "raw external data"},
	} {
		for bit, name := range names {
			b = append(b, byte(kind), byte(bit))
			b = append(b, name...)
			b = append(b, make([]byte, 46-len(name))...)
		}
	}
	return b
}

// fits returns an error if s cannot be made large enough.
func (p *plan) fits(s storage.Store) error {
	if !s.Info().FixedSize {
		return nil
	}
	size, err := s.Size()
	if err == nil && size < p.end {
		err = syscall.ENOSPC
	}
	return err
}

// erase makes what is in s no image, durably, and gives s the size that is
// needed.
func (p *plan) erase(s storage.Store) error {
	if s.Info().FixedSize {
		if err := s.WriteZeroes(0, p.geo.clusterSize, 0); err != nil {
			return err
		}
		return s.Sync()
	}
	size, err := s.Size()
	if err != nil {
		return err
	}
	if err := s.Truncate(0); err != nil {
		return err
	}
	if size > 0 {
		if err := s.Sync(); err != nil {
			return err
		}
	}
	return s.Truncate(p.end)
}

// makeDataFile makes an external data file that reads as zeros.
func (p *plan) makeDataFile(s storage.Store) error {
	n := int64(p.header.size)
	if p.prealloc != preallocOff {
		n = p.geo.ceil(n)
	}
	if s.Info().FixedSize {
		// It is larger, or there is an error. Nothing in it is allocated if
		// nothing is preallocated, so it need not be zeroed then.
		size, err := s.Size()
		if err == nil && size < int64(p.header.size) {
			err = syscall.ENOSPC
		}
		if err != nil {
			return err
		}
		n = min(n, size)
	} else if err := storage.Clear(s, n); err != nil {
		return err
	}
	if err := preallocate(s, 0, n, p.prealloc); err != nil {
		return err
	}
	return s.Sync()
}

// preallocate sees to it that a range that was never written reads as zeros,
// and takes up the space that is asked for.
func preallocate(s storage.Store, off, n int64, how preallocation) error {
	switch {
	case n == 0 || how == preallocOff:
		return nil
	case how == preallocFull:
		zeros := make([]byte, 1<<20)
		for ; n > 0; off, n = off+int64(len(zeros)), n-int64(len(zeros)) {
			zeros = zeros[:min(n, int64(len(zeros)))]
			if err := s.WriteAt(zeros, off, 0); err != nil {
				return err
			}
		}
		return nil
	case how == preallocFalloc:
		return s.WriteZeroes(off, n, 0)
	case s.Info().NewReadsZero:
		return nil
	}
	return s.WriteZeroes(off, n, storage.MayUnmap) // what a device held before is not the guest's to see
}

// writeTables writes everything between the header and the data.
func (p *plan) writeTables(s storage.Store) error {
	g := p.geo
	cluster := func(start int64) func(int64) uint64 {
		return func(i int64) uint64 { return uint64(start + i<<g.clusterBits) }
	}
	blocks := (p.l1 - p.refBlocks) >> g.clusterBits
	if err := writeWords(s, p.refTable, p.refBlocks-p.refTable, blocks, cluster(p.refBlocks)); err != nil {
		return err
	}
	counts, word := oneEach(g.refcountOrder, p.end>>g.clusterBits)
	if err := writeWords(s, p.refBlocks, p.l1-p.refBlocks, counts, word); err != nil {
		return err
	}
	if p.prealloc == preallocOff {
		return writeWords(s, p.l1, p.l2-p.l1, 0, nil)
	}
	l2 := cluster(p.l2)
	if err := writeWords(s, p.l1, p.l2-p.l1, int64(p.header.l1Size), func(i int64) uint64 { return l2(i) | flagCopied }); err != nil {
		return err
	}
	// Subclusters are not allocated, though their clusters are: so QEMU has it,
	// and a backing image shows.
	data := cluster(p.data)
	if g.dataFile {
		data = cluster(0)
	}
	words := int64(g.entryWords)
	return writeWords(s, p.l2, p.data-p.l2, g.clusters(int64(p.header.size))*words, func(i int64) uint64 {
		if i%words != 0 {
			return 0
		}
		return data(i/words) | flagCopied
	})
}

// oneEach returns the words of refcount blocks in which the first n counts are
// one.
func oneEach(order uint, n int64) (words int64, word func(i int64) uint64) {
	perWord := int64(64) >> order
	ones := func(n int64) uint64 {
		var b [8]byte
		for i := range min(n, perWord) {
			setRefcount(b[:], i, order, 1)
		}
		return binary.BigEndian.Uint64(b[:])
	}
	full := ones(perWord)
	words = (n + perWord - 1) / perWord
	return words, func(i int64) uint64 {
		if i+1 < words {
			return full
		}
		return ones(n - i*perWord)
	}
}

// writeWords fills n bytes of s with big-endian words, of which count are not
// zero, a buffer at a time: tables may be larger than memory.
func writeWords(s storage.Store, off, n, count int64, word func(i int64) uint64) error {
	if info := s.Info(); info.NewReadsZero && !info.FixedSize {
		const page = 4096
		n = min(n, (count*8+page-1)&^(page-1)) // the rest is zero and need not occupy anything
	}
	buf := make([]byte, min(n, 1<<20))
	for done := int64(0); done < n; {
		part := buf[:min(n-done, int64(len(buf)))]
		for k := 0; k < len(part); k += 8 {
			i, v := (done+int64(k))/8, uint64(0)
			if i < count {
				v = word(i)
			}
			binary.BigEndian.PutUint64(part[k:], v)
		}
		if err := s.WriteAt(part, off+done, 0); err != nil {
			return err
		}
		done += int64(len(part))
	}
	return nil
}
