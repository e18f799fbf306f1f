package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// createParamsOf splits key=value,key=value.
func createParamsOf(options string) []image.Param {
	var params []image.Param
	for o := range strings.SplitSeq(options, ",") {
		if k, v, ok := strings.Cut(o, "="); ok {
			params = append(params, image.Param{Key: k, Value: v})
		}
	}
	return params
}

// described is what qemu-img says of an image, less what depends on the layout.
// With coarse nothing is said of zeros, which the file system tells by blocks
// and, of those that were never written, by what is in its cache; QEMU asks it
// if it guesses from the disk usage of the image that much is preallocated.
func described(t testing.TB, file string, coarse bool) (info map[string]any, disk []image.Extent) {
	t.Helper()
	if err := json.Unmarshal([]byte(qemu.Img(t, "info", "--output=json", file)), &info); err != nil {
		t.Fatal(err)
	}
	delete(info, "actual-size")
	var extents []struct {
		Start, Length       int64
		Depth               int
		Present, Zero, Data bool
	}
	if err := json.Unmarshal([]byte(qemu.Img(t, "map", "--output=json", file)), &extents); err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		x := image.Extent{Offset: e.Start, Length: e.Length, Depth: e.Depth, Allocated: e.Present, Zero: e.Zero && !coarse, Data: e.Data}
		if n := len(disk) - 1; n >= 0 {
			last := disk[n]
			last.Offset, last.Length = x.Offset, x.Length
			if last == x { // they only lie apart
				disk[n].Length += x.Length
				continue
			}
		}
		disk = append(disk, x)
	}
	return info, disk
}

// An image of ours is to qemu-img what its own is, with whatever options.
func TestCreateSameAsQEMUImg(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	var all []string
	for _, compat := range []string{"compat=v2", "compat=1.1"} {
		for _, cluster := range []string{"512", "4k", "64k", "2M"} {
			for _, prealloc := range []string{"off", "metadata", "falloc", "full"} {
				all = append(all, compat+",cluster_size="+cluster+",preallocation="+prealloc)
			}
		}
	}
	for _, bits := range []string{"1", "2", "4", "8", "32", "64"} {
		all = append(all, "cluster_size=512,preallocation=metadata,refcount_bits="+bits, "refcount_bits="+bits)
	}
	for _, prealloc := range []string{"off", "metadata", "falloc", "full"} {
		all = append(all, "extended_l2=on,preallocation="+prealloc, "extended_l2=on,cluster_size=16k,backing_file=base,backing_fmt=raw,preallocation="+prealloc)
	}
	all = append(all, "", "lazy_refcounts=on,compression_type=zstd", "backing_file=base,backing_fmt=raw", "compat=0.10,backing_file=base,backing_fmt=raw",
		"cluster_size=512,backing_file=base,backing_fmt=raw", "data_file=data", "data_file=data,data_file_raw=on",
		"data_file=data,extended_l2=on,cluster_size=32k", "data_file=data,backing_file=base,backing_fmt=raw", "data_file=data,preallocation=metadata")
	for i, options := range all {
		for _, size := range [][]int64{{3 << 20}, {3<<20 + 1000, 3 << 20}, {3 << 20, 0}}[i%3] {
			t.Run(fmt.Sprintf("%s/%d", options, size), func(t *testing.T) {
				t.Parallel()
				createBeside(t, options, size)
			})
		}
	}
}

func createBeside(t *testing.T, options string, size int64) {
	dir, err := os.MkdirTemp("", "create") // that of the test has a comma in its name
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, bytes.Repeat([]byte{0xba}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "disk.qcow2")
	args := []string{"create", "-q", "-f", "qcow2", "-u"}
	if options != "" {
		args = append(args, "-o", strings.ReplaceAll(options, "data_file=data", "data_file="+filepath.Join(dir, "data")))
	}
	qemu.Img(t, append(args, file, fmt.Sprint(size))...)
	coarse := size%4096 != 0
	for _, o := range []string{"cluster_size=512", "falloc", "data_file"} {
		coarse = coarse || strings.Contains(options, o)
	}
	wantInfo, wantMap := described(t, file, coarse)
	// Over what is there: nothing of it may remain.
	qemu.IO(t, "qcow2", file, "write -P 0xee 0 "+fmt.Sprint(min(size, 1<<20)))
	err = chain().Create(t.Context(), file, "qcow2", image.CreateOptions{Size: size,
		Params: createParamsOf(strings.ReplaceAll(options, "data_file=data", "data_file="+filepath.Join(dir, "data")))})
	if err != nil {
		t.Fatal(err)
	}
	gotInfo, gotMap := described(t, file, coarse)
	if diff := cmp.Diff(wantInfo, gotInfo); diff != "" {
		t.Errorf("info, - qemu-img, + ours:\n%s", diff)
	}
	if diff := cmp.Diff(wantMap, gotMap); diff != "" {
		t.Errorf("map, - qemu-img, + ours:\n%s", diff)
	}
	qemu.Check(t, file)
	if v := compareVerdicts(t, file); v.Corruptions+v.Leaks+v.Errors > 0 || len(v.Findings) > 0 {
		t.Errorf("check: %+v", v)
	}
	if size == 0 {
		return
	}
	before := "read -P 0 1M 1M"
	if !strings.Contains(options, "backing_file") {
		before = "read -P 0 0 3M"
	}
	qemu.IO(t, "qcow2", file, before, "write -P 0x5a 100000 1M", "read -P 0x5a 100000 1M", "write -z 2M 64k", "read -P 0 2M 512k", "discard 0 64k", "read -P 0x5a 200000 4k")
	if strings.Contains(options, "backing_file") {
		qemu.IO(t, "qcow2", file, "read -P 0xba 70000 30000")
	}
	qemu.Check(t, file)
}

// A table of any size goes through one buffer.
func TestCreateMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	// Its L2 tables are 64 MiB, on the disk.
	err := chain().Create(t.Context(), file, "qcow2", image.CreateOptions{Size: 512 << 30, Params: createParamsOf("preallocation=metadata")})
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("%d MiB of memory", n>>20)
	}
	im := openFile(t, file)
	var b [512]byte
	if _, err := im.ReadAt(b[:], 500<<30); err != nil || b != [512]byte{} {
		t.Errorf("%v, %x", err, b[:8])
	}
}

// device returns a device that was used for something else.
func device(size int64) *storagetest.Mem {
	m := storagetest.NewMem(size, storagetest.FixedSize)
	if err := m.WriteAt(bytes.Repeat([]byte{0xe5}, int(size)), 0, 0); err != nil {
		panic(err)
	}
	return m
}

// What a device held before is neither metadata nor data of the image.
func TestCreateOnDevice(t *testing.T) {
	qemu.Require(t, "qemu-img")
	for _, options := range []string{"", "preallocation=metadata", "preallocation=falloc", "preallocation=full", "cluster_size=512,refcount_bits=1", "cluster_size=2M"} {
		m := device(24 << 20)
		if err := create(t.Context(), m, image.CreateOptions{Size: 5 << 20, Params: createParamsOf(options)}); err != nil {
			t.Fatalf("%q: %v", options, err)
		}
		file := filepath.Join(t.TempDir(), "disk.qcow2")
		if err := os.WriteFile(file, m.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		qemu.Check(t, file)
		im := openFile(t, file)
		p := make([]byte, 5<<20)
		if _, err := im.ReadAt(p, 0); err != nil || !bytes.Equal(p, make([]byte, 5<<20)) {
			t.Errorf("%q: the disk is not zero, %v", options, err)
		}
	}
	// One that is too small is left alone, and so is the data file.
	m, data := device(1<<20), device(6<<20)
	was, wasData := m.Bytes(), data.Bytes()
	for _, options := range []string{"preallocation=metadata", "cluster_size=2M,data_file=data,preallocation=full"} {
		err := create(t.Context(), m, image.CreateOptions{Size: 5 << 20, Params: createParamsOf(options), NewStore: func(context.Context, string) (storage.Store, error) {
			return data, nil
		}})
		if !storage.NoSpace(err) || !bytes.Equal(m.Bytes(), was) || !bytes.Equal(data.Bytes(), wasData) {
			t.Errorf("%v; changed: %t, data file: %t", err, !bytes.Equal(m.Bytes(), was), !bytes.Equal(data.Bytes(), wasData))
		}
	}
}

// oldImage returns an image whose disk is all 0xee.
func oldImage(t testing.TB) []byte {
	t.Helper()
	file := qemu.Create(t, "qcow2", "cluster_size=4k", "256k")
	qemu.IO(t, "qcow2", file, "write -P 0xee 0 256k")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// state says what the bytes of a store are: "old", "new", or "none" if they
// are no image.
func state(t testing.TB, b, old []byte) string {
	t.Helper()
	if bytes.Equal(b, old) {
		return "old"
	}
	h, err := readHeader(storagetest.MemOf(b))
	if errors.Is(err, image.ErrWrongFormat) {
		return "none"
	}
	if err != nil || h.check(forWriting) != nil {
		return fmt.Sprintf("broken: %v", err)
	}
	im, err := Open(context.Background(), storagetest.MemOf(b), image.Options{ReadOnly: true})
	if err != nil {
		return fmt.Sprintf("broken: %v", err)
	}
	defer im.Close()
	res, err := im.Check(context.Background(), image.CheckOptions{})
	if err != nil || res.Corruptions+res.Leaks+res.CheckErrors > 0 {
		return fmt.Sprintf("broken: %+v, %v", res, err)
	}
	p := make([]byte, im.Info().Size)
	if _, err := im.ReadAt(p, 0); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
		return fmt.Sprintf("broken: the disk is not zero, %v", err)
	}
	if len(p) == 256<<10 {
		return "a mixture"
	}
	return "new"
}

var createSamples = []string{
	"", "cluster_size=512,preallocation=metadata,refcount_bits=1", "preallocation=full",
	"cluster_size=4k,extended_l2=off,compat=v2,preallocation=falloc",
}

// Whatever fails, there is an error, and what is left is not taken for an image.
func TestCreateFaults(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	old := oldImage(t)
	for _, options := range createSamples {
		for _, failure := range []storagetest.Failure{{Err: syscall.EIO}, {Err: syscall.ENOSPC, Done: 600}, {Err: syscall.EIO, Done: 1 << 30}} {
			for k := 1; ; k++ {
				m := storagetest.MemOf(bytes.Clone(old))
				f := storagetest.Fault(m, storagetest.Nth(storagetest.OpChange|storagetest.OpSync|storagetest.OpSize, k, failure))
				err := create(t.Context(), f, image.CreateOptions{Size: 100 << 10, Params: createParamsOf(options)})
				if len(f.Injected()) == 0 {
					if err != nil || state(t, m.Bytes(), old) != "new" {
						t.Fatalf("%q without a fault: %v", options, err)
					}
					break
				}
				got := state(t, m.Bytes(), old)
				// The last write may have come through all the same.
				if !errors.Is(err, failure.Err) || got != "old" && got != "none" && got != "new" {
					t.Errorf("%q, %s: %v, and the store holds %s", options, f.Injected(), err, got)
				}
			}
		}
	}
}

// A power cut leaves the old image, none, or all of the new one.
func TestCreatePowerCut(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	old := oldImage(t)
	r := rand.New(rand.NewPCG(1, 2))
	for _, options := range createSamples {
		for _, fixed := range []bool{false, true} {
			var l storagetest.Log
			old := old
			if fixed {
				old = append(bytes.Clone(old), bytes.Repeat([]byte{0xe5}, 1<<20)...)
			}
			s := l.NewStore(old, storage.Info{NewReadsZero: !fixed, FixedSize: fixed})
			if err := create(t.Context(), s, image.CreateOptions{Size: 100 << 10, Params: createParamsOf(options)}); err != nil {
				t.Fatal(err)
			}
			d := l.NewDisk(r)
			events := l.Events()
			seen := map[string]int{}
			for i := range len(events) + 1 {
				if i > 0 {
					d.Step(events[i-1])
				}
				for range 20 {
					got := state(t, d.Crash()[0], old)
					seen[got]++
					if got != "old" && got != "none" && got != "new" || i == len(events) && got != "new" {
						// Erasing the old image may tear it, but not so that it reads as another.
						if _, err := readHeader(storagetest.MemOf(d.Crash()[0])); err == nil && !erasing(events[:i]) {
							t.Fatalf("%q, fixed %t, after event %d of %d: %s", options, fixed, i, len(events), got)
						}
					}
				}
			}
			if seen["none"] == 0 || seen["new"] == 0 {
				t.Errorf("%q: %v", options, seen)
			}
		}
	}
}

// erasing reports whether the first sync, which ends the old image, has not
// yet come back.
func erasing(events []storagetest.Event) bool {
	for _, e := range events {
		if e.Kind == storagetest.EventSyncEnd {
			return false
		}
	}
	return true
}

// What does not go together is refused before anything is touched.
func TestCreateRefuses(t *testing.T) {
	m := storagetest.MemOf([]byte("what was there"))
	for _, options := range []string{
		"cluster_size=1000", "cluster_size=x", "refcount_bits=3", "compat=4", "compat=v2,lazy_refcounts=on", "extended_l2=on,cluster_size=8k",
		"preallocation=some", "backing_fmt=raw", "data_file_raw=on", "compression_type=lz4", "foo=1", "lazy_refcounts=maybe",
		"backing_file=x,preallocation=metadata", "backing_file=" + strings.Repeat("x", 1024), "cluster_size=512,backing_file=" + strings.Repeat("x", 500),
		"data_file=" + strings.Repeat("x", 1024), "data_file=nobody-makes-it",
	} {
		if err := create(t.Context(), m, image.CreateOptions{Size: 1 << 20, Params: createParamsOf(options)}); err == nil {
			t.Errorf("%.50q is accepted", options)
		}
	}
	for _, size := range []int64{-1, 1 << 62, 1<<63 - 1, 1<<63 - 512} {
		if err := create(t.Context(), m, image.CreateOptions{Size: size}); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if err := create(t.Context(), m, image.CreateOptions{Size: 1 << 60, Params: createParamsOf("cluster_size=2M,preallocation=metadata")}); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("preallocated beyond what entries have room for: %v", err)
	}
	if string(m.Bytes()) != "what was there" {
		t.Error("the store was touched")
	}
}

// A data file has the size of the disk, and with preallocation the space of it.
func TestCreateDataFile(t *testing.T) {
	for prealloc, want := range map[string]int64{"off": 0, "metadata": 0, "falloc": 1 << 20, "full": 1 << 20} {
		dir := t.TempDir()
		data := filepath.Join(dir, "data")
		if err := os.WriteFile(data, bytes.Repeat([]byte{0xee}, 2<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "disk.qcow2")
		err := chain().Create(t.Context(), file, "qcow2", image.CreateOptions{Size: 1 << 20, Params: createParamsOf("data_file=data,preallocation=" + prealloc)})
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(data)
		if err != nil || !bytes.Equal(b, make([]byte, 1<<20)) {
			t.Errorf("%s: %d bytes, %v", prealloc, len(b), err)
		}
		in, err := chain().Inspect(t.Context(), data, image.OpenOptions{Format: "raw", ReadOnly: true})
		if err != nil || in.DiskSize != want {
			t.Errorf("%s: %d bytes on the disk, want %d, %v", prealloc, in.DiskSize, want, err)
		}
	}
}
