package qcow2

import (
	"bytes"
	"os"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// place returns where the cluster at off lies, as it may be told.
func place(t *testing.T, im *Image, off int64) image.Location {
	t.Helper()
	exts, err := im.AppendExtents(nil, off, im.geo.clusterSize, image.WantLocation)
	if err != nil {
		t.Fatal(err)
	}
	return exts[0].At
}

// host returns where the cluster at off lies, told or not.
func host(t *testing.T, im *Image, off int64) int64 {
	t.Helper()
	segs, err := im.mapping.segments(make([]segment, 0, 1), off, im.geo.clusterSize, true)
	if err != nil {
		t.Fatal(err)
	}
	return segs[0].host
}

// While a Pin is held, no cluster that was freed becomes another's, and as long
// as one waits for that no further location is given. Afterwards it is reused,
// and locations are given again.
func TestLoans(t *testing.T) {
	for name, free := range map[string]func(im *Image, off, n int64) error{
		"discarded": func(im *Image, off, n int64) error { return im.Discard(off, n) },
		"zeroed":    func(im *Image, off, n int64) error { return im.WriteZeroes(off, n, image.MayUnmap) },
	} {
		t.Run(name, func(t *testing.T) {
			store := memImage(t, "", "64M", 0)
			im := openMem(t, store)
			c := im.geo.clusterSize
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			write := func(off int64) {
				t.Helper()
				must(im.WriteAt(bytes.Repeat([]byte{byte(off/c) + 1}, int(c)), off, 0))
				must(im.Flush())
			}
			for i := range int64(4) {
				write(i * c)
			}
			pin := im.Pin()
			lent := place(t, im, 0)
			if lent.Store == nil {
				t.Fatal("no location is given")
			}
			must(free(im, 0, c))
			for i := int64(10); i < 30; i++ {
				write(i * c)
				if host(t, im, i*c) == lent.Offset {
					t.Fatal("a cluster that was lent was reused")
				}
			}
			if place(t, im, c).Store != nil {
				t.Error("a location is given while a cluster waits")
			}
			pin.Release()
			must(im.Flush())
			write(30 * c) // a commit to free it, if that has not been yet
			if pin := im.Pin(); place(t, im, c).Store == nil {
				t.Error("no location is given after the pin was released")
			} else {
				pin.Release()
			}
			for i := int64(31); host(t, im, 30*c) != lent.Offset && host(t, im, i*c-c) != lent.Offset; i++ {
				if i == 40 {
					t.Fatal("a cluster that was lent is never reused")
				}
				write(i * c)
			}
			im.Pin() // never released: Close lets go
			must(im.Discard(c, c))
			must(im.Flush())
			must(im.Close())
			qemu.Check(t, writeOut(t, store))
		})
	}
}

// What others may still use is lent again once the reference that was given up
// has been taken off, as is all else.
func TestLoansOfSharedClusters(t *testing.T) {
	for name, r := range map[string]writeRecipe{
		"snapshot":   {io: []string{"write -P 1 0 1M"}, after: [][]string{{"snapshot", "-c", "one", "FILE"}}},
		"compressed": {io: []string{"write -c -P 1 0 192k", "write -P 1 512k 64k"}},
	} {
		t.Run(name, func(t *testing.T) {
			r.size = 4 << 20
			file, _ := r.make(t)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			im := openMem(t, storagetest.MemOf(b))
			defer im.Close()
			if place(t, im, 512<<10).Store == nil {
				t.Fatal("no location is given")
			}
			if err := im.WriteAt(bytes.Repeat([]byte{2}, 64<<10), 0, 0); err != nil {
				t.Fatal(err)
			}
			for range 4 { // the entry, the count, and time to spare
				if err := im.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			if place(t, im, 512<<10).Store == nil {
				t.Error("no location is given any more")
			}
			if n := im.loans.waiting.Load(); n != 0 {
				t.Errorf("%d clusters wait", n)
			}
		})
	}
}

// Pins are wanted back when much waits for them, and not before.
func TestLoansRecalled(t *testing.T) {
	im := openMem(t, memImage(t, "", "256M", 0))
	defer im.Close()
	pin := im.Pin()
	defer pin.Release()
	step := func(off, n int64, recalled bool) {
		t.Helper()
		if err := im.WriteAt(make([]byte, n), off, 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Discard(off, n); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if got := pin.Recalled(); got != recalled {
			t.Errorf("after %d bytes were given up: recalled %v", off+n, got)
		}
	}
	step(0, 1<<20, false)
	step(1<<20, graceBytes, true)
}

// Where clusters never move, no Pin is needed.
func TestNoLoans(t *testing.T) {
	im := openMem(t, memImage(t, "", "1M", 8<<20))
	defer im.Close()
	if im.Pin().Held() {
		t.Error("a Pin of an image that cannot grow")
	}
	if err := im.WriteAt(make([]byte, 4096), 0, 0); err != nil {
		t.Fatal(err)
	}
	if place(t, im, 0).Store != nil {
		t.Error("a location without a Pin that keeps it")
	}
}
