package export

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// TestClients has clients of other projects copy a disk through the server,
// both ways, and look at what it tells.
func TestClients(t *testing.T) {
	const size = 24 << 20
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	f, err := os.Create(source)
	if err != nil {
		t.Fatal(err)
	}
	// Data and holes, at odd places too.
	for _, part := range []struct{ off, n int64 }{{0, 1 << 20}, {3<<20 + 4096, 8192}, {5<<20 + 77, 3 << 20}, {size - 512, 512}} {
		if _, err := f.WriteAt(pattern(uint64(part.off), int(part.n)), part.off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	want, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	open := func(path string) image.Device {
		store, err := file.Open(context.Background(), &url.URL{Scheme: "file", Path: path}, storage.Options{Access: storage.Write})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := raw.Open(store, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Close() })
		return dev
	}
	if err := os.WriteFile(target, nil, 0o666); err != nil || os.Truncate(target, size) != nil {
		t.Fatal(err)
	}
	s := serve(t, map[string]*Export{
		"source": {Name: "source", Device: open(source), MultiConn: true, AllocationDepth: true, Description: "where it comes from"},
		"target": {Name: "target", Device: open(target), MultiConn: true},
	}, func(s *Server) {
		s.List = func(context.Context, *Client) ([]Info, error) {
			return []Info{{"source", "where it comes from"}, {"target", ""}}, nil
		}
	})
	uri := func(network, name string) string {
		if network == "unix" {
			return fmt.Sprintf("nbd+unix:///%s?socket=%s", name, s.addr["unix"])
		}
		return fmt.Sprintf("nbd://%s/%s", s.addr["tcp"], name)
	}
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			t.Run("nbdinfo", func(t *testing.T) {
				qemu.Require(t, "nbdinfo")
				got := qemu.Run(t, "nbdinfo", "--list", uri(network, ""))
				for _, line := range []string{`export="source":`, `export="target":`, "where it comes from", "qemu:allocation-depth", "can_multi_conn: true"} {
					if !strings.Contains(got, line) {
						t.Errorf("%q is not told:\n%s", line, got)
					}
				}
			})
			t.Run("nbdcopy", func(t *testing.T) {
				qemu.Require(t, "nbdcopy")
				if err := os.WriteFile(target, pattern(1, size), 0o666); err != nil {
					t.Fatal(err)
				}
				qemu.Run(t, "nbdcopy", "--flush", uri(network, "source"), uri(network, "target"))
				got, err := os.ReadFile(target)
				if err != nil {
					t.Fatal(err)
				}
				same(t, "the copy", got, want)
			})
			t.Run("extended headers", func(t *testing.T) {
				nbdcopy, nbdinfo := qemu.Newer(t, "nbdcopy"), qemu.Newer(t, "nbdinfo")
				if got := qemu.Run(t, nbdinfo, uri(network, "source")); !strings.Contains(got, "using extended packets") {
					t.Errorf("they are not used:\n%s", got)
				}
				if err := os.WriteFile(target, pattern(1, size), 0o666); err != nil {
					t.Fatal(err)
				}
				qemu.Run(t, nbdcopy, "--flush", uri(network, "source"), uri(network, "target"))
				got, err := os.ReadFile(target)
				if err != nil {
					t.Fatal(err)
				}
				same(t, "the copy", got, want)
			})
			t.Run("qemu-img", func(t *testing.T) {
				qemu.Require(t, "qemu-img")
				if err := os.WriteFile(target, pattern(1, size), 0o666); err != nil {
					t.Fatal(err)
				}
				qemu.Run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", uri(network, "source"), uri(network, "target"))
				got, err := os.ReadFile(target)
				if err != nil {
					t.Fatal(err)
				}
				same(t, "the copy", got, want)
			})
			t.Run("qemu-io", func(t *testing.T) {
				qemu.Require(t, "qemu-io")
				got := qemu.Run(t, "qemu-io", "-f", "raw", "-c", "write -P 5 1M 3M", "-c", "write -z 2M 64k", "-c", "discard 3M 1M",
					"-c", "write -f -P 7 0 4k", "-c", "flush", "-c", "read -P 5 1M 1M", "-c", "read -P 0 2M 64k", "-c", "read -P 7 0 4k", uri(network, "target"))
				if strings.Contains(got, "fail") || strings.Contains(got, "error") {
					t.Error(got)
				}
			})
		})
	}
}
