package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	storagefile "github.com/imgnbd/imgnbd/storage/file"
)

// chain opens local qcow2 and raw images, with what they name.
func chain() *image.Chain {
	return &image.Chain{Formats: []image.Format{Format(), raw.Format()}, Protocols: []storage.Protocol{storagefile.Protocol()}}
}

// openFile opens an image made by qemu-img.
func openFile(t testing.TB, file string, params ...image.Param) *Image {
	t.Helper()
	d, err := chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2", ReadOnly: true, Params: params})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return d.(*Image)
}

// A recipe makes an image by qemu-img and qemu-io.
type recipe struct {
	name     string
	options  string   // of qemu-img create
	size     string   // "" is 6M
	io       []string // commands of qemu-io
	compress string   // options of qemu-img convert -c, from what io wrote; "-" for none
}

// writes leaves every kind of cluster that does not need a feature.
var writes = []string{
	"write -P 0x11 0 64k", "write -P 0x22 100k 300k", "write -P 0x33 1M 1M", "write -P 0x44 2100000 1", "write -P 0x55 3M 4k",
	"write -z 1100k 200k", "write -z -u 1400k 128k", "discard 1600k 64k", "write -P 0x66 5M 512k", "write -z 4M 100k", "write -P 0x77 6291000 456",
}

var recipes = []recipe{
	{name: "default", io: writes},
	{name: "v2", options: "compat=0.10", io: writes},
	{name: "empty", io: nil},
	{name: "cluster 512", options: "cluster_size=512", io: writes},
	{name: "cluster 1k", options: "cluster_size=1k,refcount_bits=1", io: writes},
	{name: "cluster 4k", options: "cluster_size=4k,refcount_bits=64", io: writes},
	{name: "cluster 32k", options: "cluster_size=32k,refcount_bits=2", io: writes},
	{name: "cluster 2M", options: "cluster_size=2M,refcount_bits=8", io: writes},
	{name: "lazy", options: "lazy_refcounts=on,refcount_bits=4", io: writes},
	{name: "subclusters 16k", options: "extended_l2=on,cluster_size=16k", io: writes},
	{name: "subclusters 64k", options: "extended_l2=on,refcount_bits=32", io: writes},
	{name: "subclusters 2M", options: "extended_l2=on,cluster_size=2M", io: writes},
	{name: "metadata", options: "preallocation=metadata", io: writes},
	{name: "metadata, nothing written", options: "preallocation=metadata"},
	{name: "falloc", options: "preallocation=falloc", io: writes},
	{name: "full", options: "preallocation=full", size: "1M", io: writes[:1]},
	{name: "odd size", size: "1050112", io: writes[:2]},
	{name: "zlib", io: writes, compress: "compression_type=zlib"},
	{name: "zstd", io: writes, compress: "compression_type=zstd"},
	{name: "zlib 512", io: writes, compress: "cluster_size=512"},
	{name: "zstd 4k", io: writes, compress: "compression_type=zstd,cluster_size=4k"},
	{name: "zlib 2M", io: writes, compress: "cluster_size=2M"},
	{name: "zstd 2M", io: writes, compress: "compression_type=zstd,cluster_size=2M"},
	{name: "zlib v2", io: writes, compress: "compat=0.10"},
	{name: "zstd subclusters", io: writes, compress: "compression_type=zstd,extended_l2=on"},
	{name: "compressed and not", io: append([]string{"write -c -P 1 2M 64k", "write -c -P 2 2112k 64k"}, writes...)},
	{name: "data file", options: "data_file=DIR/data", io: writes},
	{name: "raw data file", options: "data_file=DIR/data,data_file_raw=on", io: writes},
	{name: "data file subclusters", options: "data_file=DIR/data,extended_l2=on", io: writes},
	{name: "large", size: "3T", io: []string{"write -P 1 2T 1M", "write -P 2 0 64k", "write -z 1T 3M"}},
}

// make makes the image and returns its path.
func (r *recipe) make(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.qcow2")
	size := r.size
	if size == "" {
		size = "6M"
	}
	args := []string{"create", "-q", "-f", "qcow2"}
	if r.options != "" {
		args = append(args, "-o", strings.ReplaceAll(r.options, "DIR", dir))
	}
	qemu.Img(t, append(args, file, size)...)
	if len(r.io) > 0 {
		qemu.IO(t, "qcow2", file, r.io...)
	}
	if r.compress != "" {
		plain := filepath.Join(dir, "plain.qcow2")
		if err := os.Rename(file, plain); err != nil {
			t.Fatal(err)
		}
		// Data that does not compress to nothing.
		noise := filepath.Join(dir, "noise")
		rnd := rand.New(rand.NewPCG(1, 2))
		b := make([]byte, 700<<10)
		for i := range b {
			b[i] = byte(rnd.Uint32()) & byte(0x0f|i>>12)
		}
		if err := os.WriteFile(noise, b, 0o600); err != nil {
			t.Fatal(err)
		}
		qemu.IO(t, "qcow2", plain, "write -s "+noise+" 2500k 700k")
		qemu.Img(t, "convert", "-f", "qcow2", "-O", "qcow2", "-c", "-o", r.compress, plain, file)
	}
	return file
}

func TestReadDifferential(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			file := r.make(t)
			im := openFile(t, file)
			if r.size != "3T" {
				compareBytes(t, im, file, "qcow2")
			}
			compareMap(t, im, file)
		})
	}
}

// compareBytes compares all of a device, read in several ways, with what
// qemu-img makes of the image.
func compareBytes(t *testing.T, d image.Device, file, format string, convert ...string) {
	t.Helper()
	flat := filepath.Join(t.TempDir(), "flat")
	args := append([]string{"convert", "-f", format, "-O", "raw"}, convert...)
	qemu.Img(t, append(args, file, flat)...)
	want, err := os.ReadFile(flat)
	if err != nil {
		t.Fatal(err)
	}
	if d.Info().Size != int64(len(want)) {
		t.Fatalf("size %d, want %d", d.Info().Size, len(want))
	}
	got := make([]byte, len(want))
	if n, err := d.ReadAt(got, 0); n != len(got) || err != nil {
		t.Fatalf("read: %d, %v", n, err)
	}
	compareRange(t, "in one", got, want, 0)
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 400 {
		off := rnd.Int64N(int64(len(want)))
		n := min(1+rnd.Int64N(1<<(1+rnd.IntN(20))), int64(len(want))-off)
		p := bytes.Repeat([]byte{0xa5}, int(n))
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatalf("read %d at %d: %v", n, off, err)
		}
		compareRange(t, "random", p, want[off:off+n], off)
		switch err := d.TryReadAt(p, off); {
		case err == nil:
			compareRange(t, "random try", p, want[off:off+n], off)
		case !errors.Is(err, image.ErrWouldBlock):
			t.Fatalf("try to read %d at %d: %v", n, off, err)
		}
	}
}

func compareRange(t *testing.T, what string, got, want []byte, off int64) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: %d bytes at %d: byte %d is %#x, want %#x", what, len(got), off, off+int64(i), got[i], want[i])
		}
	}
}

// A mapRow is what qemu-img map prints.
type mapRow struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset,omitempty"`
}

func (r mapRow) String() string {
	s := fmt.Sprintf("%d+%d depth %d present %v zero %v data %v", r.Start, r.Length, r.Depth, r.Present, r.Zero, r.Data)
	if r.Offset != nil {
		s += fmt.Sprintf(" at %d", *r.Offset)
	}
	return s
}

// compareMap compares all extents of a device with qemu-img map.
func compareMap(t *testing.T, d image.Device, file string) {
	t.Helper()
	var want []mapRow
	if err := json.Unmarshal([]byte(qemu.Img(t, "map", "-f", "qcow2", "--output=json", file)), &want); err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if !want[i].Data { // qemu-img says where a zero cluster would lie too
			want[i].Offset = nil
		}
	}
	if diff := cmp.Diff(lines(joinRows(want)), lines(joinRows(extentRows(t, d)))); diff != "" {
		t.Errorf("extents (- qemu-img, + ours):\n%s", diff)
	}
}

func lines(rows []mapRow) []string {
	var s []string
	for _, r := range rows {
		s = append(s, r.String())
	}
	return s
}

func extentRows(t *testing.T, d image.Device) []mapRow {
	t.Helper()
	var rows []mapRow
	for e, err := range image.Extents(d, 0, d.Info().Size, image.WantZero|image.WantAllocated|image.WantLocation) {
		if err != nil {
			t.Fatal(err)
		}
		r := mapRow{Start: e.Offset, Length: e.Length, Depth: e.Depth, Present: e.Allocated, Zero: e.Zero, Data: e.Data}
		if e.At.Store != nil {
			r.Offset = &e.At.Offset
			checkLocation(t, d, e)
		}
		rows = append(rows, r)
	}
	return rows
}

// checkLocation compares the bytes at a location with those of the device.
func checkLocation(t *testing.T, d image.Device, e image.Extent) {
	t.Helper()
	n := min(e.Length, 64<<10)
	a, b := make([]byte, n), make([]byte, n)
	if _, err := d.ReadAt(a, e.Offset+e.Length-n); err != nil {
		t.Fatal(err)
	}
	if _, err := e.At.Store.ReadAt(b, e.At.Offset+e.Length-n); err != nil {
		t.Fatalf("%+v: %v", e, err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%+v: other bytes lie there", e)
	}
}

func joinRows(rows []mapRow) []mapRow {
	var out []mapRow
	for _, r := range rows {
		if k := len(out) - 1; k >= 0 {
			l := &out[k]
			follows := r.Offset == nil && l.Offset == nil || r.Offset != nil && l.Offset != nil && *l.Offset+l.Length == *r.Offset
			if follows && l.Depth == r.Depth && l.Present == r.Present && l.Zero == r.Zero && l.Data == r.Data {
				l.Length += r.Length
				continue
			}
		}
		out = append(out, r)
	}
	return out
}
