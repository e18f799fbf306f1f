package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// memImage makes an image in memory, in a store of a fixed size if that is
// given. Check writes it out for qemu-img.
func memImage(t testing.TB, options, size string, device int64) *storagetest.Recorder {
	t.Helper()
	b, err := os.ReadFile(qemu.Create(t, "qcow2", options, size))
	if err != nil {
		t.Fatal(err)
	}
	if device > 0 {
		b = append(b, bytes.Repeat([]byte{0xe5}, int(device)-len(b))...)
	}
	var l storagetest.Log
	return l.NewStore(b, storage.Info{NewReadsZero: device == 0, FixedSize: device > 0})
}

func writeOut(t testing.TB, s *storagetest.Recorder) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := os.WriteFile(file, s.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func openMem(t testing.TB, s storage.Store) *Image {
	t.Helper()
	im, err := Open(context.Background(), s, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// Counts of 64 bits and clusters of 512 bytes: a block covers 32 KiB, and a
// cluster of the refcount table 2 MiB.
func TestRefcountTableGrows(t *testing.T) {
	s := memImage(t, "cluster_size=512,refcount_bits=64", "12M", 0)
	im := openMem(t, s)
	p := make([]byte, 64<<10)
	for off := int64(0); off < 12<<20; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(off>>16) + 1
		}
		if err := im.WriteAt(p, off, 0); err != nil {
			t.Fatal(err)
		}
		if off%(1<<20) == 0 {
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	h, err := parseHeader(s.Bytes()[:512])
	if err != nil || h.refTableClusters < 8 {
		t.Errorf("refcount table of %d clusters, %v", h.refTableClusters, err)
	}
	want := make([]byte, 12<<20)
	for i := range want {
		want[i] = byte(i>>16) + 1
	}
	if err := judgeFile(writeOut(t, s), want); err != nil {
		t.Error(err)
	}
}

// A device that is full says so to the write, leaves a clean image, and can be
// written again once something was discarded.
func TestDeviceFull(t *testing.T) {
	s := memImage(t, "cluster_size=4k", "1M", 512<<10)
	im := openMem(t, s)
	want := make([]byte, 1<<20)
	p := bytes.Repeat([]byte{7}, 4096)
	full := int64(-1)
	for off := int64(0); off < 1<<20; off += 4096 {
		err := im.WriteAt(p, off, 0)
		if storage.NoSpace(err) {
			full = off
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
	}
	if full < 256<<10 {
		t.Fatalf("full at %d", full)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := im.Discard(0, 128<<10); err != nil {
		t.Fatal(err)
	}
	clear(want[:128<<10])
	for off := full; off < full+128<<10; off += 4096 {
		if err := im.WriteAt(p, off, 0); err != nil {
			t.Fatalf("after the discard, %d bytes further: %v", off-full, err)
		}
		copy(want[off:], p)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if err := judgeFile(writeOut(t, s), want); err != nil {
		t.Error(err)
	}
}

// What lies behind the end of a device is not handed out, though there are
// counts for it and others of them are not zero.
func TestDeviceEndsBeforeItsCounts(t *testing.T) {
	img := memImage(t, "cluster_size=4k", "1M", 512<<10).Bytes()
	block := binary.BigEndian.Uint64(img[binary.BigEndian.Uint64(img[48:]):])
	binary.BigEndian.PutUint16(img[block+200*2:], 1)
	mem := storagetest.MemOf(img, storagetest.FixedSize)
	var behind atomic.Bool
	im := openMem(t, storagetest.Fault(mem, func(op storagetest.Op) *storagetest.Failure {
		if op.Kind&storagetest.OpChange != 0 && op.Offset+op.Length > int64(len(img)) {
			behind.Store(true)
		}
		return nil
	}))
	p := bytes.Repeat([]byte{7}, 4096)
	for off := int64(0); off < 1<<20; off += 4096 {
		if err := im.WriteAt(p, off, 0); err != nil && !storage.NoSpace(err) {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if behind.Load() {
		t.Error("the image was to be written behind the end of the device")
	}
}

// Space that was freed by others is found again before the image grows.
func TestHolesAreReused(t *testing.T) {
	file := qemu.Create(t, "qcow2", "cluster_size=4k", "2M")
	qemu.IO(t, "qcow2", file, "write -P 1 0 1M", "discard 0 512k")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var l storagetest.Log
	s := l.NewStore(b, storage.Info{NewReadsZero: true})
	im := openMem(t, s)
	p := bytes.Repeat([]byte{7}, 4096)
	for off := int64(1 << 20); off < 1<<20+512<<10; off += 4096 {
		if err := im.WriteAt(p, off, image.FUA); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if n := len(s.Bytes()); n > len(b)+64<<10 {
		t.Errorf("the image grew from %d to %d", len(b), n)
	}
	qemu.Check(t, writeOut(t, s))
}

// Free clusters are found wherever they are: a write does not give up before
// all was looked at.
func TestDeviceFullButForAHole(t *testing.T) {
	s := memImage(t, "cluster_size=512", "4M", 2<<20)
	im := openMem(t, s)
	p := bytes.Repeat([]byte{7}, 4096)
	full := int64(0)
	for {
		if err := im.WriteAt(p, full, 0); storage.NoSpace(err) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		full += 4096
	}
	if err := im.Discard(full-64<<10, 32<<10); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	im = openMem(t, storagetest.MemOf(s.Bytes(), storagetest.FixedSize))
	if err := im.WriteAt(p, 3<<20, 0); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// Who finds all clusters taken by others tries again: a store is full when
// nobody gets any.
func TestOthersAreNotFullness(t *testing.T) {
	s := memImage(t, "cluster_size=512", "4M", 0)
	im := openMem(t, s)
	r := &request{writer: im.writer}
	if err := r.enter(); err != nil {
		t.Fatal(err)
	}
	for i := range int64(4 * maxDry) {
		if err := im.WriteAt([]byte{1}, i*512, 0); err != nil {
			t.Fatal(err)
		}
		if err := r.overcome(obstacle{kind: needClusters}); err != nil {
			t.Fatalf("after %d commits: %v", i, err)
		}
	}
	r.end()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}
