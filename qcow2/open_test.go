package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// TestDirtyAndCorrupt: for reading, neither bit matters, and neither is
// touched.
func TestDirtyAndCorrupt(t *testing.T) {
	x := build(16, 1<<20)
	x.data(0, 6)
	x.h.incompatible = incompatDirty | incompatCorrupt
	x.h.autoclear = 1 << 40
	b := x.bytes()
	s := storagetest.MemOf(b, storagetest.ReadOnly)
	im, err := Open(context.Background(), s, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	if _, err := im.ReadAt(p, 100); err != nil || p[0] != 6 {
		t.Errorf("%v, %d", err, p[0])
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(s.Bytes(), b) {
		t.Error("the image was changed")
	}
}

// TestDataFileOption: the user's data file takes the place of the one that the
// image names, and is refused where the image has none.
func TestDataFileOption(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	r := recipe{options: "data_file=DIR/data,data_file_raw=on", io: writes[:2]}
	file := r.make(t)
	moved := filepath.Join(t.TempDir(), "moved")
	if err := os.Rename(filepath.Join(filepath.Dir(file), "data"), moved); err != nil {
		t.Fatal(err)
	}
	opt := image.OpenOptions{Format: "qcow2", ReadOnly: true}
	if _, err := chain().Open(t.Context(), file, opt); err == nil || !strings.Contains(err.Error(), "data file") {
		t.Errorf("without its data file: %v", err)
	}
	param := image.Param{Key: "data-file", Value: moved}
	im := openFile(t, file, param)
	p := make([]byte, 4096)
	if _, err := im.ReadAt(p, 0); err != nil || p[0] != 0x11 {
		t.Errorf("%v, %#x", err, p[0])
	}
	opt.Params = []image.Param{param}
	plain := recipe{}
	if _, err := chain().Open(t.Context(), plain.make(t), opt); err == nil || !strings.Contains(err.Error(), "'data-file' can only be set for images with an external data file") {
		t.Errorf("image without a data file: %v", err)
	}
}

// TestDataFileCompressed: an external data file has nothing compressed, and no
// bytes of the image are taken for it.
func TestDataFileCompressed(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	r := recipe{options: "data_file=DIR/data", io: writes[:2]}
	file := r.make(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l1 := binary.BigEndian.Uint64(b[40:])
	l2 := l1Entry(binary.BigEndian.Uint64(b[l1:])).host()
	binary.BigEndian.PutUint64(b[l2:], flagCompressed)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = openFile(t, file).ReadAt(make([]byte, 512), 0)
	if !errors.Is(err, image.ErrCorrupt) || !strings.Contains(err.Error(), "compressed cluster in an image with an external data file") {
		t.Errorf("got %v", err)
	}
}

// TestOpenFailures: what was opened before something fails is closed again,
// and the store stays the caller's.
func TestOpenFailures(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := makeChain(t, chains[0].layers)
	s := openStore(t, file)
	edited := storagetest.Fault(s, storagetest.Within(storagetest.OpRead, 0x30000, 8, storagetest.Failure{Err: os.ErrPermission}))
	if _, err := Open(t.Context(), edited, image.Options{ReadOnly: true, Refs: chain()}); err == nil || !strings.Contains(err.Error(), "L1 table at 0x30000") {
		t.Errorf("got %v", err)
	}
	if _, err := s.ReadAt(make([]byte, 8), 0); err != nil {
		t.Errorf("the store was closed: %v", err)
	}
}
