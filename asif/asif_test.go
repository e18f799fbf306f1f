package asif

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	goasif "github.com/lima-vm/go-qcow2reader/image/asif"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/image/imagetest"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A builder makes images, as the format's description says they are made.
type builder struct {
	geometry
	size   int64
	file   []byte
	tables map[int64]int64 // by index, the chunk number
}

func newBuilder(size, chunk, sector int64) *builder {
	h := header{chunk: chunk, sector: sector, size: size}
	b := &builder{geometry: h.geometry(), size: size, file: make([]byte, chunk), tables: make(map[int64]int64)}
	copy(b.file, magic)
	b.put32(4, 1)
	b.put32(8, 512)
	b.put64(0x10, 0x200)
	b.put64(0x18, 0x2000)
	b.put64(0x30, uint64(size/sector))
	b.put64(0x38, uint64(max(1<<40, 2*size)/sector))
	b.put32(0x40, uint32(chunk))
	binary.BigEndian.PutUint16(b.file[0x44:], uint16(sector))
	b.put64(0x200, 7) // the second directory is older, and wrong
	b.put64(0x2000, 6)
	for i := range int64(16) {
		b.put64(0x2008+8*i, 0x99)
	}
	return b
}

func (b *builder) put32(off int64, v uint32) { binary.BigEndian.PutUint32(b.file[off:], v) }
func (b *builder) put64(off int64, v uint64) { binary.BigEndian.PutUint64(b.file[off:], v) }
func (b *builder) get64(off int64) uint64    { return binary.BigEndian.Uint64(b.file[off:]) }

// grow adds a chunk of rubbish or of zeros and returns its number.
func (b *builder) grow(fill byte) int64 {
	n := int64(len(b.file)) / b.chunk
	b.file = append(b.file, bytes.Repeat([]byte{fill}, int(b.chunk))...)
	return n
}

// entry returns the file offsets of the entries of the chunk that holds off,
// and of its bitmap.
func (b *builder) entry(off int64) (chunk, bitmap int64) {
	t := off / b.tableSpan
	if b.tables[t] == 0 {
		b.tables[t] = b.grow(0)
		b.put64(0x208+8*t, uint64(b.tables[t]))
	}
	in := off % b.tableSpan
	group := b.tables[t]*b.chunk + in/b.groupSpan*b.groupSize
	return group + in%b.groupSpan/b.chunk*8, group + b.perGroup*8
}

// full makes the chunk that holds off one that was written as a whole.
func (b *builder) full(off int64, data []byte) {
	e, _ := b.entry(off)
	n := b.grow(0)
	b.put64(e, statusFull<<62|uint64(n))
	copy(b.file[n*b.chunk:], data)
}

// part writes one sector, in a chunk that holds rubbish elsewhere.
func (b *builder) part(off int64, data []byte) {
	e, bm := b.entry(off)
	if b.get64(e) == 0 {
		n := b.grow(0xee)
		b.put64(e, statusPart<<62|uint64(n))
	}
	if b.get64(bm) == 0 {
		n := b.grow(0)
		b.put64(bm, uint64(n))
	}
	copy(b.file[int64(b.get64(e)&chunkMask)*b.chunk+off%b.chunk:], data[:b.sector])
	s := off % b.groupSpan / b.sector
	b.file[int64(b.get64(bm)&chunkMask)*b.chunk+s/4] |= 1 << (s % 4 * 2)
}

// sample makes an image with everything in it, and what it should read as.
func sample(size, chunk, sector int64) (file, content []byte) {
	b := newBuilder(size, chunk, sector)
	content = make([]byte, size)
	rnd := rand.NewChaCha8([32]byte{9})
	for off := int64(0); off < size; off += chunk {
		c := content[off:min(off+chunk, size)]
		switch off / chunk % 4 {
		case 1:
			rnd.Read(c)
			b.full(off, c)
		case 2:
			for s := int64(0); s+sector <= int64(len(c)); s += sector {
				if s/sector%7 < 3 || s/sector%11 == 9 {
					rnd.Read(c[s : s+sector])
					b.part(off+s, c[s:])
				}
			}
		case 3:
			b.entry(off) // no data, yet an entry
		}
	}
	return b.file, content
}

func TestDevice(t *testing.T) {
	for _, tt := range []struct{ size, chunk, sector int64 }{
		{600 << 10, 32 << 10, 512},
		{600<<10 + 512, 32 << 10, 512}, // ends within a chunk
		{3 << 20, 1 << 20, 512},        // as Apple makes them
		{1 << 20, 160 << 10, 4096},     // chunks need be no power of two
		{4096, 256 << 10, 4096},
		{0, 1 << 20, 512},
	} {
		file, content := sample(tt.size, tt.chunk, tt.sector)
		for _, opt := range [][]storagetest.MemOption{nil, {storagetest.NeverTry}} {
			if opt != nil && tt.size > 1<<20 {
				continue
			}
			imagetest.Run(t, imagetest.Target{New: func(testing.TB) imagetest.Disk {
				return imagetest.Disk{
					Content: content,
					Open: func() (image.Device, error) {
						return Open(storagetest.MemOf(file, opt...), image.Options{Name: "disk.asif", ReadOnly: true})
					},
				}
			}})
		}
	}
}

func open(t *testing.T, file []byte) (*Disk, error) {
	t.Helper()
	d, err := Open(storagetest.MemOf(file), image.Options{Name: "disk.asif", ReadOnly: true})
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

// A disk of several tables and groups, most of them absent.
func TestTables(t *testing.T) {
	const chunk = 64 << 10 // 3 groups a table
	b := newBuilder(3*1<<30, chunk, 512)
	b.size = 3 << 30
	places := []int64{0, b.groupSpan - chunk, b.groupSpan, 2*b.groupSpan + chunk, b.tableSpan - chunk, b.tableSpan, 5 * b.tableSpan, b.size - chunk}
	for i, off := range places {
		b.full(off, bytes.Repeat([]byte{byte(i + 1)}, chunk))
	}
	d, err := open(t, b.file)
	if err != nil {
		t.Fatal(err)
	}
	for i, off := range places {
		p := make([]byte, chunk)
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, chunk)) {
			t.Errorf("chunk at %#x holds other bytes", off)
		}
	}
	var data int64
	for e, err := range image.Extents(d, 0, b.size, image.WantZero) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Data {
			data += e.Length
		}
	}
	if want := int64(len(places)) * chunk; data != want {
		t.Errorf("%d bytes of data, not %d", data, want)
	}
}

// go-qcow2reader is the judge of what it reads.
func TestSizeAgrees(t *testing.T) {
	file, _ := sample(600<<10, 32<<10, 512)
	img, err := goasif.Open(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	d, err := open(t, file)
	if err != nil {
		t.Fatal(err)
	}
	if img.Size() != d.Info().Size {
		t.Errorf("go-qcow2reader says %d bytes, we %d", img.Size(), d.Info().Size)
	}
	if !probe(bytes.NewReader(file), int64(len(file))) {
		t.Error("not recognised")
	}
}

func TestWriting(t *testing.T) {
	file, _ := sample(1<<20, 32<<10, 512)
	if _, err := Open(storagetest.MemOf(file), image.Options{}); !errors.Is(err, image.ErrReadOnly) {
		t.Errorf("opening for writing: %v", err)
	}
}

// What is wrong is found when it is opened, or else when it is read.
func TestCorrupt(t *testing.T) {
	be := binary.BigEndian
	for name, tt := range map[string]struct {
		spoil func(b []byte)
		want  error
	}{
		"no magic":            {func(b []byte) { b[0] = 'S' }, image.ErrWrongFormat},
		"version":             {func(b []byte) { b[7] = 2 }, errors.ErrUnsupported},
		"header size":         {func(b []byte) { be.PutUint32(b[8:], 8) }, image.ErrCorrupt},
		"segments":            {func(b []byte) { be.PutUint16(b[0x46:], 2) }, errors.ErrUnsupported},
		"more than most":      {func(b []byte) { be.PutUint64(b[0x38:], 1) }, image.ErrCorrupt},
		"size overflows":      {func(b []byte) { be.PutUint64(b[0x30:], 1<<63); be.PutUint64(b[0x38:], 1<<63) }, image.ErrCorrupt},
		"too many tables":     {func(b []byte) { be.PutUint64(b[0x30:], 1<<51); be.PutUint64(b[0x38:], 1<<51) }, image.ErrCorrupt},
		"chunk 0":             {func(b []byte) { be.PutUint32(b[0x40:], 0) }, image.ErrCorrupt},
		"chunk too small":     {func(b []byte) { be.PutUint32(b[0x40:], 16384) }, image.ErrCorrupt},
		"chunk too large":     {func(b []byte) { be.PutUint32(b[0x40:], 1<<31) }, image.ErrCorrupt},
		"chunk odd":           {func(b []byte) { be.PutUint32(b[0x40:], 32768+1) }, image.ErrCorrupt},
		"sector 0":            {func(b []byte) { be.PutUint16(b[0x44:], 0) }, image.ErrCorrupt},
		"sector odd":          {func(b []byte) { be.PutUint16(b[0x44:], 513) }, image.ErrCorrupt},
		"directory far":       {func(b []byte) { be.PutUint64(b[0x10:], 1<<40) }, image.ErrCorrupt},
		"directory overflows": {func(b []byte) { be.PutUint64(b[0x10:], 1<<63) }, image.ErrCorrupt},
		"directory in header": {func(b []byte) { be.PutUint64(b[0x10:], 0) }, image.ErrCorrupt},
		"sequence":            {func(b []byte) { be.PutUint64(b[0x200:], 1<<63) }, image.ErrCorrupt},
		"table far":           {func(b []byte) { be.PutUint64(b[0x208:], 1<<40) }, image.ErrCorrupt},
		"table flags":         {func(b []byte) { be.PutUint64(b[0x208:], 1<<63|1) }, image.ErrCorrupt},
		"entry far":           {func(b []byte) { be.PutUint64(b[32768+8:], 1<<62|1<<40) }, image.ErrCorrupt},
		"entry 0":             {func(b []byte) { be.PutUint64(b[32768+8:], 1<<62) }, image.ErrCorrupt},
		"entry at the end":    {func(b []byte) { be.PutUint64(b[32768+8:], 1<<62|uint64(len(b)/32768)) }, image.ErrCorrupt},
		"entry reserved":      {func(b []byte) { b[32768+8] |= 0x20 }, errors.ErrUnsupported},
		"entry status 0":      {func(b []byte) { b[32768+8] &= 0x3f }, errors.ErrUnsupported},
		"entry status 2":      {func(b []byte) { b[32768+8] = 0x80 }, errors.ErrUnsupported},
		"bitmap 0":            {func(b []byte) { be.PutUint64(b[32768+8*2048:], 0) }, image.ErrCorrupt},
		"bitmap far":          {func(b []byte) { be.PutUint64(b[32768+8*2048:], 1<<40) }, image.ErrCorrupt},
		"sector state": {func(b []byte) {
			clear(b[be.Uint64(b[32768+8*2048:])*32768:][:32768])
			for i := range 32768 {
				b[be.Uint64(b[32768+8*2048:])*32768+uint64(i)] = 0xaa
			}
		}, errors.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			file, _ := sample(600<<10, 32<<10, 512)
			tt.spoil(file)
			d, err := open(t, file)
			if err == nil {
				_, err = d.ReadAt(make([]byte, d.Info().Size), 0)
				var last error
				for _, e := range image.Extents(d, 0, d.Info().Size, image.WantZero) {
					last = e
				}
				if (last == nil) != (err == nil) {
					t.Errorf("reading says %v, extents say %v", err, last)
				}
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, not %v", err, tt.want)
			}
		})
	}
	// A table that was cut off, within what is read of it at once.
	b := newBuilder(600<<10, 32<<10, 512)
	b.full(0, []byte{1})
	e, _ := b.entry(0)
	at := b.grow(0) * b.chunk
	copy(b.file[at:], b.file[e:e+b.chunk])
	b.put64(0x208, uint64(at/b.chunk))
	if d, err := open(t, b.file[:at+24]); err != nil {
		t.Error(err)
	} else if _, err := d.ReadAt(make([]byte, 512), 10*b.chunk); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("an entry that is past the end: %v", err)
	} else if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("an entry before it: %v", err)
	}
	file, _ := sample(600<<10, 32<<10, 512)
	for n := range 0x300 {
		if d, err := open(t, file[:n]); err == nil {
			t.Fatalf("an image of %d bytes is opened: %v", n, d.Info())
		}
	}
}

func FuzzOpen(f *testing.F) {
	for _, size := range []int64{0, 64 << 10, 200 << 10} {
		file, _ := sample(size, 32<<10, 512)
		f.Add(file)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		d, err := open(t, file)
		if err != nil {
			return
		}
		size := d.Info().Size
		p := make([]byte, min(size, 1<<20))
		d.ReadAt(p, 0)
		d.ReadAt(p, size-int64(len(p)))
		d.TryReadAt(p, 0)
		steps := 0
		for range image.Extents(d, 0, size, image.WantZero) {
			if steps++; steps == 1000 {
				break
			}
		}
	})
}
