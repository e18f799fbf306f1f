package interop

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

func TestQemuImg(t *testing.T) {
	for name, make := range images {
		t.Run(name, func(t *testing.T) {
			i := make(t)
			eachWay(t, func(t *testing.T, w way) {
				s := serve(t, w.transport, "-r", "-f", i.format, i.file)
				img := w.tool(t, "qemu-img")
				if out := qemu.Run(t, img, "info", "-f", "raw", s.uri); !strings.Contains(out, "16 MiB (16777216 bytes)") {
					t.Errorf("info:\n%s", out)
				}
				if out := qemu.Run(t, img, "compare", "-f", i.format, "-F", "raw", i.file, s.uri); !strings.Contains(out, "identical") {
					t.Errorf("compare: %s", out)
				}
				to := filepath.Join(t.TempDir(), "copy.raw")
				qemu.Run(t, img, "convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", s.uri, to)
				equal(t, to, contents())
				sparse(t, to)
			})
		})
	}
}

// qemu-img map of the export finds the holes that it finds in a raw image.
func TestQemuImgMap(t *testing.T) {
	file := rawImage(t)
	eachWay(t, func(t *testing.T, w way) {
		s := serve(t, w.transport, "-r", "-f", "raw", file)
		rows := func(name string) string {
			var b strings.Builder
			for _, line := range strings.Split(qemu.Run(t, w.tool(t, "qemu-img"), "map", "-f", "raw", name), "\n")[1:] {
				if f := strings.Fields(line); len(f) > 2 {
					fmt.Fprintln(&b, f[0], f[1])
				}
			}
			return b.String()
		}
		if ours, theirs := rows(s.uri), rows(file); ours != theirs {
			t.Errorf("the export has\n%sthe image\n%s", ours, theirs)
		}
	})
}

func TestQemuImgConvertIn(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		to := create(t, filepath.Join(t.TempDir(), "to.raw"), size)
		s := serve(t, w.transport, "-f", "raw", "--discard=unmap", to)
		qemu.Run(t, w.tool(t, "qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", rawImage(t), s.uri)
		equal(t, to, contents())
		// A qcow2 image may lie in an export, and is checked through it.
		qemu.Run(t, w.tool(t, "qemu-img"), "create", "-q", "-f", "qcow2", s.uri, "8M")
		qemu.Run(t, w.tool(t, "qemu-io"), "-f", "qcow2", "-c", "write -P 7 1M 2M", "-c", "read -P 7 2M 1M", s.uri)
		qemu.Run(t, w.tool(t, "qemu-img"), "check", "-f", "qcow2", s.uri)
	})
}

func TestQemuIO(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		file := create(t, filepath.Join(t.TempDir(), "disk.raw"), size)
		s := serve(t, w.transport, "-f", "raw", "--discard=unmap", file)
		var args []string
		for _, c := range []string{
			"write -P 1 0 1M", "write -P 2 513 700", "write -f -P 3 12M 4M", "flush",
			"write -z 64k 64k", "write -z -u 128k 64k", "discard 192k 64k",
			"aio_write -P 4 2M 64k", "aio_write -P 5 3M 1M", "aio_flush",
			"read -P 1 0 513", "read -P 2 513 700", "read -P 1 1213 4096", "read -P 0 64k 128k", "read -P 1 256k 128k",
			"read -P 4 2M 64k", "read -P 5 3M 1M", "read -P 0 4M 8M", "read -P 3 12M 4M",
		} {
			args = append(args, "-c", c)
		}
		r := qemu.Try(t, w.tool(t, "qemu-io"), append(args, "-f", "raw", s.uri)...)
		if out := r.Stdout + r.Stderr; r.Code != 0 || strings.Contains(out, "failed") {
			t.Errorf("qemu-io: exit status %d\n%s", r.Code, out)
		}
	})
}

// qemu-nbd -L describes the program as -L of the program describes it, and the
// program describes qemu-nbd as that does itself.
func TestList(t *testing.T) {
	file := rawImage(t)
	eachWay(t, func(t *testing.T, w way) {
		common := []string{"-r", "-A", "-f", "raw", "-x", "disk", "-D", "a disk"}
		ours := serve(t, w.transport, append(common, file)...)
		theirs, options := transports[w.transport](t)
		theirArgs := append(append([]string{"--persistent", "--shared=0"}, options...), common...)
		qemu.Start(t, w.tool(t, "qemu-nbd"), append(theirArgs, file)...)
		await(t, theirs.network, theirs.address)
		servers := []server{theirs}
		if w.age == "newer" {
			// QEMU 7.2 does not ask for extended headers, and so sees less of
			// the program than the program itself does.
			servers = append(servers, ours)
		}
		for _, s := range servers {
			args := []string{"-L", "-k", s.address}
			if host, port, err := net.SplitHostPort(s.address); s.network == "tcp" && err == nil {
				args = []string{"-L", "-b", host, "-p", port}
			}
			want := qemu.Run(t, w.tool(t, "qemu-nbd"), args...)
			got := qemu.Run(t, imgnbd, args...)
			if got != want {
				t.Errorf("imgnbd -L:\n%s\nqemu-nbd -L:\n%s", got, want)
			}
		}
	})
}

// fio writes, verifies while it writes, and verifies at the end.
func TestFio(t *testing.T) {
	for transport := range transports {
		t.Run(transport, func(t *testing.T) {
			s := serve(t, transport, "-f", "raw", create(t, filepath.Join(t.TempDir(), "disk.raw"), size))
			for _, job := range []string{
				"--rw=randwrite --bs=4k --iodepth=32",
				"--rw=randrw --bsrange=512-128k --iodepth=16",
				"--rw=write --bs=1M --iodepth=4 --fsync=4",
				"--rw=randtrimwrite --bs=4k --iodepth=8",
			} {
				fio(t, s.uri, job)
			}
		})
	}
}

// The same however the image is opened.
func TestFioModes(t *testing.T) {
	for _, mode := range []string{
		"--cache=none", "--cache=none --aio=native", "--cache=writethrough", "--cache=directsync", "--cache=unsafe",
		"--discard=unmap --detect-zeroes=unmap", "--detect-zeroes=on", "--offset=512", "--offset=12345",
	} {
		t.Run(mode, func(t *testing.T) {
			file := create(t, filepath.Join(t.TempDir(), "disk.raw"), size+1<<20)
			s := serve(t, "unix", append(strings.Fields(mode), "-f", "raw", file)...)
			fio(t, s.uri, "--rw=randrw --bsrange=512-64k --iodepth=16")
		})
	}
}

func fio(t *testing.T, uri, job string) {
	t.Helper()
	tool := qemu.Require(t, "fio")
	args := append(strings.Fields(job), "--name=job", "--ioengine=nbd", "--uri="+uri, fmt.Sprintf("--size=%d", size),
		"--verify=crc32c", "--verify_backlog=64", "--verify_state_save=0", "--randrepeat=1")
	t.Chdir(t.TempDir()) // where it may leave files
	if out := qemu.Run(t, tool, args...); !strings.Contains(out, "err= 0") {
		t.Errorf("fio %s:\n%s", job, out)
	}
}

func TestNbdClientList(t *testing.T) {
	for age := range ages {
		t.Run(age, func(t *testing.T) {
			w := way{age, "tcp"}
			s := serve(t, w.transport, "-r", "-f", "raw", "-x", "disk", rawImage(t))
			host, port, err := net.SplitHostPort(s.address)
			if err != nil {
				t.Fatal(err)
			}
			out := qemu.Run(t, w.tool(t, "nbd-client"), "-l", host, port)
			if !strings.Contains(out, "\ndisk\n") {
				t.Errorf("nbd-client -l:\n%s", out)
			}
		})
	}
}
