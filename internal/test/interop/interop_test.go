// Package interop lets the clients of other projects judge the program: what
// they see of an image served by it has to be what is in the image. It has
// tests only.
//
// Each test runs with the clients of two ages, over TCP and Unix sockets.
package interop

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// imgnbd is the program, built once for all tests.
var imgnbd string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	imgnbd = filepath.Join(dir, "imgnbd")
	args := []string{"build", "-o", imgnbd}
	if race {
		// The program ends at its first race, which its clients notice.
		args = append(args, "-race")
		os.Setenv("GORACE", "halt_on_error=1")
	}
	args = append(args, "../../../cmd/imgnbd")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// hang bounds what should take a moment.
const hang = 5 * time.Minute

// A server is the program at work.
type server struct {
	uri, network, address string
	stop                  func() error // kills it
}

// transports are the ways to a server; each returns the program's options.
var transports = map[string]func(t *testing.T) (s server, options []string){
	"unix": func(t *testing.T) (server, []string) {
		path := filepath.Join(t.TempDir(), "s")
		return server{uri: "nbd+unix:///?socket=" + path, network: "unix", address: path}, []string{"--socket=" + path}
	},
	"tcp": func(t *testing.T) (server, []string) {
		address := freePort(t)
		_, port, _ := net.SplitHostPort(address)
		return server{uri: "nbd://" + address + "/", network: "tcp", address: address}, []string{"--bind=127.0.0.1", "--port=" + port}
	},
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// serve starts the program and returns when clients can connect.
func serve(t *testing.T, transport string, args ...string) server {
	t.Helper()
	s, options := transports[transport](t)
	_, s.stop = qemu.Start(t, imgnbd, append(append([]string{"--persistent", "--shared=0"}, options...), args...)...)
	await(t, s.network, s.address)
	return s
}

func await(t *testing.T, network, address string) {
	t.Helper()
	for end := time.Now().Add(hang); ; time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
			return
		} else if time.Now().After(end) {
			t.Fatalf("the server does not become ready: %v", err)
		}
	}
}

// ages are the two generations of the clients.
var ages = map[string]func(t testing.TB, tool string) string{
	"older": func(t testing.TB, tool string) string { return qemu.Require(t, tool) },
	"newer": qemu.Newer,
}

// A way is one of the age of a client and the transport.
type way struct {
	age, transport string
}

func (w way) tool(t *testing.T, name string) string {
	t.Helper()
	return ages[w.age](t, name)
}

// eachWay runs a test for every age and transport.
func eachWay(t *testing.T, f func(t *testing.T, w way)) {
	for age := range ages {
		for transport := range transports {
			t.Run(age+" "+transport, func(t *testing.T) { f(t, way{age, transport}) })
		}
	}
}

const size = 16 << 20

// contents are those of the images here: data of three kinds, zeros between.
func contents() []byte {
	b := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{4})
	rng.Read(b[:1<<20])                  // at the beginning,
	rng.Read(b[size-100000:])            // up to the end, unaligned,
	rng.Read(b[5<<20+4096 : 5<<20+8192]) // little alone,
	fill := b[8<<20+65536 : 10<<20]      // and what compresses
	copy(fill, bytes.Repeat([]byte("imgnbd "), len(fill)/7))
	return b
}

// rawImage makes a raw image that is sparse where it is zero.
func rawImage(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	b := contents()
	const block = 4096
	for off := 0; off < size; off += block {
		if p := b[off : off+block]; bytes.Count(p, []byte{0}) < block {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return file
}

// An image is a file, its format and what it has to look like.
type image struct{ file, format string }

// images make the same contents in several ways.
var images = map[string]func(t *testing.T) image{
	"raw":               func(t *testing.T) image { return image{rawImage(t), "raw"} },
	"qcow2":             func(t *testing.T) image { return convert(t, "cluster_size=64k") },
	"qcow2 old":         func(t *testing.T) image { return convert(t, "compat=0.10,cluster_size=4k") },
	"qcow2 subclusters": func(t *testing.T) image { return convert(t, "extended_l2=on,cluster_size=128k") },
	"qcow2 zlib":        func(t *testing.T) image { return convert(t, "compression_type=zlib", "-c") },
	"qcow2 zstd":        func(t *testing.T) image { return convert(t, "compression_type=zstd", "-c") },
	"qcow2 chain": func(t *testing.T) image {
		base := image{rawImage(t), "raw"}
		top := filepath.Join(t.TempDir(), "top.qcow2")
		qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", base.file, "-F", "raw", top)
		// What the top says comes back: written over in the base.
		b := contents()
		part := filepath.Join(t.TempDir(), "part")
		if err := os.WriteFile(part, b[:256<<10], 0o600); err != nil {
			t.Fatal(err)
		}
		qemu.IO(t, "qcow2", top, "write -s "+part+" 0 256k")
		qemu.IO(t, "raw", base.file, "write -P 0xbb 0 256k")
		return image{top, "qcow2"}
	},
}

func convert(t *testing.T, options string, flags ...string) image {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	args := append([]string{"convert", "-f", "raw", "-O", "qcow2", "-o", options}, flags...)
	qemu.Img(t, append(args, rawImage(t), file)...)
	return image{file, "qcow2"}
}

// equal fails the test unless a raw image holds what it should.
func equal(t *testing.T, file string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", file, i, got[i], want[i])
		}
	}
	t.Fatalf("%s: %d bytes, want %d", file, len(got), len(want))
}

func create(t *testing.T, file string, size int64) string {
	t.Helper()
	f, err := os.Create(file)
	err = errors.Join(err, f.Truncate(size), f.Close())
	if err != nil {
		t.Fatal(err)
	}
	return file
}
