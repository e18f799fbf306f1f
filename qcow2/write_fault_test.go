package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A faultRun does what a guest may, one request after the other, on a store of
// which one operation fails.
type faultRun struct {
	im   *Image
	now  []byte // what the disk holds
	errs []error
}

func (f *faultRun) change(off, n int64, b byte, err error) {
	if err != nil {
		f.errs = append(f.errs, err)
		// It may have been done in part. What an earlier failure left is no
		// matter here: ranges of failures are read back at once.
		got := make([]byte, n)
		if _, rerr := f.im.ReadAt(got, off); rerr != nil {
			f.errs = append(f.errs, rerr)
			return
		}
		for i, g := range got {
			if g != b && g != f.now[off+int64(i)] {
				f.errs = append(f.errs, fmt.Errorf("byte %d is %#x after a failed request, neither %#x nor %#x", off+int64(i), g, f.now[off+int64(i)], b))
				return
			}
		}
		copy(f.now[off:], got)
		return
	}
	for i := range n {
		f.now[off+i] = b
	}
}

func (f *faultRun) run(r *rand.Rand) {
	size := int64(len(f.now))
	for range 40 {
		off := r.Int64N(size/512) * 512
		n := min(512*(1+r.Int64N(24)), size-off)
		switch r.IntN(8) {
		case 0:
			f.change(off, n, 0, f.im.WriteZeroes(off, n, image.MayUnmap))
		case 1:
			f.change(off, n, 0, f.im.WriteZeroes(off, n, 0))
		case 2:
			if err := f.im.Flush(); err != nil {
				f.errs = append(f.errs, err)
			}
		default:
			b := byte(1 + r.IntN(255))
			p := make([]byte, n)
			for i := range p {
				p[i] = b
			}
			f.change(off, n, b, f.im.WriteAt(p, off, 0))
		}
	}
}

func TestFaults(t *testing.T) {
	shared := writeRecipe{io: []string{"write -P 1 0 200k", "write -z 64k 32k"}, after: [][]string{{"snapshot", "-c", "one", "FILE"}}}
	// Of the blocks that count these clusters no sector is known when more are
	// needed, and each has several.
	blocks := writeRecipe{size: 2 << 20, io: []string{"write -P 1 0 1200k"}}
	grows := writeRecipe{size: 20 << 20, io: []string{"write -P 1 0 15m"}}
	full := writeRecipe{size: 20 << 20, io: []string{"write -P 1 0 16122k"}} // the first commit finds one cluster left that has a block
	compressed := writeRecipe{io: []string{"write -c -P 1 0 64k", "write -c -P 2 128k 16k", "write -P 3 160k 32k"}}
	for _, tt := range []struct {
		name, options string
		kinds         storagetest.OpKind
		failure       storagetest.Failure
		contents      *writeRecipe // nil: nothing
	}{
		{"write EIO", "cluster_size=1k", storagetest.OpWrite, storagetest.Failure{Err: syscall.EIO}, nil},
		{"short write ENOSPC", "cluster_size=512,refcount_bits=64", storagetest.OpWrite, storagetest.Failure{Err: syscall.ENOSPC, Done: 512}, nil},
		{"read EIO", "cluster_size=512", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}, nil},
		{"other EIO", "cluster_size=1k", storagetest.OpZero | storagetest.OpDiscard | storagetest.OpTruncate | storagetest.OpExtents | storagetest.OpSize, storagetest.Failure{Err: syscall.EIO}, nil},
		{"sync EIO", "cluster_size=1k", storagetest.OpSync, storagetest.Failure{Err: syscall.EIO}, nil},
		{"snapshots write EIO", "cluster_size=1k", storagetest.OpWrite, storagetest.Failure{Err: syscall.EIO}, &shared},
		{"snapshots sync EIO", "cluster_size=1k", storagetest.OpSync, storagetest.Failure{Err: syscall.EIO}, &shared},
		{"compressed write ENOSPC", "cluster_size=1k", storagetest.OpWrite, storagetest.Failure{Err: syscall.ENOSPC}, &compressed},
		{"compressed read EIO", "cluster_size=1k", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}, &compressed},
		{"subclusters write EIO", "extended_l2=on,cluster_size=16k", storagetest.OpWrite, storagetest.Failure{Err: syscall.EIO}, &shared},
		{"new refcount block read EIO", "cluster_size=4k,refcount_bits=64", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}, &blocks},
		{"larger refcount table read EIO", "cluster_size=1k,refcount_bits=64", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}, &grows},
		{"full refcount table read EIO", "cluster_size=1k,refcount_bits=64", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}, &full},
	} {
		t.Run(tt.name, func(t *testing.T) {
			blank, content := memImage(t, tt.options, "256k", 0).Bytes(), make([]byte, 256<<10)
			if tt.contents != nil {
				r := *tt.contents
				r.options, r.size = tt.options, max(r.size, int64(len(content)))
				var file string
				var err error
				file, content = r.make(t)
				if blank, err = os.ReadFile(file); err != nil {
					t.Fatal(err)
				}
			}
			failed := 0
			for k := 1; ; k++ {
				mem := storagetest.MemOf(blank)
				store := storagetest.Fault(mem, nil)
				im, err := Open(context.Background(), store, image.Options{Unmap: true})
				if err != nil {
					t.Fatal(err)
				}
				before := len(store.Injected())
				store.Inject(storagetest.Nth(tt.kinds, k, tt.failure))
				f := faultRun{im: im, now: bytes.Clone(content)}
				f.run(rand.New(rand.NewPCG(1, 1)))
				if len(store.Injected()) == before {
					store.Inject(nil)
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
					break // there is no k-th operation
				}
				if len(f.errs) > 0 {
					failed++
				}
				for _, err := range f.errs {
					if !errors.Is(err, tt.failure.Err) {
						t.Fatalf("k %d: %v", k, err)
					}
				}
				store.Inject(nil)
				err = im.Flush()
				if lost := tt.kinds == storagetest.OpSync; lost != (err != nil) {
					t.Fatalf("k %d: flush after the fault: %v", k, err)
				} else if lost {
					if im.Close() == nil {
						t.Fatalf("k %d: closed as if nothing had been lost", k)
					}
					// What it holds now is not asked for, but that it is sound.
					if v := crashJudge(mem.Bytes(), nil, nil); len(v.corrupt) > 0 {
						t.Fatalf("k %d: %s", k, v.corrupt[0])
					}
					continue
				}
				got := make([]byte, len(f.now))
				if _, err := im.ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
				if err := im.Close(); err != nil {
					t.Fatalf("k %d: %v", k, err)
				}
				v := crashJudge(mem.Bytes(), nil, nil)
				if len(v.corrupt) > 0 || v.leaks > 0 {
					t.Fatalf("k %d: %v, %d leaks", k, v.corrupt, v.leaks)
				}
				for i := range got {
					if got[i] != f.now[i] || v.guest[i] != f.now[i] {
						t.Fatalf("k %d: byte %d is %#x, on disk %#x, want %#x", k, i, got[i], v.guest[i], f.now[i])
					}
				}
			}
			t.Logf("a request failed in %d runs", failed)
		})
	}
}

// A sector of counts that cannot be read is in the way of nobody but who needs
// a count of it raised: what was to be lowered waits, until the image is closed
// at the latest.
func TestUnreadableCounts(t *testing.T) {
	const cluster = 4096
	for _, tt := range []struct {
		name  string
		after [][]string
		first bool // it cannot be read from the start
		left  bool // something is given up and not used again
		heals bool
	}{
		{name: "own"},
		{name: "own, given up for good", left: true},
		{name: "own, given up for good, heals", left: true, heals: true},
		{name: "own, heals", heals: true},
		{name: "own, from the start", first: true},
		{name: "shared", after: [][]string{{"snapshot", "-c", "one", "FILE"}}, left: true},
		{name: "shared, heals", after: [][]string{{"snapshot", "-c", "one", "FILE"}}, heals: true},
		{name: "no longer shared", after: [][]string{{"snapshot", "-c", "one", "FILE"}, {"snapshot", "-d", "one", "FILE"}}, heals: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := writeRecipe{options: "cluster_size=4k", size: 64 << 20, io: []string{"write -P 1 0 5M"}, after: tt.after}
			file, content := r.make(t)
			img, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			mem := storagetest.MemOf(img)
			store := storagetest.Fault(mem, nil)
			im, err := Open(context.Background(), store, image.Options{})
			if err != nil {
				t.Fatal(err)
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			write := func(off int64) {
				t.Helper()
				for i := range int64(cluster) {
					content[off+i] = byte(off / cluster)
				}
				must(im.WriteAt(content[off:off+cluster], off, 0))
				must(im.Flush())
			}
			if !tt.first {
				write(32 << 20) // with what is read for that
			}
			refs := im.writer.commit.refs
			lost := host(t, im, 2<<20) / cluster
			at := refs.position(lost / refs.perSector() * refs.perSector())
			store.Inject(storagetest.Within(storagetest.OpRead, at, countSectorSize, storagetest.Failure{Err: syscall.EIO}))
			// One is given up, one replaced; and again, as all of it is at hand.
			for off := int64(2 << 20); off < 2<<20+4*cluster; off += 2 * cluster {
				must(im.Discard(off, cluster))
				clear(content[off : off+cluster])
				must(im.Flush())
				write(off + cluster)
				write(off + 33<<20)
				write(off + 34<<20)
			}
			if len(store.Injected()) == 0 {
				t.Error("that sector was not needed")
			}
			if tt.left {
				must(im.Discard(2<<20+cluster, cluster))
				clear(content[2<<20+cluster : 2<<20+2*cluster])
			}
			if tt.heals {
				store.Inject(nil)
			}
			leaks := tt.left && !tt.heals
			if err := im.Close(); leaks != (err != nil) || err != nil && !errors.Is(err, syscall.EIO) {
				t.Errorf("close: %v", err)
			}
			v := crashJudge(mem.Bytes(), nil, nil)
			if len(v.corrupt) > 0 || leaks != (v.leaks > 0) || !bytes.Equal(v.guest, content) {
				t.Errorf("%v, %d leaks, contents as written: %v", v.corrupt, v.leaks, bytes.Equal(v.guest, content))
			}
		})
	}
}

// An L2 table that snapshots have too and that cannot be read is in the way of
// writes to it, and not of commits: what else was written can be made durable.
func TestUnreadableSharedTable(t *testing.T) {
	r := writeRecipe{options: "cluster_size=8k", size: 16 << 20, io: []string{"write -P 1 0 1M", "write -P 2 8M 1M"}, after: [][]string{{"snapshot", "-c", "one", "FILE"}}}
	file, content := r.make(t)
	img, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	mem := storagetest.MemOf(img)
	store := storagetest.Fault(mem, nil)
	im, err := Open(context.Background(), store, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{9}, 8192)
	table := l1Entry(im.mapping.l1[0].Load()).host()
	store.Inject(storagetest.Within(storagetest.OpRead, table+4096, 4096, storagetest.Failure{Err: syscall.EIO}))
	for name, change := range map[string]func() error{
		"write":   func() error { return im.WriteAt(p, 0, 0) },
		"zero":    func() error { return im.WriteZeroes(0, 8192, 0) },
		"discard": func() error { return im.Discard(0, 8192) },
	} {
		if err := change(); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := im.WriteAt(p, 8<<20, 0); err != nil { // of another table
		t.Fatal(err)
	}
	copy(content[8<<20:], p)
	if err := im.Flush(); err != nil {
		t.Error(err)
	}
	store.Inject(nil)
	if err := im.WriteAt(p, 0, image.FUA); err != nil {
		t.Fatal(err)
	}
	copy(content, p)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	if v := crashJudge(mem.Bytes(), nil, nil); len(v.corrupt) > 0 || v.leaks > 0 || !bytes.Equal(v.guest, content) {
		t.Errorf("%v, %d leaks, contents as written: %v", v.corrupt, v.leaks, bytes.Equal(v.guest, content))
	}
}
