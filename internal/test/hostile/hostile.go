// Package hostile makes qcow2 images that lie. It shares no code with the
// package that has to survive them.
package hostile

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
)

// An Image is a file of Size bytes, zeros but for its Parts.
type Image struct {
	Name  string
	Size  int64
	Parts []Part
	Slow  bool // to check it takes half a minute
}

// A Part of an image is Data at Offset.
type Part struct {
	Offset int64
	Data   []byte
}

// WriteFile makes the image as a sparse file.
func (i Image) WriteFile(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(i.Size); err != nil {
		return err
	}
	for _, p := range i.Parts {
		if _, err := f.WriteAt(p.Data, p.Offset); err != nil {
			return err
		}
	}
	return f.Close()
}

// A Choice returns a number from 0 to n-1: all that an image depends on.
type Choice func(n int) int

// New makes a small image that is sound, and then tells some lies in it: up to
// a number.
func New(choose Choice, lies int) Image {
	l := newLayout(choose)
	for range choose(lies + 1) {
		l.lie()
	}
	return Image{Name: l.said, Size: int64(len(l.b)), Parts: []Part{{0, l.b}}}
}

// A field is a number in the image.
type field struct {
	at   int64
	size int // bytes
}

// A layout is an image in the making: what lies where, so that lies can be
// about it.
type layout struct {
	choose   Choice
	b        []byte
	bits     int64
	cs       int64
	words    int64 // of an L2 entry
	version  int
	order    uint
	refTable int64
	l1       int64
	l1Size   int64

	fields   []field // any
	l1Words  []int64 // where entries are: of all L1 tables,
	l2Words  []int64 // of all L2 tables,
	refWords []int64 // of the refcount table
	tables   []int64 // clusters with metadata
	data     []int64 // clusters with data
	uses     map[int64]uint64
	said     string
}

func pick[T any](choose Choice, from []T) T { return from[choose(len(from))] }

func (l *layout) alloc(n int64) int64 {
	at := int64(len(l.b))
	l.b = append(l.b, make([]byte, n*l.cs)...)
	for c := range n {
		l.uses[at/l.cs+c]++
	}
	return at
}

func (l *layout) table(bytes int64) int64 {
	n := (bytes + l.cs - 1) / l.cs
	at := l.alloc(n)
	for c := range n {
		l.tables = append(l.tables, at+c*l.cs)
	}
	return at
}

func (l *layout) put(at int64, size int, v uint64) {
	for i := range size {
		l.b[at+int64(i)] = byte(v >> (8 * (size - 1 - i)))
	}
}

func (l *layout) field(at int64, size int, v uint64) {
	l.put(at, size, v)
	l.fields = append(l.fields, field{at, size})
}

const (
	copied   = 1 << 63
	hostMask = 0x00fffffffffffe00
)

// newLayout makes an image that is sound.
func newLayout(choose Choice) *layout {
	l := &layout{choose: choose, version: 3, words: 1, order: 4, uses: map[int64]uint64{}}
	l.bits = int64(pick(choose, []int{9, 9, 12, 10, 14, 16}))
	if choose(8) == 0 {
		l.version = 2
	} else {
		l.order = uint(choose(7))
	}
	incompatible := uint64(0)
	if l.version == 3 && l.bits >= 14 && choose(2) == 0 {
		incompatible, l.words = 16, 2
	}
	l.cs = 1 << l.bits
	perTable := l.cs / 8 / l.words
	disk := perTable*l.cs*int64(1+choose(3)) + 512*int64(choose(3))
	l.l1Size = (disk + perTable*l.cs - 1) / (perTable * l.cs)

	l.table(l.cs) // the header
	l.refTable = l.table(l.cs)
	l.l1 = l.table(l.l1Size * 8)
	l.fillL1(l.l1, l.l1Size, disk)

	count := choose(3)
	if l.order < 2 {
		count = 0 // such counts are too narrow for what snapshots share
	}
	snapshots := l.snapshots(count, disk)
	be := binary.BigEndian
	h := l.b
	copy(h, "QFI\xfb")
	for _, f := range []struct {
		at   int64
		size int
		v    uint64
	}{
		{4, 4, uint64(l.version)}, {8, 8, 0}, {16, 4, 0}, {20, 4, uint64(l.bits)}, {24, 8, uint64(disk)}, {32, 4, 0},
		{36, 4, uint64(l.l1Size)}, {40, 8, uint64(l.l1)}, {48, 8, uint64(l.refTable)}, {56, 4, 1},
		{60, 4, uint64(be.Uint32(h[60:]))}, {64, 8, snapshots},
	} {
		l.field(f.at, f.size, f.v)
	}
	if l.version == 3 {
		l.field(72, 8, incompatible)
		l.field(80, 8, 0)
		l.field(88, 8, 0)
		l.field(96, 4, uint64(l.order))
		l.field(100, 4, 104)
		l.extensions(104, disk)
	}
	l.counts()
	return l
}

// fillL1 makes L2 tables with entries of all kinds.
func (l *layout) fillL1(l1, n, disk int64) {
	perTable := l.cs / 8 / l.words
	for i := range n {
		l.l1Words = append(l.l1Words, l1+i*8)
		if i > 0 && l.choose(2) == 0 {
			continue
		}
		t := l.table(l.cs)
		l.field(l1+i*8, 8, uint64(t)|copied)
		for k := range min(perTable, 24) {
			at := t + k*8*l.words
			if (i*perTable+k)*l.cs >= disk {
				break
			}
			l.l2Words = append(l.l2Words, at)
			if l.words == 2 {
				l.fields = append(l.fields, field{at + 8, 8})
			}
			l.fillEntry(at)
		}
	}
}

func (l *layout) fillEntry(at int64) {
	switch l.choose(8) {
	case 0:
		l.field(at, 8, 0)
	case 1:
		if l.words == 2 {
			l.put(at+8, 8, 0xffffffff<<32)
		} else if l.version == 3 {
			l.field(at, 8, 1)
		}
	case 2:
		data := bomb(int(l.cs))
		if int64(len(data)) > l.cs {
			return
		}
		host := l.alloc(1)
		copy(l.b[host:], data)
		l.field(at, 8, l.compressed(host, int64(len(data))))
	default:
		host := l.alloc(1)
		l.data = append(l.data, host)
		for i := range l.cs {
			l.b[host+i] = byte(host >> l.bits)
		}
		l.field(at, 8, uint64(host)|copied)
		if l.words == 2 {
			l.put(at+8, 8, 0xffffffff)
		}
	}
}

// compressed returns the entry for n bytes of compressed data.
func (l *layout) compressed(host, n int64) uint64 {
	shift := 62 - (l.bits - 8)
	sectors := (host%512 + n - 1) / 512
	return 1<<62 | uint64(sectors)<<shift | uint64(host)
}

// bomb is n zeros, compressed.
func bomb(n int) []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		panic(err)
	}
	w.Write(make([]byte, n)) // to memory
	w.Close()
	return b.Bytes()
}

// snapshots makes a table of n snapshots, that share data clusters with the
// disk, and returns where it lies.
func (l *layout) snapshots(n int, disk int64) uint64 {
	if n == 0 || len(l.data) == 0 {
		return 0
	}
	at := l.table(int64(n) * 64)
	l.put(60, 4, uint64(n))
	for i := range n {
		l1 := l.table(l.l1Size * 8)
		t := l.table(l.cs)
		l.l1Words = append(l.l1Words, l1)
		l.field(l1, 8, uint64(t)|copied)
		for k := range min(l.cs/8/l.words, 8) {
			host := pick(l.choose, l.data)
			if l.uses[host/l.cs] == 1<<(1<<l.order)-1 {
				continue
			}
			l.uses[host/l.cs]++
			l.l2Words = append(l.l2Words, t+k*8*l.words)
			l.field(t+k*8*l.words, 8, uint64(host))
			if l.words == 2 {
				l.put(t+k*16+8, 8, 0xffffffff)
			}
		}
		e := at + int64(i)*64
		l.field(e, 8, uint64(l1))
		l.field(e+8, 4, uint64(l.l1Size))
		l.field(e+12, 2, 1)
		l.field(e+14, 2, 1)
		l.field(e+36, 4, 16)
		l.field(e+48, 8, uint64(disk))
		l.b[e+56], l.b[e+57] = byte('1'+i), byte('a'+i)
	}
	return uint64(at)
}

// extensions makes some of those that there are.
func (l *layout) extensions(at, disk int64) {
	if l.choose(2) == 0 && disk > 0 {
		const granularity = 9
		bits := (disk>>granularity + 1 + 7) / 8
		clusters := (bits + l.cs - 1) / l.cs
		if (((disk-1)>>granularity+1)+7)/8 <= (clusters-1)*l.cs {
			clusters--
		}
		dir := l.table(32)
		table := l.table(clusters * 8)
		for i := range clusters {
			switch l.choose(3) {
			case 0:
				l.field(table+i*8, 8, 1)
			case 1:
				l.field(table+i*8, 8, uint64(l.alloc(1)))
			default:
				l.field(table+i*8, 8, 0)
			}
		}
		l.field(dir, 8, uint64(table))
		l.field(dir+8, 4, uint64(clusters))
		l.field(dir+12, 4, uint64(l.choose(4)))
		l.field(dir+16, 1, 1)
		l.field(dir+17, 1, granularity)
		l.field(dir+18, 2, 1)
		l.field(dir+20, 4, 0)
		l.b[dir+24] = 'b'
		l.put(88, 8, 1)
		at = l.extension(at, 0x23852875, 24)
		l.field(at-24, 4, 1)
		l.field(at-16, 8, 32)
		l.field(at-8, 8, uint64(dir))
	}
	if l.choose(3) == 0 {
		at = l.extension(at, 0x6803f857, 48)
	}
	if l.choose(4) == 0 {
		at = l.extension(at, 0x12345678, 8)
	}
	l.extension(at, 0, 0)
}

func (l *layout) extension(at int64, kind uint64, n int64) int64 {
	l.field(at, 4, kind)
	l.field(at+4, 4, uint64(n))
	return at + 8 + n
}

// counts makes refcount blocks, as many as are needed to count themselves.
func (l *layout) counts() {
	perBlock := l.cs * 8 >> l.order
	var blocks []int64
	for int64(len(blocks))*perBlock < int64(len(l.b))/l.cs {
		if int64(len(blocks)) == l.cs/8 {
			break // what is not counted is a lie as well
		}
		at := l.table(l.cs)
		l.refWords = append(l.refWords, l.refTable+int64(len(blocks))*8)
		l.field(l.refTable+int64(len(blocks))*8, 8, uint64(at))
		blocks = append(blocks, at)
	}
	for c, n := range l.uses {
		l.setCount(c, n)
	}
	for _, at := range l.l2Words {
		if e := binary.BigEndian.Uint64(l.b[at:]); e>>62 == 2 && l.uses[int64(e&hostMask)/l.cs] > 1 {
			l.put(at, 8, e&^copied)
		}
	}
}

func (l *layout) setCount(cluster int64, n uint64) {
	width, perBlock := int64(1)<<l.order, l.cs*8>>l.order
	at := l.refTable + min(cluster/perBlock, l.cs/8-1)*8
	if at+8 > int64(len(l.b)) {
		return
	}
	block := int64(binary.BigEndian.Uint64(l.b[at:]))
	if block <= 0 || block > int64(len(l.b))-l.cs {
		return
	}
	if width < 64 {
		n = min(n, 1<<width-1)
	}
	bit := cluster % perBlock * width
	if width >= 8 {
		l.put(block+bit/8, int(width/8), n)
		return
	}
	mask := byte(1<<width-1) << (bit % 8)
	l.b[block+bit/8] = l.b[block+bit/8]&^mask | byte(n)<<(bit%8)
}

// Metadata returns the offsets of the clusters that the header of an image
// leads to, but for data: what no guest may ever write to. Where the image
// makes no sense it looks no further.
func Metadata(b []byte) []int64 {
	be := binary.BigEndian
	if len(b) < 104 || be.Uint32(b[20:]) < 9 || be.Uint32(b[20:]) > 21 {
		return nil
	}
	cs := int64(1) << be.Uint32(b[20:])
	found := map[int64]bool{}
	add := func(off, n int64) []byte {
		if off < 0 || off%cs != 0 || n <= 0 || off > int64(len(b)) || n > int64(len(b))-off {
			return nil
		}
		for c := off; c < off+n; c += cs {
			found[c] = true
		}
		return b[off : off+n]
	}
	follow := func(table []byte) {
		for ; len(table) >= 8; table = table[8:] {
			if e := int64(be.Uint64(table) & hostMask); e != 0 {
				add(e, cs)
			}
		}
	}
	add(0, min(cs, int64(len(b))))
	follow(add(int64(be.Uint64(b[40:])), int64(be.Uint32(b[36:]))*8))
	follow(add(int64(be.Uint64(b[48:])), int64(be.Uint32(b[56:]))*cs))
	at := int64(be.Uint64(b[64:]))
	for range be.Uint32(b[60:]) {
		if at < 0 || at+40 > int64(len(b)) {
			break
		}
		add(at/cs*cs, cs)
		e := b[at:]
		follow(add(int64(be.Uint64(e)), int64(be.Uint32(e[8:]))*8))
		at = (at + 40 + int64(be.Uint32(e[36:])) + int64(be.Uint16(e[12:])) + int64(be.Uint16(e[14:])) + 7) &^ 7
	}
	list := make([]int64, 0, len(found))
	for c := range found {
		list = append(list, c)
	}
	slices.Sort(list)
	return list
}

func (l *layout) say(format string, a ...any) {
	if l.said != "" {
		l.said += ", "
	}
	l.said += fmt.Sprintf(format, a...)
}
