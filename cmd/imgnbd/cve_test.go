package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// secret is what an image has no right to.
const secret = "root:x:0:0: this is nobody's business\n"

// An attack is an image that somebody has sent, beside a file of the host.
type attack struct {
	*testing.T
	file string
}

// serve runs the program with these options until a command has ended, which
// finds the export as $uri. What it does, it does in bounded memory and time.
func (a *attack) serve(command string, options ...string) outcome {
	a.Helper()
	return a.run(append(append(options, "--run", command), a.file)...)
}

func (a *attack) run(args ...string) outcome {
	a.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, "imgnbd", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	peak := qemu.Measure(a, cmd)
	_ = cmd.Run() // its status tells
	if used := peak(); used > 256<<20 {
		a.Errorf("%q took %d MiB", args, used>>20)
	}
	o := outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	if strings.Contains(o.Stdout+o.Stderr, "nobody's business") {
		a.Errorf("%q shows the secret", args)
	}
	if strings.Contains(o.Stderr, "goroutine ") {
		a.Errorf("%q:\n%s", args, o.Stderr)
	}
	return o
}

// refused wants the image not to be served.
func (a *attack) refused(why string, options ...string) {
	a.Helper()
	if o := a.serve("echo served", options...); o.Code != 1 || o.Stdout != "" || !strings.Contains(o.Stderr, why) {
		a.Errorf("%q: %+v, want %q", options, o, why)
	}
}

// reads wants the disk to begin with some text.
func (a *attack) reads(text string, options ...string) {
	a.Helper()
	o := a.serve(`nbdcopy "$uri" -`, options...)
	if o.Code != 0 || !strings.HasPrefix(o.Stdout, text) {
		a.Errorf("%q: status %d, %q, %s", options, o.Code, o.Stdout[:min(len(o.Stdout), 64)], o.Stderr)
	}
}

// edit changes the bytes of the image.
func (a *attack) edit(f func(b []byte) []byte) {
	a.Helper()
	b, err := os.ReadFile(a.file)
	if err == nil {
		err = os.WriteFile(a.file, f(b), 0o600)
	}
	if err != nil {
		a.Fatal(err)
	}
}

func (a *attack) put32(at int, v uint32) {
	a.Helper()
	a.edit(func(b []byte) []byte { binary.BigEndian.PutUint32(b[at:], v); return b })
}

func (a *attack) put64(at int, v uint64) {
	a.Helper()
	a.edit(func(b []byte) []byte { binary.BigEndian.PutUint64(b[at:], v); return b })
}

// Fields of the header of qcow2.
const (
	atSize           = 24
	atL1Size         = 36
	atRefTable       = 48
	atRefClusters    = 56
	atSnapshotCount  = 60
	atSnapshotOffset = 64
	atRefcountOrder  = 96
)

// Images that try what images of others have tried: nothing of the host is
// seen, nothing crashes, nothing takes much memory.
func TestImageCVEs(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io", "nbdcopy")
	untrusted := func(format string) []string { return []string{"--untrusted", "-f", format} }
	// A guest writes the header of an image to its raw disk, and hopes that it
	// is taken for one the next time.
	disguise := func(a *attack) {
		a.create("raw", "", "1M")
		header := filepath.Join(filepath.Dir(a.file), "header")
		qemu.Img(a, "create", "-q", "-u", "-f", "qcow2", "-b", "secret", "-F", "raw", header, "1M")
		write := `qemu-io -f raw -c "write -s ` + header + ` 0 4096" "$uri"`
		// Who lets the format be guessed is protected by the guard.
		if o := a.serve(write); !strings.Contains(o.Stdout+o.Stderr, "Operation not permitted") {
			a.Errorf("a guessed raw image takes a header: %+v", o)
		}
		if o := a.serve(write, untrusted("raw")...); strings.Contains(o.Stdout+o.Stderr, "failed") {
			a.Errorf("%+v", o)
		}
		a.refused("not believed", "--untrusted")
		a.reads("QFI\xfb", untrusted("raw")...)
		a.refused("refused by policy", untrusted("qcow2")...)
	}
	// An overlay of a file of the host is sent for a disk of its own.
	overlay := func(a *attack) {
		a.create("qcow2", "backing_file=secret,backing_fmt=raw", "")
		if o := a.serve(`qemu-io -r -f raw -c "read -v 0 16" "$uri"`, "-f", "qcow2", "--read-only"); !strings.Contains(o.Stdout, "72 6f 6f 74") {
			a.Errorf("the attack does not work where it is let: %+v", o)
		}
		a.refused("refused by policy", untrusted("qcow2")...)
		a.refused("not believed", "--untrusted")
		a.reads("QFI\xfb", untrusted("raw")...)
	}
	snapshot := func(a *attack) (entry int) {
		a.create("qcow2", "", "1M")
		qemu.Img(a, "snapshot", "-c", "one", a.file)
		a.edit(func(b []byte) []byte { entry = int(binary.BigEndian.Uint64(b[atSnapshotOffset:])); return b })
		return entry
	}
	foreign := func(format, start string, size int) func(a *attack) {
		return func(a *attack) {
			if err := os.WriteFile(a.file, append([]byte(start), make([]byte, size)...), 0o600); err != nil {
				a.Fatal(err)
			}
			a.refused("", untrusted(format)...)
			a.refused("", "-f", format)
			a.refused("")
			a.reads(start, untrusted("raw")...)
		}
	}

	for _, tt := range []struct {
		name string
		try  func(a *attack)
	}{
		// A data file that is a file of the host, or hangs, or is a driver of
		// its own: to look at an image opened it.
		{"CVE-2024-4467", func(a *attack) {
			const json = `json:{"driver":"file","filename":"fifo"}`
			dir := filepath.Dir(a.file)
			if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
				a.Fatal(err)
			}
			a.create("qcow2", "data_file="+strings.Repeat("x", len(json)), "1M")
			a.edit(func(b []byte) []byte { return bytes.ReplaceAll(b, bytes.Repeat([]byte("x"), len(json)), []byte(json)) })
			if o := a.run("info", a.file); o.Code != 0 || !strings.Contains(o.Stdout, "fifo") {
				a.Errorf("info: %+v", o)
			}
			if o := a.run("check", a.file); o.Code != 0 {
				a.Errorf("check: %+v", o)
			}
			a.refused("refused by policy", untrusted("qcow2")...)
		}},
		{"CVE-2024-32498", func(a *attack) {
			a.create("qcow2", "data_file=secret,data_file_raw=on", "1M")
			a.edit(func(b []byte) []byte { // qemu-img emptied it
				if err := os.WriteFile(filepath.Join(filepath.Dir(a.file), "secret"), []byte(secret), 0o600); err != nil {
					a.Fatal(err)
				}
				return b
			})
			a.refused("refused by policy", untrusted("qcow2")...)
			a.refused("refused by policy", "-f", "qcow2", "--backing=none")
		}},
		// A VMDK whose extents are files of the host.
		{"CVE-2022-47951", foreign("vmdk", "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"secret\" 0\n", 4096)},
		{"CVE-2026-2243", foreign("vmdk", "KDMV\x03\x00\x00\x00", 1<<16)},
		{"CVE-2014-0134", overlay},
		{"CVE-2015-1850", overlay},
		{"CVE-2015-1851", overlay},
		{"CVE-2015-5163", overlay},
		{"CVE-2026-24708", disguise},
		{"CVE-2026-27211", disguise},
		// Tables of any length, to keep who looks at them busy.
		{"CVE-2015-5162", func(a *attack) {
			a.create("qcow2", "cluster_size=512", "1G")
			a.put32(atL1Size, strictL1Entries+1)
			a.edit(func(b []byte) []byte { return append(b, make([]byte, 8*strictL1Entries)...) })
			a.refused("an untrusted image may have", untrusted("qcow2")...)
			a.put32(atL1Size, 0xffffffff)
			a.refused("L1 table too large", untrusted("qcow2")...)
			if o := a.run("info", a.file); o.Code != 0 {
				a.Errorf("info: %+v", o)
			}
		}},
		// Arithmetic on what a header says.
		{"CVE-2014-0142", foreign("parallels", "WithoutFreeSpace\x02\x00\x00\x00"+strings.Repeat("\x00", 44), 512)},
		{"CVE-2014-0143", func(a *attack) {
			entry := snapshot(a)
			a.put32(entry+8, 0x7fffffff)
			a.refused("", append(untrusted("qcow2"), "-l", "one")...)
			a.put64(entry, 0xffffffffffff0000)
			a.refused("", append(untrusted("qcow2"), "-l", "one")...)
		}},
		{"CVE-2014-0144", func(a *attack) {
			a.create("qcow2", "", "1M")
			a.put32(atRefcountOrder, 31)
			a.refused("Reference count entry width too large", untrusted("qcow2")...)
		}},
		{"CVE-2014-0145", func(a *attack) {
			entry := snapshot(a)
			a.put32(entry+8, 0x10000) // more than the active one has
			a.refused("", append(untrusted("qcow2"), "-l", "one")...)
		}},
		{"CVE-2014-0146", func(a *attack) {
			snapshot(a)
			a.put64(atSnapshotOffset, 0x7fffffffffff0000)
			a.refused("", untrusted("qcow2")...)
			a.put64(atSnapshotOffset, 1)
			a.refused("Snapshot table offset invalid", untrusted("qcow2")...)
			a.put32(atSnapshotCount, 0xffffffff)
			a.refused("Snapshot table too large", untrusted("qcow2")...)
		}},
		{"CVE-2014-0147", func(a *attack) {
			a.create("qcow2", "", "1M")
			a.put32(atRefClusters, 0xffffffff)
			a.refused("Reference count table too large", untrusted("qcow2")...)
			a.put32(atRefClusters, 1)
			a.put64(atRefTable, 0x8000000000000000)
			a.refused("Reference count table offset invalid", untrusted("qcow2")...)
		}},
		{"CVE-2014-0222", foreign("qcow", "QFI\xfb\x00\x00\x00\x01"+strings.Repeat("\x00", 24)+"\x0c\xff", 4096)},
		{"CVE-2014-0223", func(a *attack) {
			foreign("qcow", "QFI\xfb\x00\x00\x00\x01"+strings.Repeat("\x00", 16)+strings.Repeat("\xff", 8), 4096)(a)
			a.create("qcow2", "", "1M")
			a.put64(atSize, 0xfffffffffffffe00)
			a.refused("Image is too big", untrusted("qcow2")...)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := &attack{T: t, file: filepath.Join(t.TempDir(), "disk")}
			if err := os.WriteFile(filepath.Join(filepath.Dir(a.file), "secret"), append([]byte(secret), make([]byte, 1<<20-len(secret))...), 0o600); err != nil {
				t.Fatal(err)
			}
			tt.try(a)
		})
	}
}

// strictL1Entries is what an untrusted image may have.
const strictL1Entries = 4 << 20 / 8

// create makes the image anew.
func (a *attack) create(format, options, size string) {
	a.Helper()
	args := []string{"create", "-q", "-f", format}
	if options != "" {
		args = append(args, "-o", options)
	}
	args = append(args, a.file)
	if size != "" {
		args = append(args, size)
	}
	a.Chdir(filepath.Dir(a.file)) // for names in options
	qemu.Img(a, args...)
}
