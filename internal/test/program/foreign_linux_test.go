package program

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// What a killed process left is never brought back into an image that somebody
// else has changed since, or that is another one. It is kept, and the message
// says where, unless the image is gone.
func TestKilledThenChanged(t *testing.T) {
	bin := build(t)
	const (
		cluster = 65536
		seal    = "opened for writing by another program"
	)
	qemuIO := func(commands ...string) func(*testing.T, string) {
		return func(t *testing.T, image string) { qemu.IO(t, "qcow2", image, commands...) }
	}
	for _, tt := range []struct {
		name    string
		options string
		change  func(t *testing.T, image string)
		want    string // "": the journal is of no account any more
	}{
		// Clusters that were free by what the image said are used twice now.
		{"written elsewhere by qemu-io", "", qemuIO("write -P 7 32M 4M"), seal},
		{"written at the same place by qemu-io", "", qemuIO("write -P 7 64k 64k"), seal},
		// No table tells of these.
		{"overwritten by qemu-io", "", qemuIO("write -P 7 60M 64k"), seal},
		{"used and given back by qemu-io", "", func(t *testing.T, image string) {
			qemu.Run(t, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "write -P 7 32M 4M", "-c", "discard 32M 4M", image)
		}, seal},
		{"opened by qemu-io", "", qemuIO("read 0 64k"), seal},
		// Version 2 has no seal.
		{"version 2 written elsewhere by qemu-io", "compat=0.10", qemuIO("write -P 7 32M 4M"), "the image was changed since"},
		{"version 2 written at the same place by qemu-io", "compat=0.10", qemuIO("write -P 7 64k 64k"), "the image was changed since"},
		{"written with other tables by qemu-io", "cluster_size=512", qemuIO("write -P 7 32M 2M"), "the image was changed since"},
		{"compressed data by qemu-io", "", qemuIO("write -c -P 7 32M 64k", "write -c -P 7 40M 64k", "write -c -P 7 48M 64k"), "the image was changed since"},
		{"subclusters by qemu-io", "extended_l2=on", qemuIO("write -P 7 32M 4M"), "the image was changed since"},
		{"a snapshot by qemu-img", "", func(t *testing.T, image string) {
			qemu.Img(t, "snapshot", "-c", "s", image)
		}, "or the image was changed since"},
		{"resized by qemu-img", "", func(t *testing.T, image string) {
			qemu.Img(t, "resize", "-q", image, "128M")
		}, "or the image was changed since"},
		{"made anew by qemu-img", "", func(t *testing.T, image string) {
			qemu.Img(t, "create", "-q", "-f", "qcow2", image, "64M")
		}, "the image was changed since"},
		{"made anew by us", "", func(t *testing.T, image string) {
			qemu.Run(t, bin, "create", "-q", "-f", "qcow2", image, "64M")
		}, ""},
		{"another file", "", func(t *testing.T, image string) {
			if err := os.Remove(image); err != nil {
				t.Fatal(err)
			}
			qemu.Img(t, "create", "-q", "-f", "qcow2", image, "64M")
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := qemu.Create(t, "qcow2", tt.options, "64M")
			qemu.IO(t, "qcow2", image, "write -P 3 60M 64k")
			dir := journals(t)
			p := &patient{t: t, bin: bin, socket: filepath.Join(t.TempDir(), "s"), args: []string{"--journal=" + dir, "--format=qcow2", image}}
			if tt.name == "made anew by us" {
				// create looks where journals are by default.
				p.args = []string{"--format=qcow2", image}
			}
			p.start()
			c := p.connect()
			if err := c.WriteZeroes(60<<20, cluster, 0); err != nil {
				t.Fatal(err)
			}
			for i := range int64(8) {
				if err := c.Write(bytes.Repeat([]byte{9}, cluster), i*cluster, 0); err != nil {
					t.Fatal(err)
				}
			}
			p.kill()
			c.Close()

			// Who can only read is told. qemu-img is not.
			if r := qemu.Try(t, bin, "check", image); tt.name == "made anew by us" && !strings.Contains(r.Stderr, "warning: the process that wrote to") {
				t.Errorf("check says nothing of the journal: %+v", r)
			}
			tt.change(t, image)
			before, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}

			p.start()
			if tt.want == "" {
				p.connect().Close()
				p.end()
				qemu.Check(t, image)
				qemu.IO(t, "qcow2", image, "read -P 0 0 64M")
				return
			}
			served := time.AfterFunc(hang, func() { p.cmd.Process.Kill() })
			if err := p.cmd.Wait(); err == nil || !served.Stop() {
				t.Fatal("the image is served")
			}
			files, _ := filepath.Glob(dir + "/*")
			if len(files) != 1 {
				t.Fatalf("the journal was not kept: %q", files)
			}
			for _, want := range []string{tt.want, "what a process left that died cannot be brought back", "hint: to use the image without them, remove " + files[0]} {
				if !strings.Contains(p.stderr.String(), want) {
					t.Errorf("it says %q, and not %q", &p.stderr, want)
				}
			}
			if after, err := os.ReadFile(image); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the image was changed (%v)", err)
			}

			// The advice works.
			if err := os.Remove(files[0]); err != nil {
				t.Fatal(err)
			}
			p.start()
			p.connect().Close()
			p.end()
			qemu.CheckLeaks(t, image)
		})
	}
}
