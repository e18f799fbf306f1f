package qcow2

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/image/imagetest"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// Images that we made ourselves, of every size of clusters and every width of
// refcounts: each of the one meets some of the other.
func TestWriteEverySize(t *testing.T) {
	qemu.Require(t, "qemu-img")
	const size = 2<<20 + 512
	seed, steps := uint64(0), 20
	if testing.Short() {
		steps = 5
	}
	for bits := minClusterBits; bits <= maxClusterBits; bits++ {
		for _, order := range []int{bits % 7, (bits + 3) % 7} {
			if (bits > 17 || testing.Short()) && order != bits%7 {
				continue // large ones take their time
			}
			options := fmt.Sprintf("cluster_size=%d,refcount_bits=%d", 1<<bits, 1<<order)
			if order == 4 && bits%2 == 0 {
				options = fmt.Sprintf("compat=0.10,cluster_size=%d", 1<<bits)
			}
			seed++
			t.Run(options, func(t *testing.T) {
				target := imagetest.Target{New: func(t testing.TB) imagetest.Disk {
					dir := t.TempDir()
					file, base := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "base")
					content := make([]byte, size)
					o := image.CreateOptions{Size: size, Params: createParamsOf(options)}
					if seed%3 == 0 { // over a backing image that is shorter
						for i := range content[:size/2] {
							content[i] = byte(i>>9) | 1
						}
						if err := os.WriteFile(base, content[:size/2], 0o600); err != nil {
							t.Fatal(err)
						}
						o.Params = append(o.Params, image.Param{Key: "backing_fmt", Value: "raw"}, image.Param{Key: "backing_file", Value: base})
					}
					if err := chain().Create(t.Context(), file, "qcow2", o); err != nil {
						t.Fatal(err)
					}
					return imagetest.Disk{
						Open:    func() (image.Device, error) { return openToWrite(file) },
						Content: content,
						Judge:   func(want []byte) error { return judgeFile(file, want) },
					}
				}}
				imagetest.Random(t, target, seed, imagetest.RandomOptions{Steps: steps, Cluster: 1 << bits})
			})
		}
	}
}

// A flush costs two barriers at most, or one if no entry changed. The refcount
// blocks of these images reach far enough that no write needs a commit.
func TestFlushBarriers(t *testing.T) {
	for _, options := range []string{"cluster_size=64k", "cluster_size=16k,refcount_bits=8", "extended_l2=on,cluster_size=16k"} {
		t.Run(options, func(t *testing.T) {
			store := storagetest.Fault(memImage(t, options, "16M", 0), nil)
			im := openMem(t, store)
			var mu sync.Mutex
			syncs := 0
			store.Inject(func(op storagetest.Op) *storagetest.Failure {
				if op.Kind == storagetest.OpSync {
					mu.Lock()
					syncs++
					mu.Unlock()
				}
				return nil
			})
			flush := func(what string, most int) {
				t.Helper()
				syncs = 0
				if err := im.Flush(); err != nil {
					t.Fatal(err)
				}
				if syncs < 1 || syncs > most {
					t.Errorf("%s: %d barriers, want at most %d", what, syncs, most)
				}
			}
			write := func(off, n int64) {
				t.Helper()
				if err := im.WriteAt(make([]byte, n), off, 0); err != nil {
					t.Fatal(err)
				}
			}
			flush("nothing changed", 1)
			for i := range int64(8) {
				write(i<<20, 100_000)
				flush("first writes", 2)
				write(i<<20, 100_000)
				flush("overwrites", 1)
				if err := im.Discard(i<<20, 65536); err != nil {
					t.Fatal(err)
				}
				flush("a discard", 2)
				if err := im.WriteZeroes(i<<20, 65536, 0); err != nil {
					t.Fatal(err)
				}
				flush("zeroes", 2)
			}
			syncs = 0
			const writers, each = 8, 4
			var all sync.WaitGroup
			for w := range int64(writers) {
				all.Go(func() {
					for i := range int64(each) {
						if err := im.WriteAt([]byte{1}, 8<<20+w<<20+i<<17, image.FUA); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
			if syncs > 2*writers*each {
				t.Errorf("%d writes with FUA cost %d barriers", writers*each, syncs)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Opening reads little of an image, however large it is and however full: what
// a disk of 1 TiB has in tables stays where it is.
func TestOpenReadsLittle(t *testing.T) {
	qemu.Require(t, "qemu-img")
	file := qemu.Create(t, "qcow2", "cluster_size=512k,preallocation=metadata", "1T")
	for _, readOnly := range []bool{true, false} {
		store := storagetest.Fault(openStore(t, file), nil)
		var mu sync.Mutex
		read, calls := int64(0), 0
		store.Inject(func(op storagetest.Op) *storagetest.Failure {
			if op.Kind == storagetest.OpRead {
				mu.Lock()
				read += op.Length
				calls++
				mu.Unlock()
			}
			return nil
		})
		im, err := Open(t.Context(), store, image.Options{ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := im.ReadAt(make([]byte, 4096), 512<<30); err != nil {
			t.Fatal(err)
		}
		t.Logf("read-only %t: %d bytes in %d reads", readOnly, read, calls)
		if read > 4<<20 || calls > 100 {
			t.Errorf("read-only %t: the first byte takes %d bytes in %d reads", readOnly, read, calls)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
