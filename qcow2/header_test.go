package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/image"
)

// testHeader returns a header that passes every check: 1 GiB in clusters of
// 64 KiB.
func testHeader() *header {
	return &header{
		version: 3, clusterBits: 16, size: 1 << 30, l1Size: 2, l1Offset: 3 << 16, refTableOffset: 1 << 16,
		refTableClusters: 1, refcountOrder: 4, length: headerLengthNew, unknown: make([]byte, 7),
		extensions: []extension{{extBackingFormat, []byte("qcow2")}, {0x12345678, []byte("keep me")}},
		backing:    "base.qcow2",
	}
}

func mustEncode(t testing.TB, h *header) []byte {
	t.Helper()
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHeaderRoundTrip(t *testing.T) {
	h := testHeader()
	b := mustEncode(t, h)
	got, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := got.check(forWriting); err != nil {
		t.Fatal(err)
	}
	if got.backing != "base.qcow2" || got.backingFormat() != "qcow2" || string(got.extension(0x12345678)) != "keep me" {
		t.Errorf("got %+v", got)
	}
	if !bytes.Equal(mustEncode(t, got), b) {
		t.Error("encoding what was parsed gives other bytes")
	}
	got.setExtension(extBackingFormat, nil)
	got.setExtension(extDataFile, []byte("data"))
	if got.backingFormat() != "" || got.dataFileName() != "data" || len(got.extensions) != 2 {
		t.Errorf("after setExtension: %+v", got.extensions)
	}
}

func TestHeaderRefuses(t *testing.T) {
	be := binary.BigEndian
	for _, tt := range []struct {
		name string
		edit func(b []byte)
		want string
		kind error
	}{
		{"magic", func(b []byte) { b[0] = 'X' }, "Image is not in qcow2 format", image.ErrWrongFormat},
		{"version", func(b []byte) { be.PutUint32(b[4:], 4) }, "Unsupported qcow2 version 4", errors.ErrUnsupported},
		{"cluster small", func(b []byte) { be.PutUint32(b[20:], 8) }, "Unsupported cluster size: 2^8", errors.ErrUnsupported},
		{"cluster large", func(b []byte) { be.PutUint32(b[20:], 63) }, "Unsupported cluster size: 2^63", errors.ErrUnsupported},
		{"short", func(b []byte) { be.PutUint32(b[100:], 96) }, "qcow2 header too short", image.ErrCorrupt},
		{"long", func(b []byte) { be.PutUint32(b[100:], 70000) }, "qcow2 header exceeds cluster size", image.ErrCorrupt},
		{"backing offset", func(b []byte) { be.PutUint64(b[8:], 65537) }, "Invalid backing file offset", image.ErrCorrupt},
		{"backing name", func(b []byte) { be.PutUint32(b[16:], 1024) }, "Backing file name too long", image.ErrCorrupt},
		{"feature", func(b []byte) { be.PutUint64(b[72:], 1<<40) }, "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000", errors.ErrUnsupported},
		{"corrupt", func(b []byte) { be.PutUint64(b[72:], 2) }, "qcow2: Image is corrupt; cannot be opened read/write", image.ErrCorrupt},
		{"refcount width", func(b []byte) { be.PutUint32(b[96:], 7) }, "Reference count entry width too large; may not exceed 64 bits", image.ErrCorrupt},
		{"encryption", func(b []byte) { be.PutUint32(b[32:], 3) }, "Unsupported encryption method 3", errors.ErrUnsupported},
		{"compression", func(b []byte) { b[104] = 2 }, "qcow2: unknown compression type: 2", errors.ErrUnsupported},
		{"compression bit", func(b []byte) { b[104] = 1 }, "qcow2: Compression type incompatible feature bit must be set", image.ErrCorrupt},
		{"no compression bit", func(b []byte) { b[79] = 8 }, "qcow2: Compression type incompatible feature bit must not be set", image.ErrCorrupt},
		{"no reftable", func(b []byte) { be.PutUint32(b[56:], 0) }, "Image does not contain a reference count table", image.ErrCorrupt},
		{"reftable", func(b []byte) { be.PutUint32(b[56:], 129) }, "Reference count table too large", image.ErrCorrupt},
		{"reftable place", func(b []byte) { be.PutUint64(b[48:], 512) }, "Reference count table offset invalid", image.ErrCorrupt},
		{"snapshots", func(b []byte) { be.PutUint32(b[60:], 65537) }, "Snapshot table too large", image.ErrCorrupt},
		{"L1 large", func(b []byte) { be.PutUint32(b[36:], 4<<20+1) }, "Active L1 table too large", image.ErrCorrupt},
		{"L1 small", func(b []byte) { be.PutUint32(b[36:], 1) }, "L1 table is too small", image.ErrCorrupt},
		{"L1 place", func(b []byte) { be.PutUint64(b[40:], math.MaxUint64&^0xffff) }, "Active L1 table offset invalid", image.ErrCorrupt},
		{"size", func(b []byte) { be.PutUint64(b[24:], 1<<63) }, "Image is too big", image.ErrCorrupt},
		{"size and L1", func(b []byte) { be.PutUint64(b[24:], 1<<62) }, "Image is too big", image.ErrCorrupt},
		{"extension", func(b []byte) { be.PutUint32(b[116:], 1<<20) }, "Header extension too large", image.ErrCorrupt},
		{"extension in the name", func(b []byte) { be.PutUint64(b[8:], 116) }, "Header extension too large", image.ErrCorrupt},
		{"end marker with a length", func(b []byte) { be.PutUint32(b[112:], 0); be.PutUint32(b[116:], 1<<20) }, "Header extension too large", image.ErrCorrupt},
		{"raw data file", func(b []byte) { b[95] = 2 }, "data-file-raw requires a data file", image.ErrCorrupt},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := mustEncode(t, testHeader())
			tt.edit(b)
			h, err := parseHeader(b)
			if err == nil {
				err = h.check(forWriting)
			}
			if err == nil || err.Error() != tt.want || !errors.Is(err, tt.kind) {
				t.Errorf("got %v, want %q wrapping %v", err, tt.want, tt.kind)
			}
		})
	}
}

func TestUnknownFeatureByName(t *testing.T) {
	h := testHeader()
	row := make([]byte, 48)
	row[1] = 40
	copy(row[2:], "time\x1b travel\n\xff")
	h.extensions = append(h.extensions, extension{extFeatureNames, row})
	h.incompatible = 1<<40 | 1<<41
	err := h.check(forReading)
	if want := "Unsupported qcow2 feature(s): time\ufffd travel\ufffd\ufffd, Unknown incompatible feature: 20000000000"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %q", err, want)
	}
}

func TestHeaderWithoutRoom(t *testing.T) {
	h := testHeader()
	h.clusterBits = 9
	h.backing = strings.Repeat("x", 500)
	if _, err := h.encode(); err == nil {
		t.Error("a name that does not fit was encoded")
	}
}

func TestEntries(t *testing.T) {
	for bits := uint32(minClusterBits); bits <= maxClusterBits; bits++ {
		h := testHeader()
		h.clusterBits = bits
		g := newGeometry(h)
		for _, host := range []int64{0, 1, 511, 512, 0x50001, 1<<40 + 77} {
			for _, n := range []int64{1, 2, 511, 512, g.clusterSize - 1, g.clusterSize} {
				e := g.compressedEntry(host, n)
				gotHost, gotLen := g.compressed(e)
				if gotHost != host || gotLen < n || gotLen >= n+512 || g.kind(e) != clusterCompressed {
					t.Errorf("cluster bits %d: (%d, %d) became (%d, %d)", bits, host, n, gotHost, gotLen)
				}
			}
		}
	}
}

func TestRefcountWidths(t *testing.T) {
	for order := uint(0); order <= 6; order++ {
		b := make([]byte, 512)
		n := int64(512*8) >> order
		want := make([]uint64, n)
		for i := range n {
			want[i] = uint64(i*0x9e3779b97f4a7c1) & maxRefcount(order)
			setRefcount(b, i, order, maxRefcount(order))
		}
		for i := range n {
			setRefcount(b, i, order, want[i])
		}
		for i := range n {
			if got := refcount(b, i, order); got != want[i] {
				t.Fatalf("width %d, count %d: got %d, want %d", 1<<order, i, got, want[i])
			}
		}
	}
}

func TestGeometry(t *testing.T) {
	for bits := uint32(minClusterBits); bits <= maxClusterBits; bits++ {
		for _, ext := range []bool{false, true} {
			h := testHeader()
			h.clusterBits = bits
			if ext {
				h.incompatible |= incompatExtendedL2
			}
			g := newGeometry(h)
			if g.sliceSize() != min(sliceBytes, g.clusterSize) {
				t.Errorf("cluster bits %d: slice of %d bytes", bits, g.sliceSize())
			}
			for _, off := range []int64{0, 1, g.clusterSize, g.sliceSpan() - 1, g.tableSpan() + 5*g.sliceSpan() + 3*g.clusterSize + 9} {
				no, i := g.sliceNo(off), g.sliceIndex(off)
				if got := g.sliceStart(no) + int64(i)<<g.clusterBits + g.within(off); got != off {
					t.Errorf("cluster bits %d: offset %d came back as %d", bits, off, got)
				}
				l1, within := g.sliceTable(no)
				entry := within/8/int64(g.entryWords) + int64(i)
				if l1 != g.l1Index(off) || entry != off>>g.clusterBits&(1<<g.l2Bits-1) {
					t.Errorf("cluster bits %d, offset %d: table %d entry %d", bits, off, l1, entry)
				}
			}
			if g.l1Entries(g.tableSpan()) != 1 || g.l1Entries(g.tableSpan()+1) != 2 || g.l1Entries(0) != 0 {
				t.Errorf("cluster bits %d: l1Entries", bits)
			}
		}
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(mustEncode(f, testHeader()))
	h := testHeader()
	h.version, h.length, h.backing = 2, headerLengthV2, ""
	f.Add(mustEncode(f, h))
	h = testHeader()
	h.extensions = append(h.extensions, extension{extBitmaps, bitmapsExtension{1, 32, 1 << 16}.encode()})
	f.Add(mustEncode(f, h))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil || h.check(forReading) != nil {
			return
		}
		g := newGeometry(h)
		if int64(h.l1Size) < g.l1Entries(h.diskSize()) || h.l1Size > maxL1Size/8 {
			t.Fatalf("L1 of %d entries passed", h.l1Size)
		}
		enc, err := h.encode()
		if err != nil {
			return // the padding of extensions may push the name out
		}
		again, err := parseHeader(enc)
		if err != nil {
			t.Fatalf("parsing what was encoded: %v", err)
		}
		if err := again.check(forReading); err != nil {
			t.Fatalf("checking what was encoded: %v", err)
		}
		if again.backing != h.backing || len(again.extensions) != len(h.extensions) || again.size != h.size {
			t.Fatalf("encoded and parsed: %+v, was %+v", again, h)
		}
	})
}
