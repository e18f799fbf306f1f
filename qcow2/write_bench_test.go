package qcow2

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// BenchmarkWrite writes to a new image: first every block once, in random
// order, then again.
func BenchmarkWrite(b *testing.B) {
	for _, size := range []int64{4 << 10, 64 << 10, 1 << 20} {
		for _, what := range []string{"first", "over"} {
			b.Run(what+" "+sizeName(size), func(b *testing.B) {
				const disk = 4 << 30
				file := filepath.Join(b.TempDir(), "disk.qcow2")
				qemu.Img(b, "create", "-q", "-f", "qcow2", file, "4G")
				d, err := chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2"})
				if err != nil {
					b.Fatal(err)
				}
				defer d.Close()
				r := rand.New(rand.NewPCG(1, 1))
				span := int64(disk)
				if what == "over" {
					span = 64 << 20
					for off := int64(0); off < span; off += 1 << 20 {
						if err := d.WriteAt(make([]byte, 1<<20), off, 0); err != nil {
							b.Fatal(err)
						}
					}
				}
				p := make([]byte, size)
				b.SetBytes(size)
				b.ReportAllocs()
				for b.Loop() {
					if err := d.WriteAt(p, r.Int64N(span/size)*size, 0); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
