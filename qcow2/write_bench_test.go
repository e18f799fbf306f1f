package qcow2

import (
	"context"
	"math/rand/v2"
	"net/url"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	storagefile "github.com/imgnbd/imgnbd/storage/file"
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

// BenchmarkRules writes with the rules that keep an image whole, and with some
// of them switched off: what they cost is the difference. An operation is 8
// first writes of 4 KiB at random, and a flush where the name says so.
func BenchmarkRules(b *testing.B) {
	for _, flush := range []bool{false, true} {
		for _, r := range []struct {
			name    string
			journal bool
			defects defects
		}{
			{name: "all", journal: true},
			{name: "no journal"},
			{name: "no order", defects: defects{noSyncA: true}},
		} {
			name := r.name
			if flush {
				name += ", flushes"
			}
			b.Run(name, func(b *testing.B) {
				const block, disk = 4 << 10, 64 << 30
				file := filepath.Join(b.TempDir(), "disk.qcow2")
				qemu.Img(b, "create", "-q", "-f", "qcow2", file, "64G")
				s, err := storagefile.Open(b.Context(), &url.URL{Scheme: "file", Path: file}, storage.Options{Access: storage.WriteGrow})
				if err != nil {
					b.Fatal(err)
				}
				opt := image.Options{}
				if r.journal {
					opt.Journal = newJournalMemory(64 << 10)
				}
				im, err := open(b.Context(), s, opt, &hooks{defects: r.defects})
				if err != nil {
					b.Fatal(err)
				}
				defer im.Close()
				b.SetParallelism(4)
				b.RunParallel(func(pb *testing.PB) {
					p := make([]byte, block)
					rnd := rand.New(rand.NewPCG(1, rand.Uint64()))
					for pb.Next() {
						for range 8 {
							if err := im.WriteAt(p, rnd.Int64N(disk/block)*block, 0); err != nil {
								b.Fatal(err)
							}
						}
						if flush {
							if err := im.Flush(); err != nil {
								b.Fatal(err)
							}
						}
					}
				})
			})
		}
	}
}
