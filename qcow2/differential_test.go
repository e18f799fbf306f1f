package qcow2

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	qcow2reader "github.com/lima-vm/go-qcow2reader"
	judgeimage "github.com/lima-vm/go-qcow2reader/image"
	judge "github.com/lima-vm/go-qcow2reader/image/qcow2"
	"github.com/lima-vm/go-qcow2reader/log"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// TestThirdJudge compares with go-qcow2reader, a reader that shares no code
// with qemu-img or with us, where it can read the image: no external data.
// Its Extent is right only for offsets and lengths of whole clusters, and
// knows no subclusters.
func TestThirdJudge(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	log.SetWarnFunc(func(string) {})
	judge.SetDecompressor(judge.CompressionTypeZstd, func(r io.Reader) (io.ReadCloser, error) {
		d, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	})
	for _, r := range recipes {
		if r.size == "3T" || strings.Contains(r.options, "data_file") || r.compress == "cluster_size=512" { // the last it reads as too short
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			file := r.make(t)
			im := openFile(t, file)
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			third, err := qcow2reader.OpenWithType(f, judge.Type)
			if err != nil {
				t.Fatal(err)
			}
			defer third.Close()
			if err := third.Readable(); err != nil {
				t.Fatal(err)
			}
			size := im.Info().Size
			a, b := make([]byte, size), make([]byte, size)
			if _, err := im.ReadAt(a, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(io.NewSectionReader(third, 0, size), b); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(a, b) {
				t.Error("the bytes differ")
			}
			if !im.geo.extended {
				compareExtents(t, im, third)
			}
		})
	}
}

func compareExtents(t *testing.T, im *Image, third judgeimage.Image) {
	t.Helper()
	for off := int64(0); off < im.info.Size; {
		n := min(1<<20, im.info.Size-off)
		theirs, err := third.Extent(off, n)
		if err != nil {
			t.Fatal(err)
		}
		for e, err := range image.Extents(im, off, theirs.Length, image.WantZero|image.WantAllocated) {
			if err != nil {
				t.Fatal(err)
			}
			// Holes of preallocated data are known to us alone.
			if e.Allocated != theirs.Allocated || e.Compressed != theirs.Compressed || theirs.Zero && !e.Zero {
				t.Fatalf("ours %+v, theirs %+v", e, theirs)
			}
		}
		off += theirs.Length
	}
}

// TestHeaderWords: where we refuse an image, qemu-img refuses it in the same
// words.
func TestHeaderWords(t *testing.T) {
	qemu.Require(t, "qemu-img")
	file := qemu.Create(t, "qcow2", "", "1G")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	for name, change := range map[string]func(b []byte){
		"version":         func(b []byte) { be.PutUint32(b[4:], 4) },
		"cluster bits":    func(b []byte) { be.PutUint32(b[20:], 22) },
		"header length":   func(b []byte) { be.PutUint32(b[100:], 96) },
		"header length 2": func(b []byte) { be.PutUint32(b[100:], 65544) },
		"backing offset":  func(b []byte) { be.PutUint64(b[8:], 65537) },
		"backing name":    func(b []byte) { be.PutUint64(b[8:], 1000); be.PutUint32(b[16:], 1024) },
		"features":        func(b []byte) { be.PutUint64(b[72:], 1<<63|1<<20) },
		"refcount width":  func(b []byte) { be.PutUint32(b[96:], 7) },
		"encryption":      func(b []byte) { be.PutUint32(b[32:], 9) },
		"compression":     func(b []byte) { b[104] = 9 },
		"compression bit": func(b []byte) { b[104] = 1 },
		"zlib with bit":   func(b []byte) { b[79] = 8 },
		"no refcounts":    func(b []byte) { be.PutUint32(b[56:], 0) },
		"many refcounts":  func(b []byte) { be.PutUint32(b[56:], 129) },
		"refcounts":       func(b []byte) { be.PutUint64(b[48:], 1000) },
		"snapshots":       func(b []byte) { be.PutUint32(b[60:], 70000) },
		"L1 large":        func(b []byte) { be.PutUint32(b[36:], 5<<20) },
		"L1 small":        func(b []byte) { be.PutUint32(b[36:], 1) },
		"L1 place":        func(b []byte) { be.PutUint64(b[40:], 1<<63) },
		"size":            func(b []byte) { be.PutUint64(b[24:], 1<<61) },
		"extension":       func(b []byte) { be.PutUint32(b[116:], 1<<30) },
		"data file raw":   func(b []byte) { b[95] = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(whole)
			change(b)
			file := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(t.Context(), openStore(t, file), image.Options{ReadOnly: true})
			if err == nil {
				t.Fatal("it was opened")
			}
			r := qemu.Try(t, "qemu-img", "map", "-f", "qcow2", file)
			if !strings.HasSuffix(r.Stderr, ": "+err.Error()+"\n") {
				t.Errorf("ours %q, qemu-img's %q", err, r.Stderr)
			}
		})
	}
}
