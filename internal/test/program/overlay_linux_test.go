package program

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// -s over a block device: what is written is there for all clients, and gone
// at the end, or with the process.
func TestTemporaryOverlayOfDevice(t *testing.T) {
	bin := build(t)
	const size = 4 << 20
	device := loop(t, size)
	before, err := os.ReadFile(device)
	if err != nil {
		t.Fatal(err)
	}
	qemu.Run(t, "blockdev", "--setro", device)
	t.Cleanup(func() { qemu.Run(t, "blockdev", "--setrw", device) }) // it outlives detaching
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	p := &patient{t: t, bin: bin, socket: filepath.Join(t.TempDir(), "s"), args: []string{"--snapshot", "--format=raw", device}}
	end := p.end
	for range 2 {
		p.start()
		c := p.connect()
		got := make([]byte, size)
		if err := c.Read(got, 0, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, before) {
			t.Error("it does not begin as the device")
		}
		written := bytes.Repeat([]byte{7}, 100_000)
		if err := c.Write(written, 12_345, 0); err != nil {
			t.Fatal(err)
		}
		other := p.connect()
		if err := other.Read(got, 0, 0); err != nil {
			t.Fatal(err)
		}
		copy(before[12_345:], written)
		if !bytes.Equal(got, before) {
			t.Error("what was written is not there")
		}
		c.Close()
		other.Close()
		end()
		end = p.kill
		if before, err = os.ReadFile(device); err != nil {
			t.Fatal(err)
		}
		if files, _ := os.ReadDir(dir); len(files) > 0 {
			t.Errorf("%v are left", files)
		}
	}
	if bytes.Contains(before, []byte{7, 7, 7}) {
		t.Error("the device was written to")
	}
}
