package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/hostile"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// guestMark is in every sector that the guests of hostile images write, so
// that it must never be found in metadata.
var guestMark = []byte("written by guest")

// guestWork has requests of all kinds made by workers at once.
func guestWork(im *Image, choose hostile.Choice, workers, requests int) {
	size := im.Info().Size
	if size == 0 {
		return
	}
	var wg sync.WaitGroup
	for range workers {
		seed := uint64(choose(256))
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, 3))
			limit := min(size, 1<<20)
			for range requests {
				off := r.Int64N(limit)
				switch r.IntN(4) {
				case 0, 1:
					off = off / 512 * 512
				case 2:
					off = r.Int64N(size)
				}
				n := min(1+r.Int64N(min(3*im.geo.clusterSize, 128<<10)), size-off)
				// An image that lies may answer anything.
				switch r.IntN(8) {
				case 0:
					_ = im.WriteZeroes(off, n, image.WriteFlags(r.IntN(2))*image.MayUnmap)
				case 1:
					_ = im.Discard(off, n)
				case 2:
					_, _ = im.ReadAt(make([]byte, n), off)
				case 3:
					_ = im.Flush()
				default:
					_ = im.WriteAt(bytes.Repeat(guestMark, int(n)/len(guestMark)+1)[:n], off, 0)
				}
			}
		})
	}
	wg.Wait()
}

// An outcome is what became of a hostile image.
type outcome struct {
	condemned bool   // it was found to lie by a writer
	repaired  []byte // what it was in the end; nil if it could not be repaired
}

// surviveHostile does with an image all that there is to do, and returns an
// error if a guest could write to metadata, if an image that was found to lie
// can still be written, or if a repair does not keep its word.
func surviveHostile(t testing.TB, b []byte, choose hostile.Choice) (o outcome, err error) {
	ctx := context.Background()
	if im, err := Open(ctx, storagetest.MemOf(b), image.Options{ReadOnly: true}); err == nil {
		readAll(t, im)
		for _, info := range im.Bitmaps() {
			if m, err := im.Bitmap(info.Name); err == nil && im.Info().Size > 0 {
				m.AppendDirty(nil, 0, im.Info().Size)
			}
		}
		im.Close()
	}
	var opt []storagetest.MemOption
	if choose(4) == 0 {
		b = append(bytes.Clone(b), bytes.Repeat([]byte{0xe5}, 64<<10)...)
		opt = append(opt, storagetest.FixedSize)
	}
	s := storagetest.MemOf(b, opt...)
	if im, err := Open(ctx, shared{s}, image.Options{Unmap: choose(2) == 0}); err == nil {
		guestWork(im, choose, 1+choose(3), 40)
		o.condemned = im.writer.commit.refuses() != nil
		err := im.WriteAt(guestMark, 0, 0)
		if o.condemned && im.Info().Size > 0 && !errors.Is(err, image.ErrCorrupt) {
			return o, fmt.Errorf("an image that was found to lie is written to: %v", err)
		}
		if err := im.Close(); o.condemned && err == nil {
			return o, errors.New("an image that was found to lie is closed as if nothing was")
		}
		if o.condemned && im.geo.version >= 3 {
			if _, err := Open(ctx, s, image.Options{}); err == nil {
				return o, errors.New("an image that was found to lie can be written again")
			}
		}
		if at := marked(s); at >= 0 {
			return o, fmt.Errorf("the metadata at %#x is a guest's", at)
		}
	}

	before := viewFuzz(t, s)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	findings := 0
	said, err := check(ctx, s, image.Options{}, image.CheckOptions{Repair: image.RepairAll, Report: func(image.Finding) {
		if findings++; findings > 1<<16 {
			cancel()
		}
	}})
	if kept := before.kept(viewFuzz(t, s)); kept != nil {
		return o, fmt.Errorf("after a repair (%v): %w", err, kept)
	}
	if err != nil || said.Corruptions > 0 || said.CheckErrors > 0 {
		return o, nil
	}
	if res, lines, err := repairStore(s, image.RepairNothing); err != nil || res.Leaks+res.Corruptions+res.CheckErrors > 0 {
		return o, fmt.Errorf("after a repair that said %+v: %+v, %v\n%s", said, res, err, strings.Join(lines, "\n"))
	}
	if size, err := s.Size(); err == nil && size < 16<<20 {
		o.repaired = s.Bytes()
	}
	return o, nil
}

// marked returns where metadata has what a guest wrote, -1 if none has.
func marked(s storage.Store) int64 {
	size, err := s.Size()
	if err != nil || size > 64<<20 {
		return -1
	}
	b := make([]byte, size)
	if _, err := s.ReadAt(b, 0); err != nil {
		return -1
	}
	for _, at := range hostile.Metadata(b) {
		if bytes.Contains(b[at:min(at+1<<binary.BigEndian.Uint32(b[20:]), size)], guestMark) {
			return at
		}
	}
	return -1
}

// TestHostileImages: whatever an image says, nothing that the program holds is
// harmed, and no guest can write to the metadata. qemu-img agrees with repairs.
func TestHostileImages(t *testing.T) {
	qemu.Require(t, "qemu-img")
	n := 2000 * crashRuns(1)
	if testing.Short() {
		n = 300
	}
	condemned, repaired := 0, 0
	for seed := range n {
		r := rand.New(rand.NewPCG(seed, 5))
		img := hostile.New(r.IntN, 4)
		o, err := surviveHostile(t, img.Parts[0].Data, r.IntN)
		if err != nil || t.Failed() {
			t.Fatalf("seed %d: %v; %s", seed, err, img.Name)
		}
		if o.condemned {
			condemned++
		}
		if o.repaired == nil || seed%20 > 0 {
			continue
		}
		repaired++
		file := filepath.Join(t.TempDir(), "repaired.qcow2")
		if err := os.WriteFile(file, o.repaired, 0o600); err != nil {
			t.Fatal(err)
		}
		if qemu.Check(t, file); t.Failed() {
			t.Fatalf("seed %d: %s", seed, img.Name)
		}
	}
	t.Logf("%d images: %d found to lie while written, %d repaired and judged", n, condemned, repaired)
	if condemned == 0 || repaired == 0 {
		t.Error("nothing was tested")
	}
}

// FuzzHostile is TestHostileImages where the input makes the choices: what is
// in an image, which lies are told and what guests do.
func FuzzHostile(f *testing.F) {
	for seed := range uint64(8) {
		p := make([]byte, 400)
		rand.NewChaCha8([32]byte{byte(seed)}).Read(p)
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		choose := func(n int) int {
			if len(p) == 0 {
				return 0
			}
			v := int(p[0])
			if n > 256 && len(p) > 1 {
				v |= int(p[1]) << 8
				p = p[1:]
			}
			p = p[1:]
			return v % n
		}
		img := hostile.New(choose, 6)
		if _, err := surviveHostile(t, img.Parts[0].Data, choose); err != nil {
			t.Fatalf("%v; %s", err, img.Name)
		}
	})
}

// Tables that were made after the image was opened are guarded too: here they
// come to lie where entries say that data is, in clusters whose counts are
// zero, or where the image grows. So are those of snapshots.
func TestWriteGuardsNewTables(t *testing.T) {
	for name, change := range map[string]func(x *builder){
		"free cluster": func(x *builder) {
			at := x.data(0, 1)
			x.free = append(x.free, at>>x.h.clusterBits)
		},
		"table of a snapshot": func(x *builder) {
			l1, l2 := x.alloc(1), x.alloc(1)
			x.put(l1, uint64(l2)|flagCopied)
			at := x.alloc(1)
			x.h.snapshotCount, x.h.snapshotOffset = 1, uint64(at)
			x.put(at, uint64(l1))
			binary.BigEndian.PutUint32(x.b[at+8:], 1)
			x.entry(0, uint64(l2)|flagCopied)
		},
		"where it grows": func(x *builder) {
			x.data(0, 1)
			for i := range int64(40) {
				x.entry((i+1)<<12, uint64(int64(len(x.b))+i<<12)|flagCopied)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := build(12, 8<<20)
			change(x)
			s := storagetest.MemOf(x.bytes())
			im, err := Open(t.Context(), shared{s}, image.Options{})
			if err != nil {
				t.Fatal(err)
			}
			p := bytes.Repeat(guestMark, 4096)[:4096]
			refused := false
			for i := range int64(3) {
				for _, off := range []int64{7 << 20, 2<<20 + i<<21} { // tables that there are not
					if err := im.WriteAt(p, off, image.FUA); err != nil && !errors.Is(err, image.ErrCorrupt) {
						t.Fatal(err)
					}
				}
				for k := range int64(41) {
					err := im.WriteAt(p[:512], k<<12, 0)
					refused = refused || errors.Is(err, image.ErrCorrupt) && strings.Contains(err.Error(), "active metadata")
				}
			}
			if !refused {
				t.Error("no write was refused: nothing was tested")
			}
			if err := im.Close(); err == nil {
				t.Error("closed as if nothing was")
			}
			if at := marked(s); at >= 0 {
				t.Errorf("the metadata at %#x is a guest's", at)
			}
			if h, err := parseHeader(s.Bytes()[:4096]); err != nil || h.incompatible&incompatCorrupt == 0 {
				t.Errorf("the image is not marked as corrupt: %v", err)
			}
		})
	}
}

// A table is not made in a cluster that guest data is being written to, which
// the image said was free: it is found out before the table is there.
func TestWriteInFlightGuarded(t *testing.T) {
	const lie, first, disk = 512, 1 << 20, 12 << 20 // guest offsets
	// work writes until tables of all kinds were made, or an error.
	work := func(im *Image) error {
		p := make([]byte, 64<<10)
		for off := int64(first); off < disk; off += int64(len(p)) {
			if err := im.WriteAt(p, off, image.FUA); err != nil {
				return err
			}
		}
		return nil
	}
	imageWith := func(entry uint64) *storagetest.Mem {
		x := build(9, disk)
		x.data(0, 1)
		x.entry(lie, entry)
		return storagetest.MemOf(append(x.bytes(), make([]byte, 14<<20)...), storagetest.FixedSize)
	}
	s := imageWith(0)
	im := openMem(t, shared{s})
	if err := work(im); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	b := s.Bytes()
	h, err := parseHeader(b[:512])
	if err != nil {
		t.Fatal(err)
	}
	at := func(off uint64) uint64 { return binary.BigEndian.Uint64(b[off:]) & hostMask }
	for name, host := range map[string]uint64{
		"L2 table":       at(h.l1Offset + first/(32<<10)*8),
		"refcount block": at(h.refTableOffset + 8),
		"refcount table": h.refTableOffset,
	} {
		for _, flags := range []uint64{flagCopied, flagCopied | flagZero} {
			t.Run(fmt.Sprintf("%s %#x", name, flags), func(t *testing.T) {
				s := imageWith(host | flags)
				started, release := make(chan storagetest.Op, 1), make(chan struct{})
				hold := storagetest.Hold(storagetest.OpWrite, started, release)
				var held atomic.Bool
				im := openMem(t, storagetest.Fault(shared{s}, func(op storagetest.Op) *storagetest.Failure {
					if op.Kind == storagetest.OpWrite && op.Offset == int64(host) && held.CompareAndSwap(false, true) {
						return hold(op)
					}
					return nil
				}))
				done := make(chan error)
				go func() { done <- im.WriteAt(guestMark, lie, 0) }()
				<-started
				if err := work(im); !errors.Is(err, image.ErrCorrupt) {
					t.Errorf("a table was made: %v", err)
				}
				close(release)
				if err := <-done; err != nil {
					t.Error(err)
				}
				if err := im.WriteAt(guestMark, 0, 0); !errors.Is(err, image.ErrCorrupt) {
					t.Errorf("the image is written to: %v", err)
				}
				if err := im.Close(); err == nil {
					t.Error("closed as if nothing was")
				}
				if at := marked(s); at >= 0 {
					t.Errorf("the metadata at %#x is a guest's", at)
				}
				if h, err := parseHeader(s.Bytes()[:512]); err != nil || h.incompatible&incompatCorrupt == 0 {
					t.Errorf("the image is not marked as corrupt: %v", err)
				}
			})
		}
	}
}

// An L1 entry that has the copied flag and no table leads nowhere, not to the
// header.
func TestWriteNoTableCopied(t *testing.T) {
	x := build(12, 8<<20)
	x.put(int64(x.h.l1Offset), flagCopied)
	s := storagetest.MemOf(x.bytes())
	im, err := Open(t.Context(), shared{s}, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(guestMark, 4096, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(guestMark))
	if _, err := openBytes(t, s.Bytes()).ReadAt(got, 4096); err != nil || !bytes.Equal(got, guestMark) {
		t.Errorf("%q, %v", got, err)
	}
	if res, findings, err := repairStore(s, image.RepairNothing); err != nil || res.Corruptions > 0 {
		t.Errorf("%v\n%s", err, strings.Join(findings, "\n"))
	}
}
