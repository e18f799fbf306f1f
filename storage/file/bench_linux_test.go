package file

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

// Reading 4 KiB at random from what the page cache holds.
func BenchmarkRead4K(b *testing.B) {
	const size = 64 << 20
	for name, dir := range map[string]string{"Disk": b.TempDir(), "Memory": memoryDir(b)} {
		s := mustOpen(b, filepath.Join(dir, "file"), storage.Options{Access: storage.WriteGrow, Create: true})
		pass(b, s.WriteAt(bytes.Repeat([]byte{1}, size), 0, 0))
		pass(b, s.Sync()) // now, not while it is measured
		read := func(p []byte, off int64) error { _, err := s.ReadAt(p, off); return err }
		for how, read := range map[string]func([]byte, int64) error{"ReadAt": read, "TryReadAt": s.TryReadAt} {
			b.Run(name+how, func(b *testing.B) {
				b.SetBytes(4096)
				b.ReportAllocs()
				r := rand.New(rand.NewPCG(1, 2))
				p := make([]byte, 4096)
				for b.Loop() {
					if err := read(p, r.Int64N(size/4096)*4096); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
