package hostile

import (
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// Without lies an image is sound, so that it is the lies that matter.
func TestSound(t *testing.T) {
	qemu.Require(t, "qemu-img")
	for seed := range uint64(30) {
		file := filepath.Join(t.TempDir(), "disk.qcow2")
		if err := New(rand.New(rand.NewPCG(seed, 1)).IntN, 0).WriteFile(file); err != nil {
			t.Fatal(err)
		}
		qemu.Check(t, file)
	}
}
