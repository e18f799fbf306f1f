package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Huge returns images that take little space, and claim to have much.
func Huge() []Image {
	return []Image{
		sameTables("one L2 table, four million times", 9, 0),
		sameTables("one L2 table of 2 MiB, four million times", 21, 0),
		sameTables("four million L2 tables in a hole", 9, 512),
		oneBlock(),
		emptyBlocks(),
		manySnapshots(),
		manyExtensions(),
		wideBitmaps(),
		bombs("bombs", 0),
		bombs("bombs of zstd", 1),
		farEnd(),
		farApart(),
	}
}

// small returns the first clusters of an image of version 3: header, refcount
// table, refcount block and L1 table, whose clusters are all counted once.
func small(bits int, disk uint64, l1Size uint32, l1 int64) []byte {
	cs := int64(1) << bits
	b := make([]byte, 4*cs)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], uint32(bits))
	be.PutUint64(b[24:], disk)
	be.PutUint32(b[36:], l1Size)
	be.PutUint64(b[40:], uint64(l1))
	be.PutUint64(b[48:], uint64(cs))
	be.PutUint32(b[56:], 1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], 104)
	be.PutUint64(b[cs:], uint64(2*cs))
	for c := range int64(min(cs/2, 200)) {
		be.PutUint16(b[2*cs+c*2:], 1)
	}
	return b
}

// sameTables has an L1 table of 32 MiB. Its entries lead to one table, or
// step bytes further each.
func sameTables(name string, bits int, step uint64) Image {
	const entries = 4 << 20
	cs := int64(1) << bits
	l1 := make([]byte, entries*8)
	end := 8*cs + entries*8
	for i := range uint64(entries) {
		binary.BigEndian.PutUint64(l1[i*8:], copied|uint64(end+cs)&^uint64(cs-1)+i*step)
	}
	at := 4 * cs
	disk := uint64(entries) * uint64(cs*cs/8)
	return Image{Name: name, Size: end + 2*cs + int64(entries*step), Parts: []Part{{0, small(bits, disk, entries, at)}, {at, l1}}, Slow: true}
}

// farApart refers to one cluster, of 512 bytes, in each 2 MiB of a store of
// 128 GiB.
func farApart() Image {
	const bits, tables = 9, 1024
	l1, l2 := make([]byte, tables*8), make([]byte, tables<<bits)
	at := uint64(4 << bits)
	for i := range uint64(tables) {
		binary.BigEndian.PutUint64(l1[i*8:], copied|at+uint64(len(l1))+i<<bits)
	}
	for i := range uint64(len(l2) / 8) {
		binary.BigEndian.PutUint64(l2[i*8:], copied|(i<<21+1<<20))
	}
	return Image{Name: "references that lie far apart", Size: 1 << 37,
		Parts: []Part{{0, small(bits, tables<<(2*bits-3), tables, int64(at))}, {int64(at), append(l1, l2...)}}}
}

// oneBlock has a refcount table of 8 MiB that leads to one block all over.
func oneBlock() Image {
	const cs, n = 65536, 8 << 20
	b := small(16, 1<<40, 2048, 3*cs)
	binary.BigEndian.PutUint64(b[48:], 4*cs)
	binary.BigEndian.PutUint32(b[56:], n/cs)
	table := make([]byte, n)
	for i := 0; i < n; i += 8 {
		binary.BigEndian.PutUint64(table[i:], 2*cs)
	}
	return Image{Name: "one refcount block, a million times", Size: 1 << 40, Parts: []Part{{0, b}, {4 * cs, table}}}
}

// emptyBlocks has 131,072 refcount blocks of 1 MiB, all but the first in a hole.
func emptyBlocks() Image {
	const cs, blocks = 1 << 20, 1 << 17
	b := small(20, 1<<30, 1, 3*cs)
	for i := uint64(1); i < blocks; i++ {
		binary.BigEndian.PutUint64(b[cs+i*8:], (3+i)*cs)
	}
	return Image{Name: "128 GiB of refcounts, all zero", Size: (3 + blocks) * cs, Parts: []Part{{0, b}}, Slow: true}
}

// manySnapshots has 65,536 snapshots with an L1 table of 32 MiB each, which
// are one.
func manySnapshots() Image {
	const cs, n = 65536, 65536
	b := small(16, 1<<40, 2048, 3*cs)
	binary.BigEndian.PutUint32(b[60:], n)
	binary.BigEndian.PutUint64(b[64:], 16*cs)
	var table bytes.Buffer
	for i := range n {
		e := make([]byte, 64)
		binary.BigEndian.PutUint64(e, 1024*cs)
		binary.BigEndian.PutUint32(e[8:], 4<<20)
		binary.BigEndian.PutUint16(e[12:], 5)
		binary.BigEndian.PutUint32(e[36:], 16)
		binary.BigEndian.PutUint64(e[48:], 1<<40)
		copy(e[56:], fmt.Sprintf("%05d", i))
		table.Write(e)
	}
	return Image{Name: "65,536 snapshots that share a table", Size: 4 << 30, Parts: []Part{{0, b}, {16 * cs, table.Bytes()}}, Slow: true}
}

// manyExtensions has a header of 2 MiB, full of extensions of no length.
func manyExtensions() Image {
	const cs = 2 << 20
	b := small(21, 1<<30, 1, 3*cs)
	for at := 104; at+8 <= cs; at += 8 {
		binary.BigEndian.PutUint32(b[at:], 0x11111111)
	}
	return Image{Name: "260,000 extensions", Size: int64(len(b)), Parts: []Part{{0, b}}}
}

// wideBitmaps has bitmaps of 512 MiB each that take no space.
func wideBitmaps() Image {
	const cs, disk, count = 65536, 2 << 40, 64
	const entries = disk / 512 / 8 / cs
	b := small(16, disk, 4096, 3*cs)
	var dir bytes.Buffer
	for i := range count {
		e := make([]byte, 32)
		binary.BigEndian.PutUint64(e, 64*cs)
		binary.BigEndian.PutUint32(e[8:], entries)
		binary.BigEndian.PutUint32(e[12:], 2) // it records
		e[16], e[17], e[19] = 1, 9, 3
		copy(e[24:], fmt.Sprintf("%03d", i))
		dir.Write(e)
	}
	binary.BigEndian.PutUint64(b[88:], 1)
	binary.BigEndian.PutUint32(b[104:], 0x23852875)
	binary.BigEndian.PutUint32(b[108:], 24)
	binary.BigEndian.PutUint32(b[112:], count)
	binary.BigEndian.PutUint64(b[120:], uint64(dir.Len()))
	binary.BigEndian.PutUint64(b[128:], 16*cs)
	return Image{Name: "64 bitmaps of 512 MiB", Size: 1 << 30, Parts: []Part{{0, b}, {16 * cs, dir.Bytes()}}}
}

// bombs has 200,000 compressed clusters of 2 MiB, all in the same few bytes.
// Those of zstd ask for a window of 2 GiB.
func bombs(name string, method byte) Image {
	const cs = 2 << 20
	b := small(21, 200000*cs, 1, 3*cs)
	data := bomb(cs)
	if method == 1 {
		// A frame whose window is 2^(10+21) bytes, and one block of 128 KiB that repeats a byte.
		data = []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x03, 0x00, 0x10, 'x'}
		binary.BigEndian.PutUint64(b[72:], 8)
		binary.BigEndian.PutUint32(b[100:], 112)
		b[104] = 1
	}
	sectors := uint64(len(data)-1) / 512
	entry := 1<<62 | sectors<<(62-13) | 5*cs
	l2 := make([]byte, cs)
	for i := range 200000 {
		binary.BigEndian.PutUint64(l2[i*8:], entry)
	}
	binary.BigEndian.PutUint64(b[3*cs:], copied|4*cs)
	return Image{Name: name, Size: 6 * cs, Parts: []Part{{0, b}, {4 * cs, l2}, {5 * cs, data}}}
}

// farEnd is an image that somebody made 1 TiB longer, which is more than its
// refcount table can be made to count.
func farEnd() Image {
	return Image{Name: "a far end", Size: 1 << 40, Parts: []Part{{0, small(9, 1<<20, 32, 3*512)}}}
}
