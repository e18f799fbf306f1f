package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	storagefile "github.com/imgnbd/imgnbd/storage/file"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

func openStore(t testing.TB, file string) storage.Store {
	t.Helper()
	s, err := storagefile.Open(context.Background(), &url.URL{Scheme: "file", Path: file}, storage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// qemuInfo is what qemu-img info says of an image itself.
type qemuInfo struct {
	VirtualSize   int64  `json:"virtual-size"`
	ClusterSize   int64  `json:"cluster-size"`
	Encrypted     bool   `json:"encrypted"`
	Dirty         bool   `json:"dirty-flag"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Snapshots     []struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		VMStateSize int64  `json:"vm-state-size"`
		DateSec     int64  `json:"date-sec"`
		DateNsec    int64  `json:"date-nsec"`
		VMClockSec  int64  `json:"vm-clock-sec"`
		VMClockNsec int64  `json:"vm-clock-nsec"`
	} `json:"snapshots"`
	Specific struct {
		Data json.RawMessage `json:"data"`
	} `json:"format-specific"`
}

func compareInspection(t *testing.T, file string) *image.Inspection {
	t.Helper()
	var want qemuInfo
	if err := json.Unmarshal([]byte(qemu.Img(t, "info", "-f", "qcow2", "--output=json", file)), &want); err != nil {
		t.Fatal(err)
	}
	var data bytes.Buffer
	if err := json.Compact(&data, want.Specific.Data); err != nil {
		t.Fatal(err)
	}
	in, err := Format().Inspect(context.Background(), openStore(t, file), nil)
	if err != nil {
		t.Fatal(err)
	}
	specific, err := json.Marshal(in.Specific)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(data.String(), string(specific)); diff != "" {
		t.Errorf("format-specific (- qemu-img, + ours):\n%s", diff)
	}
	got := qemuInfo{VirtualSize: in.VirtualSize, ClusterSize: in.ClusterSize, Encrypted: in.Encrypted, Dirty: in.Dirty, Backing: in.BackingName, BackingFormat: in.BackingFormat}
	for _, sn := range in.Snapshots {
		got.Snapshots = append(got.Snapshots, want.Snapshots[0])
		s := &got.Snapshots[len(got.Snapshots)-1]
		s.ID, s.Name, s.VMStateSize = sn.ID, sn.Name, sn.VMStateSize
		s.DateSec, s.DateNsec = sn.Created.Unix(), int64(sn.Created.Nanosecond())
		s.VMClockSec, s.VMClockNsec = int64(sn.VMClock/1e9), int64(sn.VMClock%1e9)
	}
	want.Specific.Data = nil
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("info (- qemu-img, + ours):\n%s", diff)
	}
	return in
}

func TestInspect(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, r := range recipes {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			r.io = nil
			if in := compareInspection(t, r.make(t)); in.Problem != nil {
				t.Error(in.Problem)
			}
		})
	}
	t.Run("snapshots", func(t *testing.T) { compareInspection(t, withSnapshots(t)) })
	t.Run("bitmaps", func(t *testing.T) { compareInspection(t, withBitmaps(t)) })
	t.Run("backing", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "a")
		qemu.Img(t, "create", "-q", "-u", "-f", "qcow2", "-b", "nowhere/base", "-F", "qcow2", file, "1G")
		if in := compareInspection(t, file); in.Problem != nil {
			t.Error(in.Problem)
		}
	})
}

func TestInspectEncrypted(t *testing.T) {
	qemu.Require(t, "qemu-img")
	for _, options := range []string{
		"encrypt.format=luks,encrypt.iter-time=100",
		"encrypt.format=luks,encrypt.iter-time=100,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
		"encrypt.format=aes",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "disk")
			createEncrypted(t, file, options)
			if in := compareInspection(t, file); !errors.Is(in.Problem, image.ErrKey) {
				t.Errorf("problem %v", in.Problem)
			}
			_, err := Open(context.Background(), openStore(t, file), image.Options{ReadOnly: true})
			if !errors.Is(err, image.ErrKey) || !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("opened with %v", err)
			}
		})
	}
}

// createEncrypted has qemu-img make an encrypted image. It times its key
// derivation, and gives up where it got too little of a busy processor.
func createEncrypted(t *testing.T, file, options string) {
	t.Helper()
	for try := 1; ; try++ {
		r := qemu.Try(t, "qemu-img", "create", "-q", "--object", "secret,id=s0,data=abc", "-f", "qcow2", "-o", "encrypt.key-secret=s0,"+options, file, "1M")
		if r.Code == 0 {
			return
		}
		if try == 50 || !strings.Contains(r.Stderr, "accurate CPU usage") {
			t.Fatalf("qemu-img: exit status %d\n%s", r.Code, r.Stderr)
		}
	}
}

// TestInspectRefused: info works on what cannot be opened.
func TestInspectRefused(t *testing.T) {
	b := mustEncode(t, testHeader())
	b[72] = 0x80 // a feature that nobody knows
	in, err := Format().Inspect(context.Background(), storagetest.MemOf(b), nil)
	if err != nil || in.VirtualSize != 1<<30 || in.BackingName != "base.qcow2" || !errors.Is(in.Problem, errors.ErrUnsupported) {
		t.Errorf("got %+v, %v", in, err)
	}
	in, err = Format().Inspect(context.Background(), storagetest.MemOf(b[:60]), nil)
	if err != nil || !errors.Is(in.Problem, image.ErrCorrupt) {
		t.Errorf("got %+v, %v", in, err)
	}
	if _, err = Format().Inspect(context.Background(), storagetest.MemOf([]byte("something else")), nil); !errors.Is(err, image.ErrWrongFormat) {
		t.Errorf("got %v", err)
	}
}

func TestProbe(t *testing.T) {
	f := Format()
	if !f.Probe(bytes.NewReader(mustEncode(t, testHeader())), 1) || f.Probe(bytes.NewReader([]byte("QFI\xfb")), 4) || f.Probe(bytes.NewReader(make([]byte, 512)), 512) {
		t.Error("probe")
	}
	if f.Probe(errReader{}, 512) {
		t.Error("probe of what cannot be read")
	}
}

type errReader struct{}

func (errReader) ReadAt([]byte, int64) (int, error) { return 0, os.ErrPermission }
