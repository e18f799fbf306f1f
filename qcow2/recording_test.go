package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A bitmapModel is what a bitmap has to be.
type bitmapModel struct {
	name        string
	granularity int64
	dirty       []bool
}

func newBitmapModel(name string, granularity, size int64) *bitmapModel {
	return &bitmapModel{name, granularity, make([]bool, (size-1)/granularity+1)}
}

func (m *bitmapModel) set(off, n int64) {
	for i := off / m.granularity; i <= (off+n-1)/m.granularity; i++ {
		m.dirty[i] = true
	}
}

// rows returns the model as nbdinfo shows a bitmap.
func (m *bitmapModel) rows(size int64) []nbdRow {
	var rows []nbdRow
	for i, d := range m.dirty {
		off := int64(i) * m.granularity
		r := nbdRow{Offset: off, Length: min(m.granularity, size-off)}
		if d {
			r.Type = 1
		}
		rows = append(rows, r)
	}
	return joinNBD(rows)
}

// bitmapByQEMU returns a bitmap as qemu-nbd shows it.
func bitmapByQEMU(t testing.TB, file, name string) []nbdRow {
	t.Helper()
	status, stop := servedByQEMU(t, file, "-B", name)
	defer stop()
	return status("qemu:dirty-bitmap:" + name)
}

// bitmapByUs returns a bitmap as an open image shows it.
func bitmapByUs(t testing.TB, im *Image, name string) []nbdRow {
	t.Helper()
	b, err := im.Bitmap(name)
	if err != nil {
		t.Fatal(err)
	}
	var rows []nbdRow
	for off, size := int64(0), im.Info().Size; off < size; {
		x, err := b.AppendDirty(nil, off, size-off)
		if err != nil || len(x) == 0 {
			t.Fatalf("%v, %v", x, err)
		}
		for _, e := range x {
			r := nbdRow{Offset: e.Offset, Length: e.Length}
			if e.Dirty {
				r.Type = 1
			}
			rows = append(rows, r)
			off += e.Length
		}
	}
	return joinNBD(rows)
}

func sameRows(t testing.TB, who string, got, want []nbdRow) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%s: got %v, want %v", who, got, want)
	}
}

// Bitmaps go on through sessions of ours and of qemu-io, whatever the image.
func TestBitmapsRecord(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	grains := []int64{512, 4096, 64 << 10, 2 << 20}
	for _, r := range writeRecipes {
		if strings.HasPrefix(r.name, "v2") {
			continue // has none
		}
		t.Run(r.name, func(t *testing.T) {
			r.size = 6<<20 + 1536
			file, _ := r.make(t)
			var models []*bitmapModel
			for i, g := range grains {
				m := newBitmapModel(fmt.Sprint("b", i), g, r.size)
				qemu.Img(t, "bitmap", "--add", "-g", fmt.Sprint(g), file, m.name)
				models = append(models, m)
			}
			off := newBitmapModel("off", 64<<10, r.size)
			qemu.Img(t, "bitmap", "--add", "--disable", file, off.name)
			var mu sync.Mutex
			set := func(at, n int64) {
				mu.Lock()
				defer mu.Unlock()
				for _, m := range models {
					m.set(at, n)
				}
			}
			for session := range 3 {
				im := openWritable(t, file)
				var wg sync.WaitGroup
				for worker := range 3 {
					wg.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(session), uint64(worker)))
						for range 12 {
							at := rnd.Int64N(r.size)
							n := min(rnd.Int64N(40<<10)+1, r.size-at)
							var err error
							switch rnd.IntN(4) {
							case 0:
								err = im.WriteZeroes(at, n, image.WriteFlags(rnd.IntN(2))*image.MayUnmap)
							case 1:
								err = im.Discard(at, n)
							default:
								err = im.WriteAt(make([]byte, n), at, 0)
							}
							if err != nil {
								t.Error(err)
							}
							set(at, n)
						}
					})
				}
				wg.Wait()
				if session == 2 {
					if err := im.WriteZeroes(0, r.size, image.MayUnmap); err != nil {
						t.Fatal(err)
					}
					set(0, r.size)
				}
				for _, m := range models {
					sameRows(t, "open, "+m.name, bitmapByUs(t, im, m.name), m.rows(r.size))
				}
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				if info := qemu.Img(t, "info", file); strings.Contains(info, "in-use") {
					t.Fatal(info)
				}
				qemu.Check(t, file)
				for _, m := range models {
					sameRows(t, "qemu-nbd, "+m.name, bitmapByQEMU(t, file, m.name), m.rows(r.size))
				}
				sameRows(t, "off", bitmapByQEMU(t, file, "off"), off.rows(r.size))
				at := int64(session)<<20 + 3<<20
				qemu.IO(t, "qcow2", file, fmt.Sprintf("write %d 1536", at))
				set(at, 1536)
			}
			im := openWritable(t, file)
			for _, m := range models {
				sameRows(t, "at the end, "+m.name, bitmapByUs(t, im, m.name), m.rows(r.size))
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func openWritable(t testing.TB, file string) *Image {
	t.Helper()
	d, err := openToWrite(file)
	if err != nil {
		t.Fatal(err)
	}
	return d.(*Image)
}

// A table of many clusters has to lie in one piece, for which the refcount
// table may have to grow.
func TestBitmapTableOfManyClusters(t *testing.T) {
	file := qemu.Create(t, "qcow2", "cluster_size=512,refcount_bits=64", "4G")
	qemu.Img(t, "bitmap", "--add", "-g", "512", file, "b")
	m := newBitmapModel("b", 512, 4<<30)
	for at := int64(0); at < 4<<30; at += 1 << 28 {
		im := openWritable(t, file)
		if err := im.WriteAt([]byte{1}, at, 0); err != nil {
			t.Fatal(err)
		}
		m.set(at, 1)
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	qemu.Check(t, file)
	sameRows(t, "qemu-nbd", bitmapByQEMU(t, file, "b"), m.rows(4<<30))
}

// The mark is there from the first change on, not from the opening, until the
// image is closed. Who finds it leaves it.
func TestBitmapsAreMarked(t *testing.T) {
	file := qemu.Create(t, "qcow2", "", "1M")
	qemu.Img(t, "bitmap", "--add", file, "on")
	qemu.Img(t, "bitmap", "--add", "--disable", file, "off")
	inUse := func(want bool, what string) {
		t.Helper()
		info := qemu.Img(t, "info", "-U", file)
		if strings.Contains(info, "in-use") != want {
			t.Errorf("%s: %s", what, info)
		}
	}
	im := openWritable(t, file)
	inUse(false, "opened")
	if err := im.WriteAt([]byte{1}, 0, 0); err != nil {
		t.Fatal(err)
	}
	inUse(true, "written to")
	died, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	inUse(false, "closed")

	if err := os.WriteFile(file, died, 0o600); err != nil {
		t.Fatal(err)
	}
	im = openWritable(t, file)
	if _, err := im.Bitmap("on"); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("after a death: %v", err)
	}
	if _, err := im.Bitmap("off"); err != nil {
		t.Error(err)
	}
	if err := im.WriteAt([]byte{1}, 1<<19, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	inUse(true, "after a death")
}

// Whatever fails, a bitmap is right or in use, the image is sound, and Close
// tells.
func TestBitmapStoreFaults(t *testing.T) {
	file := qemu.Create(t, "qcow2", "cluster_size=512,refcount_bits=64", "256k")
	qemu.Img(t, "bitmap", "--add", "-g", "512", file, "b0")
	qemu.Img(t, "bitmap", "--add", "-g", "4k", file, "b1")
	qemu.IO(t, "qcow2", file, "write 0 1k")
	blank, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		kinds   storagetest.OpKind
		failure storagetest.Failure
	}{
		{"write EIO", storagetest.OpWrite, storagetest.Failure{Err: syscall.EIO}},
		{"write ENOSPC", storagetest.OpWrite, storagetest.Failure{Err: syscall.ENOSPC}},
		{"read EIO", storagetest.OpRead, storagetest.Failure{Err: syscall.EIO}},
		{"sync EIO", storagetest.OpSync, storagetest.Failure{Err: syscall.EIO}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for k := 1; ; k++ {
				mem := storagetest.MemOf(blank)
				store := storagetest.Fault(mem, nil)
				im, err := Open(context.Background(), store, image.Options{})
				if err != nil {
					t.Fatal(err)
				}
				store.Inject(storagetest.Nth(tt.kinds, k, tt.failure))
				before := len(store.Injected())
				werr := im.WriteAt(make([]byte, 1024), 64<<10, 0)
				cerr := im.Close()
				v := crashJudge(mem.Bytes(), nil, nil)
				if len(v.corrupt) > 0 {
					t.Fatalf("%d: %v", k, v.corrupt)
				}
				if len(store.Injected()) == before {
					if werr != nil || cerr != nil || v.leaks > 0 {
						t.Fatalf("nothing failed: %v, %v, %d leaks", werr, cerr, v.leaks)
					}
					if k < 3 && tt.kinds != storagetest.OpRead {
						t.Fatalf("%d operations", k-1)
					}
					return
				}
				for i, b := range v.bitmaps {
					bit := 64 << 10 / b.granularity
					switch {
					case b.flags&bitmapInUse != 0:
						if cerr == nil {
							t.Fatalf("%d: bitmap %d is in use, and Close did not tell", k, i)
						}
					case b.bits[bit/8]>>(bit%8)&1 == 0 && werr == nil:
						t.Fatalf("%d: bitmap %d does not have the write", k, i)
					case b.bits[0]&1 == 0:
						t.Fatalf("%d: bitmap %d lost what it had", k, i)
					}
				}
			}
		})
	}
}

// A bitmap whose clusters are not its own is not kept: to store it would free
// them.
func TestBitmapsNotKept(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(e *editor, dir, table int64)
	}{
		{"bits in the L1 table", func(e *editor, dir, table int64) { e.put(table, e.h.l1Offset) }},
		{"bits in the directory", func(e *editor, dir, table int64) { e.put(table, uint64(dir)) }},
		{"bits past the end", func(e *editor, dir, table int64) { e.put(table, 1<<40) }},
		{"bits in a free cluster", func(e *editor, dir, table int64) { e.put(table, uint64(len(e.b)+65535)&^65535+65536) }},
		{"reserved bits", func(e *editor, dir, table int64) { e.put(table, 2) }},
		{"table in the header", func(e *editor, dir, table int64) { e.put(dir, e.h.refTableOffset) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := qemu.Create(t, "qcow2", "", "1M")
			qemu.Img(t, "bitmap", "--add", file, "b")
			qemu.IO(t, "qcow2", file, "write 0 64k")
			edit(t, file, func(e *editor) {
				x, err := e.h.bitmapsExtension()
				if err != nil {
					t.Fatal(err)
				}
				tt.spoil(e, int64(x.offset), int64(e.word(int64(x.offset))))
			})
			var warned []string
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := storagetest.MemOf(b)
			im, err := Open(context.Background(), s, image.Options{Warn: func(s string) { warned = append(warned, s) }})
			if err != nil {
				t.Fatal(err)
			}
			if len(warned) != 1 || !strings.Contains(warned[0], `bitmap "b" is not kept up to date`) {
				t.Errorf("warned: %q", warned)
			}
			if err := im.WriteAt([]byte{1}, 1<<19, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := im.Bitmap("b"); !errors.Is(err, image.ErrCorrupt) {
				t.Errorf("got %v", err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			again, err := Open(context.Background(), storagetest.MemOf(s.Bytes()), image.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			if !again.Bitmaps()[0].Inconsistent {
				t.Error("the bitmap is not marked")
			}
		})
	}
}

func TestSetBits(t *testing.T) {
	const n = 300
	for first := range int64(n) {
		for _, last := range []int64{first, first + 1, first + 63, first + 64, first + 65, n - 1} {
			words := make([]uint64, 5)
			if last = min(last, n-1); last < first {
				continue
			}
			setBits(words, first, last)
			for i := range int64(len(words)) * 64 {
				if got := words[i/64]>>(i%64)&1 != 0; got != (i >= first && i <= last) {
					t.Fatalf("%d to %d: bit %d is %v", first, last, i, got)
				}
			}
		}
	}
}

// What is said of a bitmap describes all that was asked for, part by part, also
// while its bits are set.
func TestBitmapIsAskedWhileItRecords(t *testing.T) {
	file := qemu.Create(t, "qcow2", "", "1M")
	qemu.Img(t, "bitmap", "--add", "-g", "64k", file, "b")
	im := openWritable(t, file)
	defer im.Close()
	b, err := im.Bitmap("b")
	if err != nil {
		t.Fatal(err)
	}
	live := im.bitmaps[0].live
	var stop atomic.Bool
	var recorder sync.WaitGroup
	defer recorder.Wait()
	defer stop.Store(true)
	recorder.Go(func() {
		for !stop.Load() {
			im.writer.record(512, 512)
			atomic.StoreUint64(&live[0], 0) // to be set again
		}
	})
	for range 1_000_000 {
		at := int64(512) // within a granule
		x, err := b.AppendDirty(nil, at, 64<<10)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range x {
			if e.Offset != at || e.Length <= 0 {
				t.Fatalf("%+v at %d", x, at)
			}
			at += e.Length
		}
	}
}
