package qcow2

import (
	"math/rand/v2"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

func BenchmarkRead(b *testing.B) {
	for _, r := range []recipe{
		{name: "data", size: "256M", io: []string{"write -P 1 0 256M"}},
		{name: "zlib", io: writes, compress: "compression_type=zlib"},
		{name: "zstd", io: writes, compress: "compression_type=zstd"},
	} {
		b.Run(r.name, func(b *testing.B) {
			im := openFile(b, r.make(b))
			for _, size := range []int64{4 << 10, 64 << 10, 1 << 20} {
				b.Run(sizeName(size), func(b *testing.B) {
					p := make([]byte, size)
					rnd := rand.New(rand.NewPCG(1, 1))
					b.SetBytes(size)
					b.ReportAllocs()
					for b.Loop() {
						if _, err := im.ReadAt(p, rnd.Int64N(im.info.Size/size)*size); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
}

func sizeName(n int64) string {
	return map[int64]string{4 << 10: "4k", 64 << 10: "64k", 1 << 20: "1M"}[n]
}

func BenchmarkLookup(b *testing.B) {
	qemu.Require(b, "qemu-img")
	r := recipe{size: "1T", options: "preallocation=metadata"}
	im := openFile(b, r.make(b))
	b.Run("hot", func(b *testing.B) {
		var buf [8]segment
		b.ReportAllocs()
		for b.Loop() {
			v, _ := im.epochs.enter()
			if _, err := im.mapping.segments(buf[:0], 5<<30, 4096, true); err != nil {
				b.Fatal(err)
			}
			v.leave()
		}
	})
	b.Run("cold", func(b *testing.B) {
		var buf [8]segment
		rnd := rand.New(rand.NewPCG(1, 1))
		b.ReportAllocs()
		for b.Loop() {
			v, _ := im.epochs.enter()
			if _, err := im.mapping.segments(buf[:0], rnd.Int64N(1<<40)&^4095, 4096, true); err != nil {
				b.Fatal(err)
			}
			v.leave()
		}
	})
	b.Run("walk", func(b *testing.B) {
		for b.Loop() {
			for _, err := range image.Extents(im, 0, 1<<40, image.WantAllocated) {
				if err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}
