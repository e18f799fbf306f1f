package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	for _, tt := range []struct {
		name, options string
		kinds         storagetest.OpKind
		failure       storagetest.Failure
	}{
		{"write EIO", "cluster_size=1k", storagetest.OpWrite, storagetest.Failure{Err: syscall.EIO}},
		{"short write ENOSPC", "cluster_size=512,refcount_bits=64", storagetest.OpWrite, storagetest.Failure{Err: syscall.ENOSPC, Done: 512}},
		{"read EIO", "cluster_size=512", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}},
		{"sync EIO", "cluster_size=1k", storagetest.OpSync, storagetest.Failure{Err: syscall.EIO}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			blank := memImage(t, tt.options, "256k", 0).Bytes()
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
				f := faultRun{im: im, now: make([]byte, 256<<10)}
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
