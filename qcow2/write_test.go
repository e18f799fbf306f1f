package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/image/imagetest"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A writeRecipe makes an image to be written to. options are of qemu-img
// create; FILE in the arguments that follow is the image.
type writeRecipe struct {
	name    string
	options string
	size    int64
	backing bool
	io      []string
	after   [][]string
}

const writeSize = 1<<20 + 512*3

var writeRecipes = []writeRecipe{
	{name: "default"},
	{name: "v2", options: "compat=0.10,cluster_size=4k"},
	{name: "v2 backing", options: "compat=0.10,cluster_size=4k", backing: true},
	{name: "512", options: "cluster_size=512,refcount_bits=64"},
	{name: "512 backing", options: "cluster_size=512,refcount_bits=1", backing: true},
	{name: "4k", options: "cluster_size=4k,refcount_bits=2"},
	{name: "4k backing", options: "cluster_size=4k,refcount_bits=8", backing: true},
	{name: "64k backing", options: "refcount_bits=32", backing: true},
	{name: "2M", options: "cluster_size=2M,refcount_bits=4"},
	{name: "lazy", options: "cluster_size=4k,lazy_refcounts=on"},
	{name: "metadata", options: "cluster_size=4k,preallocation=metadata"},
	{name: "falloc", options: "preallocation=falloc"},
	{name: "subclusters", options: "extended_l2=on,cluster_size=16k"},
	{name: "subclusters backing", options: "extended_l2=on,cluster_size=64k", backing: true},
	{name: "subclusters snapshots", options: "extended_l2=on,cluster_size=16k", backing: true, io: []string{"write -P 1 0 300k", "write -z 100k 50k", "write -P 2 401k 1k"}, after: [][]string{{"snapshot", "-c", "one", "FILE"}}},
	{name: "subclusters compressed", options: "extended_l2=on,cluster_size=16k", io: []string{"write -c -P 1 0 128k", "write -c -P 2 208k 16k", "write -P 3 256k 64k"}},
	{name: "data file", options: "cluster_size=4k,data_file=DIR/data"},
	{name: "data file backing", options: "cluster_size=4k,data_file=DIR/data", backing: true},
	{name: "raw data file", options: "cluster_size=4k,data_file=DIR/data,data_file_raw=on"},
	{name: "subclusters data file", options: "extended_l2=on,cluster_size=16k,data_file=DIR/data", backing: true},
	{name: "snapshots", options: "cluster_size=4k", io: []string{"write -P 1 0 300k", "write -z 100k 50k"}, after: [][]string{{"snapshot", "-c", "one", "FILE"}}},
	{name: "snapshots 512", options: "cluster_size=512,refcount_bits=2", io: []string{"write -P 1 0 300k", "write -z 100k 50k"},
		after: [][]string{{"snapshot", "-c", "one", "FILE"}, {"snapshot", "-c", "two", "FILE"}}},
	{name: "compressed", options: "cluster_size=4k", io: []string{"write -c -P 1 0 128k", "write -c -P 2 200k 12k", "write -P 3 256k 64k"}},
	{name: "compressed 64k", io: []string{"write -c -P 1 0 128k", "write -c -P 2 256k 64k", "write -P 3 512k 64k"}},
}

// make creates the image and returns the path and what it holds.
func (r *writeRecipe) make(t testing.TB) (file string, content []byte) {
	t.Helper()
	size := r.size
	if size == 0 {
		size = writeSize
	}
	dir := t.TempDir()
	file = filepath.Join(dir, "disk.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	if r.options != "" {
		args = append(args, "-o", strings.ReplaceAll(r.options, "DIR", dir))
	}
	if r.backing {
		b := make([]byte, size/2+1536)
		for i := range b {
			b[i] = byte(i>>9) | 1
		}
		if err := os.WriteFile(filepath.Join(dir, "back"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-b", "back", "-F", "raw")
	}
	qemu.Img(t, append(args, file, fmt.Sprint(size))...)
	if len(r.io) > 0 {
		qemu.IO(t, "qcow2", file, r.io...)
	}
	for _, a := range r.after {
		a = append([]string(nil), a...)
		for i := range a {
			if a[i] == "FILE" {
				a[i] = file
			}
		}
		qemu.Img(t, a...)
	}
	raw := filepath.Join(dir, "content")
	qemu.Img(t, "convert", "-f", "qcow2", "-O", "raw", file, raw)
	content, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return file, content
}

func openToWrite(file string) (image.Device, error) {
	return chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2", Unmap: true})
}

func (r *writeRecipe) target() imagetest.Target {
	return imagetest.Target{New: func(t testing.TB) imagetest.Disk {
		file, content := r.make(t)
		return imagetest.Disk{
			Open:    func() (image.Device, error) { return openToWrite(file) },
			Content: content,
			Judge:   func(want []byte) error { return judgeFile(file, want) },
		}
	}}
}

// judgeFile asks qemu-img whether an image is sound, without leaks, and reads
// as want.
func judgeFile(file string, want []byte) error {
	if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", file).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	raw := file + ".want"
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		return err
	}
	if out, err := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, raw).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img compare: %w\n%s", err, out)
	}
	return nil
}

func TestWriteContract(t *testing.T) {
	for i := range writeRecipes {
		switch writeRecipes[i].name {
		case "default", "512 backing", "snapshots", "subclusters backing":
		default:
			continue
		}
		t.Run(writeRecipes[i].name, func(t *testing.T) { imagetest.Run(t, writeRecipes[i].target()) })
	}
}

func TestWriteRandom(t *testing.T) {
	for i, r := range writeRecipes {
		t.Run(r.name, func(t *testing.T) {
			imagetest.Random(t, r.target(), uint64(i), imagetest.RandomOptions{Steps: 60, Cluster: 4096})
		})
	}
}

// With FastOnly zeros are never written: version 2 knows zeros only as holes
// without a backing image, which NO_HOLE forbids. What is zeros already is fast.
func TestFastZeroesOfVersions(t *testing.T) {
	const half = 4 << 20
	ones := bytes.Repeat([]byte{1}, half)
	for _, tt := range []struct {
		compat         string
		backing, unmap bool
		fast           bool
	}{
		{"0.10", false, true, true},
		{"0.10", false, false, false},
		{"0.10", true, true, false},
		{"0.10", true, false, false},
		{"1.1", false, true, true},
		{"1.1", false, false, true},
		{"1.1", true, true, true},
		{"1.1", true, false, true},
	} {
		t.Run(fmt.Sprintf("%s backing %v unmap %v", tt.compat, tt.backing, tt.unmap), func(t *testing.T) {
			b, err := os.ReadFile(qemu.Create(t, "qcow2", "compat="+tt.compat, fmt.Sprint(2*half)))
			if err != nil {
				t.Fatal(err)
			}
			var refs image.Opener
			if tt.backing {
				h, err := parseHeader(b)
				if err != nil {
					t.Fatal(err)
				}
				h.backing = "below"
				head, err := h.encode()
				if err != nil {
					t.Fatal(err)
				}
				copy(b, head)
				x := build(16, half)
				for off := int64(0); off < half; off += x.cs {
					x.data(off, 2)
				}
				refs = backedBy{x.open(t)}
			}
			var written int64
			store := storagetest.Fault(storagetest.MemOf(b), func(op storagetest.Op) *storagetest.Failure {
				if op.Kind == storagetest.OpWrite {
					written += op.Length
				}
				return nil
			})
			im, err := Open(context.Background(), store, image.Options{Refs: refs})
			if err != nil {
				t.Fatal(err)
			}
			defer im.Close()
			if err := im.WriteAt(ones, 0, 0); err != nil {
				t.Fatal(err)
			}
			flags := image.FastOnly
			if tt.unmap {
				flags |= image.MayUnmap
			}
			written = 0
			want := make([]byte, half)
			err = im.WriteZeroes(0, half, flags)
			if !tt.fast {
				copy(want, ones)
				if !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("data: %v", err)
				}
			} else if err != nil {
				t.Errorf("data: %v", err)
			}
			if err := im.WriteZeroes(half, half, flags); err != nil {
				t.Errorf("zeros: %v", err)
			}
			if written > half/4 {
				t.Errorf("%d bytes were written", written)
			}
			got := make([]byte, half)
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("it reads %#x, %v", got[0], err)
			}
		})
	}
}

// An image that is marked as corrupt is refused when it is opened.
func TestWriteRefused(t *testing.T) {
	x := build(16, 1<<20)
	x.h.incompatible |= incompatCorrupt
	store := storagetest.MemOf(x.bytes())
	before := store.Bytes()
	const want = "Image is corrupt; cannot be opened read/write"
	if _, err := Open(context.Background(), store, image.Options{}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	if !bytes.Equal(store.Bytes(), before) {
		t.Error("the image was changed")
	}
}

// Two tables in one cluster: writing one would destroy the other.
func TestWriteRefusesOverlap(t *testing.T) {
	x := build(16, 1<<40)
	x.l2(0)
	x.put(int64(x.h.l1Offset)+8, binary.BigEndian.Uint64(x.b[x.h.l1Offset:]))
	_, err := Open(context.Background(), storagetest.MemOf(x.bytes()), image.Options{})
	if !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

// QEMU died with lazy refcounts: counts are missing, and rebuilt before the
// first write.
func TestRebuild(t *testing.T) {
	for _, options := range []string{
		"lazy_refcounts=on,cluster_size=512,refcount_bits=64", "lazy_refcounts=on,cluster_size=4k", "lazy_refcounts=on,extended_l2=on",
	} {
		t.Run(options, func(t *testing.T) {
			file := qemu.Create(t, "qcow2", options, "2M")
			qemu.IO(t, "qcow2", file, "write -P 5 1600k 64k")
			out, _ := exec.Command(qemu.Require(t, "qemu-io"), "-f", "qcow2",
				"-c", "write -P 1 0 300k", "-c", "write -z 100k 64k", "-c", "write -P 2 1M 200k", "-c", "flush", "-c", "abort", file).CombinedOutput()
			h, err := headerOf(file)
			if err != nil || h.incompatible&incompatDirty == 0 {
				t.Fatalf("the image is not dirty: %v\n%s", err, out)
			}
			want := make([]byte, 2<<20)
			fill := func(b byte, off, n int) { copy(want[off:off+n], bytes.Repeat([]byte{b}, n)) }
			fill(5, 1600<<10, 64<<10)
			fill(1, 0, 300<<10)
			fill(0, 100<<10, 64<<10)
			fill(2, 1<<20, 200<<10)
			d, err := openToWrite(file)
			if err != nil {
				t.Fatal(err)
			}
			fill(7, 250<<10, 512<<10)
			if err := d.WriteAt(want[250<<10:762<<10], 250<<10, 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := judgeFile(file, want); err != nil {
				t.Error(err)
			}
			if h, err := headerOf(file); err != nil || h.incompatible&incompatDirty != 0 {
				t.Errorf("the image is still dirty: %v", err)
			}
		})
	}
}

// Opening for writing clears autoclear bits that are not known, and changes
// nothing else of a header, whatever it has.
func TestWriteKeepsHeader(t *testing.T) {
	x := build(16, 1<<20)
	x.h.autoclear = 1<<5 | 1<<40
	x.h.compatible = 1 << 9
	x.h.setExtension(0x12345678, []byte("of somebody else"))
	mem := storagetest.MemOf(x.bytes())
	im := openMem(t, mem)
	if err := im.WriteAt([]byte{1}, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := parseHeader(mem.Bytes()[:65536])
	if err != nil {
		t.Fatal(err)
	}
	if got.autoclear != 0 || got.compatible != 1<<9 || string(got.extension(0x12345678)) != "of somebody else" {
		t.Errorf("autoclear %#x, compatible %#x, extension %q", got.autoclear, got.compatible, got.extension(0x12345678))
	}
}

func headerOf(file string) (*header, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseHeader(b[:min(len(b), 65536)])
}

// An entry that points to a table is not followed, neither to write there nor
// to free it, and the image is marked.
func TestWriteGuardsTables(t *testing.T) {
	for _, target := range []string{"L1 table", "refcount block", "L2 table"} {
		for _, op := range []string{"write", "discard"} {
			t.Run(op+" "+target, func(t *testing.T) {
				s := memImage(t, "cluster_size=4k", "1M", 0)
				im := openMem(t, s)
				if err := im.WriteAt(make([]byte, 8192), 0, 0); err != nil {
					t.Fatal(err)
				}
				table := im.writer.changes.tableHost(0)
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				h, err := parseHeader(s.Bytes()[:4096])
				if err != nil {
					t.Fatal(err)
				}
				b := s.Bytes()
				host := map[string]uint64{
					"refcount block": binary.BigEndian.Uint64(b[h.refTableOffset:]), "L2 table": uint64(table),
				}[target]
				if target == "L1 table" {
					host = h.l1Offset
				}
				binary.BigEndian.PutUint64(b[table:], host|flagCopied)
				mem := storagetest.MemOf(b)
				if im, err = Open(context.Background(), mem, image.Options{}); err != nil {
					t.Fatal(err)
				}
				if op == "write" {
					err = im.WriteAt(make([]byte, 512), 0, 0)
				} else {
					err = im.Discard(0, 4096)
				}
				if !errors.Is(err, image.ErrCorrupt) {
					t.Errorf("got %v", err)
				}
				if err := im.Flush(); err == nil {
					t.Error("flushed")
				}
				_ = im.Close()
				if h, err := parseHeader(mem.Bytes()[:4096]); err != nil || h.incompatible&incompatCorrupt == 0 {
					t.Errorf("the image is not marked as corrupt: %v", err)
				}
			})
		}
	}
}
