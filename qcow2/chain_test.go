package qcow2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/image/imagetest"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A layer is made by qemu-img on top of the one before it.
type testLayer struct {
	format, options, size string
	io                    []string
}

var chains = []struct {
	name   string
	layers []testLayer
}{
	{"same size", []testLayer{
		{"qcow2", "", "4M", []string{"write -P 1 0 4M"}},
		{"qcow2", "", "4M", []string{"write -P 2 1M 64k", "write -z 2M 64k", "write -P 3 3000k 1k"}},
	}},
	{"raw below", []testLayer{
		{"raw", "", "4M", []string{"write -P 1 0 1M", "write -P 2 3M 1M"}},
		{"qcow2", "", "4M", []string{"write -P 3 1000k 100k"}},
	}},
	{"short raw below", []testLayer{
		{"raw", "", "1050112", []string{"write -P 1 0 1050112"}},
		{"qcow2", "", "4M", []string{"write -P 3 2M 100k"}},
	}},
	{"shorter and shorter", []testLayer{
		{"qcow2", "cluster_size=4k", "1M", []string{"write -P 1 0 300k", "write -P 1 1000k 24k"}},
		{"qcow2", "", "2M", []string{"write -P 2 100k 4k", "write -P 2 1900k 100k"}},
		{"qcow2", "extended_l2=on", "4M", []string{"write -P 3 50k 4k", "write -P 3 2200k 3k"}},
	}},
	{"longer below", []testLayer{
		{"qcow2", "", "8M", []string{"write -P 1 0 8M"}},
		{"qcow2", "cluster_size=512", "3M", []string{"write -P 2 1M 10k", "discard 2M 64k"}},
	}},
	{"short in the middle", []testLayer{
		{"raw", "", "4M", []string{"write -P 1 0 4M"}},
		{"qcow2", "", "1M", []string{"write -P 2 0 64k"}},
		{"qcow2", "", "4M", []string{"write -P 3 3M 64k"}},
		{"qcow2", "compat=0.10", "4M", []string{"write -P 4 128k 64k"}},
	}},
}

// makeChain makes the layers and returns the path of the top.
func makeChain(t testing.TB, layers []testLayer) string {
	t.Helper()
	dir := t.TempDir()
	var below, belowFormat, file string
	for i, l := range layers {
		file = filepath.Join(dir, fmt.Sprintf("layer%d", i))
		args := []string{"create", "-q", "-f", l.format}
		if l.options != "" {
			args = append(args, "-o", l.options)
		}
		if below != "" {
			args = append(args, "-b", filepath.Base(below), "-F", belowFormat)
		}
		qemu.Img(t, append(args, file, l.size)...)
		qemu.IO(t, l.format, file, l.io...)
		below, belowFormat = file, l.format
	}
	return file
}

func TestChains(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	for _, tt := range chains {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := makeChain(t, tt.layers)
			im := openFile(t, file)
			compareBytes(t, im, file, "qcow2")
			compareDepth(t, im, file)
		})
	}
}

// servedByQEMU has qemu-nbd serve an image. It returns what tells the block status
// of a metadata context, and what ends the server.
func servedByQEMU(t testing.TB, file string, options ...string) (status func(context string) []nbdRow, stop func() error) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	_, stop = qemu.Start(t, "qemu-nbd", append(options, "-r", "-t", "-f", "qcow2", "-k", sock, file)...)
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", sock); err == nil {
			c.Close()
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatal("qemu-nbd does not listen")
		}
	}
	return func(context string) (rows []nbdRow) {
		t.Helper()
		out := qemu.Run(t, "nbdinfo", "--json", "--map="+context, "nbd+unix:///?socket="+sock)
		if err := json.Unmarshal([]byte(out), &rows); err != nil {
			t.Fatal(err)
		}
		return joinNBD(rows)
	}, stop
}

// compareDepth compares extents with what qemu-nbd serves.
func compareDepth(t *testing.T, d image.Device, file string) {
	t.Helper()
	served, stop := servedByQEMU(t, file, "-A")
	defer stop()
	var depth, allocation []nbdRow
	for e, err := range image.Extents(d, 0, d.Info().Size, image.WantZero|image.WantAllocated) {
		if err != nil {
			t.Fatal(err)
		}
		r := nbdRow{Offset: e.Offset, Length: e.Length}
		if e.Allocated {
			r.Type = e.Depth + 1
		}
		depth = append(depth, r)
		r.Type = 0
		if !e.Data {
			r.Type |= 1
		}
		if e.Zero {
			r.Type |= 2
		}
		allocation = append(allocation, r)
	}
	if diff := cmp.Diff(served("qemu:allocation-depth"), joinNBD(depth)); diff != "" {
		t.Errorf("depth (- qemu-nbd, + ours):\n%s", diff)
	}
	if diff := cmp.Diff(served("base:allocation"), joinNBD(allocation)); diff != "" {
		t.Errorf("allocation (- qemu-nbd, + ours):\n%s", diff)
	}
}

type nbdRow struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

func joinNBD(rows []nbdRow) (out []nbdRow) {
	for _, r := range rows {
		if k := len(out) - 1; k >= 0 && out[k].Type == r.Type {
			out[k].Length += r.Length
			continue
		}
		out = append(out, r)
	}
	return out
}

func TestSnapshots(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := withSnapshots(t)
	im := openFile(t, file)
	list := im.Snapshots()
	if len(list) != 2 || list[0].Name != "first" || list[0].Size != 6<<20 || list[1].ID != "2" || list[1].Size != 8<<20 {
		t.Fatalf("got %+v", list)
	}
	for _, sel := range []image.SnapshotSelector{{Any: "1"}, {Any: "first"}, {ID: "1", Name: "first"}, {Name: "second"}, {ID: "2"}} {
		d, err := im.OpenSnapshot(sel)
		if err != nil {
			t.Fatal(err)
		}
		name := sel.Name
		if name == "" {
			name = sel.Any + sel.ID
		}
		// qemu-img gives a snapshot the size that the disk has now.
		compareBytes(t, grown{d, 8 << 20}, file, "qcow2", "-l", name)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, sel := range []image.SnapshotSelector{{Any: "3"}, {ID: "1", Name: "second"}, {Name: "1"}} {
		if _, err := im.OpenSnapshot(sel); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%+v: %v", sel, err)
		}
	}
	// The image is closed when both are.
	d, err := im.OpenSnapshot(image.SnapshotSelector{Any: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("reading a snapshot of a closed image: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := im.OpenSnapshot(image.SnapshotSelector{Any: "1"}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("opening a snapshot of a closed image: %v", err)
	}
}

// grown is a device with zeros behind it.
type grown struct {
	image.Device
	size int64
}

func (g grown) Info() image.Info {
	i := g.Device.Info()
	i.Size = g.size
	return i
}

func (g grown) ReadAt(p []byte, off int64) (int, error) {
	n := max(0, min(int64(len(p)), g.Device.Info().Size-off))
	clear(p[n:])
	if n == 0 {
		return len(p), nil
	}
	_, err := g.Device.ReadAt(p[:n], off)
	return len(p), err
}

func (g grown) TryReadAt(p []byte, off int64) error {
	_, err := g.ReadAt(p, off)
	return err
}

func TestBitmaps(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	file := withBitmaps(t)
	over := filepath.Join(t.TempDir(), "over")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", file, "-F", "qcow2", over)
	im := openFile(t, over)
	if len(im.Bitmaps()) != 0 {
		t.Errorf("bitmaps of the overlay: %+v", im.Bitmaps())
	}
	base := openFile(t, file)
	want := []image.BitmapInfo{{Name: "fine", Granularity: 512, Enabled: true}, {Name: "coarse", Granularity: 65536, Enabled: true}, {Name: "off", Granularity: 65536}}
	if diff := cmp.Diff(want, base.Bitmaps()); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"fine", "coarse", "off"} {
		b, err := im.Bitmap(name)
		if err != nil {
			t.Fatal(err)
		}
		rows := bitmapByQEMU(t, over, name)
		for _, step := range []int64{64 << 20, 100 << 10, 777} {
			var got []nbdRow
			size := im.Info().Size
			for off := int64(0); off < size; {
				x, err := b.AppendDirty(nil, off, min(step, size-off))
				if err != nil || len(x) == 0 || x[0].Offset != off {
					t.Fatalf("%v, %v", x, err)
				}
				for _, e := range x {
					r := nbdRow{Offset: e.Offset, Length: e.Length}
					if e.Dirty {
						r.Type = 1
					}
					got = append(got, r)
					off += e.Length
				}
			}
			if diff := cmp.Diff(rows, joinNBD(got)); diff != "" {
				t.Errorf("%s in steps of %d (- qemu-nbd, + ours):\n%s", name, step, diff)
			}
		}
	}
	if _, err := im.Bitmap("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// A bitmap is found in a backing image of any size: what that image does not
// have is not dirty.
func TestBitmapsBelow(t *testing.T) {
	base := qemu.Create(t, "qcow2", "", "4M")
	qemu.Img(t, "bitmap", "--add", "-g", "64k", base, "recorded")
	qemu.IO(t, "qcow2", base, "write 1M 64k", "write 3M 1M")
	for size, want := range map[int64][]nbdRow{
		2 << 20: {{0, 1 << 20, 0}, {1 << 20, 64 << 10, 1}, {1<<20 + 64<<10, 1<<20 - 64<<10, 0}},
		8 << 20: {{0, 1 << 20, 0}, {1 << 20, 64 << 10, 1}, {1<<20 + 64<<10, 2<<20 - 64<<10, 0}, {3 << 20, 1 << 20, 1}, {4 << 20, 4 << 20, 0}},
	} {
		over := filepath.Join(t.TempDir(), "over")
		qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over, fmt.Sprint(size))
		sameRows(t, fmt.Sprintf("qemu-nbd, %d bytes", size), bitmapByQEMU(t, over, "recorded"), want)
		sameRows(t, fmt.Sprintf("%d bytes", size), bitmapByUs(t, openFile(t, over), "recorded"), want)
	}
}

func TestBitmapsInconsistent(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := withBitmaps(t)
	edit(t, file, func(e *editor) {
		x, err := e.h.bitmapsExtension()
		if err != nil {
			t.Fatal(err)
		}
		e.b[x.offset+15] |= bitmapInUse
	})
	im := openFile(t, file)
	if !im.Bitmaps()[0].Inconsistent || im.Bitmaps()[1].Inconsistent {
		t.Errorf("got %+v", im.Bitmaps())
	}
	if _, err := im.Bitmap("fine"); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	compareInspection(t, file)

	edit(t, file, func(e *editor) {
		h := *e.h
		h.autoclear = 0
		copy(e.b, h.encodeFixed())
	})
	compareInspection(t, file)
	var warned []string
	d, err := Open(context.Background(), openStore(t, file), image.Options{ReadOnly: true, Warn: func(s string) { warned = append(warned, s) }})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if len(warned) != 1 || !strings.Contains(warned[0], "all bitmaps are now considered inconsistent") {
		t.Errorf("warned: %q", warned)
	}
	if _, err := d.Bitmap("coarse"); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

func TestConformance(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	target := func(make func(t testing.TB) string, open func(d image.Device) (image.Device, error)) imagetest.Target {
		return imagetest.Target{New: func(t testing.TB) imagetest.Disk {
			file := make(t)
			flat := filepath.Join(t.TempDir(), "flat")
			qemu.Img(t, "convert", "-f", "qcow2", "-O", "raw", file, flat)
			want, err := os.ReadFile(flat)
			if err != nil {
				t.Fatal(err)
			}
			return imagetest.Disk{Content: want, Open: func() (image.Device, error) {
				d, err := chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2", ReadOnly: true})
				if err != nil || open == nil {
					return d, err
				}
				return open(d)
			}}
		}}
	}
	small := []string{"write -P 0x11 0 64k", "write -P 0x22 100k 100k", "write -z 300k 200k", "write -P 0x33 700k 5k"}
	for _, r := range []recipe{
		{name: "plain", size: "1M", io: small},
		{name: "subclusters", options: "extended_l2=on", size: "1M", io: small},
		{name: "cluster 512", options: "cluster_size=512", size: "1M", io: small},
		{name: "zstd", size: "4M", io: writes[:4], compress: "compression_type=zstd"},
		{name: "data file", options: "data_file=DIR/data", size: "1M", io: small},
	} {
		t.Run(r.name, func(t *testing.T) { imagetest.Run(t, target(r.make, nil)) })
	}
	t.Run("chain", func(t *testing.T) {
		imagetest.Run(t, target(func(t testing.TB) string { return makeChain(t, chains[3].layers) }, nil))
	})
	t.Run("snapshot", func(t *testing.T) {
		imagetest.Run(t, target(func(t testing.TB) string {
			r := recipe{size: "1M", io: small}
			file := r.make(t)
			qemu.Img(t, "snapshot", "-c", "s", file)
			return file
		}, func(d image.Device) (image.Device, error) {
			s, err := d.(*Image).OpenSnapshot(image.SnapshotSelector{Any: "s"})
			return s, errors.Join(err, d.Close())
		}))
	})
}
