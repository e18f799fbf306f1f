package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// What is hot takes no lock: with all of them held by somebody else, reads,
// overwrites and questions go on.
func TestNoLocks(t *testing.T) {
	im := openMem(t, memImage(t, "", "64M", 0))
	const n = 1 << 20
	want := bytes.Repeat([]byte{7}, n)
	if err := im.WriteAt(want, 0, 0); err != nil {
		t.Fatal(err)
	}
	w := im.writer
	locks := []*sync.Mutex{&w.commit.mu, &w.marking, &w.changes.mu, &w.changes.tableMu, &w.alloc.mu, &im.epochs.mu, &w.tables.gone.mu, &w.tables.made.mu, &im.mapping.cache.arena.mu}
	sets := im.mapping.cache.sets
	for i := range sets {
		locks = append(locks, &sets[i].mu)
		for j := range sets[i].ways {
			if s := sets[i].ways[j].Load(); s != nil {
				locks = append(locks, &s.mu)
			}
		}
	}
	for _, l := range locks {
		l.Lock()
	}
	done := make(chan error, 1)
	go func() { done <- hot(im, want) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("something waits for a lock")
	}
	for _, l := range locks {
		l.Unlock()
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

func hot(im *Image, want []byte) error {
	got := make([]byte, len(want))
	for range 10 {
		if err := im.WriteAt(want, 0, 0); err != nil {
			return err
		}
		if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("read: %w", err)
		}
		clear(got)
		// A store in memory that is recorded waits; only the mapping is asked.
		var buf [4]segment
		if _, err := im.mapping.segments(buf[:0], 0, int64(len(want)), false); err != nil {
			return err
		}
		if _, err := im.AppendExtents(nil, 0, int64(len(want)), image.WantLocation|image.WantAllocated); err != nil {
			return err
		}
		pin := im.Pin()
		pin.Release()
	}
	return nil
}

// A cache as large as the tables holds them all, whatever the hash does: the
// second pass over the disk loads nothing. A larger disk loads at most one slice
// for a miss.
func TestCacheCovers(t *testing.T) {
	const size = 16 << 30 // of which the tables are 2 MiB
	file := qemu.Create(t, "qcow2", "preallocation=metadata", fmt.Sprint(size))
	for _, c := range []struct {
		cache string
		all   bool
	}{{"2M", true}, {"1M", false}} {
		im := openFile(t, file, image.Param{Key: "l2-cache-size", Value: c.cache})
		cache := im.mapping.cache
		var loads int
		read := cache.read
		cache.read = func(no uint64, b []byte, wait bool) error {
			loads++
			return read(no, b, wait)
		}
		slices := int(size / im.geo.sliceSpan())
		pass := func(next func(i int) int64) {
			loads = 0
			for i := range slices {
				var buf [1]segment
				v, err := im.epochs.enter()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := im.mapping.segments(buf[:0], next(i)*im.geo.sliceSpan(), 4096, true); err != nil {
					t.Fatal(err)
				}
				v.leave()
			}
		}
		inOrder := func(i int) int64 { return int64(i) }
		rnd := rand.New(rand.NewPCG(1, 2))
		atRandom := func(int) int64 { return rnd.Int64N(int64(slices)) }
		if pass(inOrder); loads != slices {
			t.Errorf("cache of %s: %d loads in the first pass over %d slices", c.cache, loads, slices)
		}
		for _, next := range []func(int) int64{inOrder, atRandom} {
			pass(next)
			if c.all && loads != 0 || loads > slices {
				t.Errorf("cache of %s: %d loads in a later pass over %d slices", c.cache, loads, slices)
			}
		}
	}
}

// Who waits for a table stops nobody who does not want it.
func TestMissStopsNobody(t *testing.T) {
	file := qemu.Create(t, "qcow2", "preallocation=metadata", "16G")
	im := openFile(t, file)
	cache := im.mapping.cache
	const slow = 3
	waiting, goOn := make(chan struct{}), make(chan struct{})
	var loads atomic.Int64
	read := cache.read
	cache.read = func(no uint64, b []byte, wait bool) error {
		loads.Add(1)
		if no == slow {
			close(waiting)
			<-goOn
		}
		return read(no, b, wait)
	}
	p := make([]byte, 512)
	at := func(no int64) int64 { return no * im.geo.sliceSpan() }
	slowly := make(chan error, 2)
	for range 2 { // of whom one loads it, and the other waits for that
		go func() {
			_, err := im.ReadAt(make([]byte, 512), at(slow))
			slowly <- err
		}()
	}
	<-waiting
	if err := im.TryReadAt(p, at(slow)); err != image.ErrWouldBlock {
		t.Errorf("TryReadAt where a table is on its way: %v", err)
	}
	for no := range im.info.Size / im.geo.sliceSpan() {
		if no == slow {
			continue
		}
		if _, err := im.ReadAt(p, at(no)); err != nil {
			t.Fatal(err)
		}
	}
	close(goOn)
	for range 2 {
		if err := <-slowly; err != nil {
			t.Error(err)
		}
	}
	if n, want := loads.Load(), im.info.Size/im.geo.sliceSpan(); n != want {
		t.Errorf("%d loads of %d slices", n, want)
	}
}

// BenchmarkParallel is for -cpu 1,2,8: the cost of an operation stays what it
// is, since nothing that all share is locked.
func BenchmarkParallel(b *testing.B) {
	for _, what := range []string{"read", "overwrite"} {
		b.Run(what, func(b *testing.B) {
			im := openMem(b, memImage(b, "", "64M", 0))
			defer im.Close()
			if err := im.WriteAt(make([]byte, 16<<20), 0, 0); err != nil {
				b.Fatal(err)
			}
			b.SetParallelism(4)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				var buf [4]segment
				rnd := rand.New(rand.NewPCG(1, rand.Uint64()))
				for pb.Next() {
					off := rnd.Int64N(16<<20) &^ 4095
					v, err := im.epochs.enter()
					if err != nil {
						b.Fatal(err)
					}
					if what == "read" {
						_, err = im.mapping.segments(buf[:0], off, 4096, true)
					} else if s := im.mapping.cache.peek(im.geo.sliceNo(off)); s != nil {
						_, _, err = im.writer.inPlace(s, off, 4096)
					}
					if err != nil {
						b.Fatal(err)
					}
					v.leave()
				}
			})
		})
	}
}

// A table that is at hand is loaded without waiting; who gives up, since it is
// not, takes nobody with him who waits for the same.
func TestMissAtHand(t *testing.T) {
	file := qemu.Create(t, "qcow2", "preallocation=metadata", "16G")
	im := openFile(t, file)
	cache := im.mapping.cache
	trying, goOn := make(chan struct{}), make(chan struct{})
	read := cache.read
	var waited, tried int
	cache.read = func(no uint64, b []byte, wait bool) error {
		switch {
		case wait:
			waited++
		case no == 1:
			close(trying)
			<-goOn
			return image.ErrWouldBlock
		default:
			tried++
		}
		return read(no, b, true)
	}
	lookUp := func(no int64) error {
		v, err := im.epochs.enter()
		if err != nil {
			return err
		}
		defer v.leave()
		_, err = im.mapping.segments(make([]segment, 0, 1), no*im.geo.sliceSpan(), 512, false)
		return err
	}
	if err := lookUp(0); err != nil || tried != 1 {
		t.Errorf("with the table at hand: %v, tried %d times", err, tried)
	}
	gaveUp, patient := make(chan error, 1), make(chan error, 1)
	go func() { gaveUp <- lookUp(1) }()
	<-trying
	go func() {
		_, err := im.ReadAt(make([]byte, 512), im.geo.sliceSpan())
		patient <- err
	}()
	close(goOn)
	if err := <-gaveUp; err != image.ErrWouldBlock {
		t.Errorf("without it: %v", err)
	}
	if err := <-patient; err != nil || waited != 1 {
		t.Errorf("who waited: %v, after %d loads", err, waited)
	}
}

// Discarding and zeroing what has no table, as making a file system does with
// the whole disk, takes nothing out of the cache.
func TestEmptinessIsNotCached(t *testing.T) {
	params := []image.Param{{Key: "l2-cache-size", Value: "32k"}}
	im, err := Open(context.Background(), memImage(t, "cluster_size=4k", "1G", 0), image.Options{Params: params})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	span := im.geo.sliceSpan()
	for no := range int64(4) { // less than the cache has room for
		if err := im.WriteAt([]byte{1}, no*span, image.FUA); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Discard(4*span, 1<<30-4*span); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteZeroes(4*span, 1<<30-4*span, image.MayUnmap); err != nil {
		t.Fatal(err)
	}
	for no := range uint64(4) {
		if im.mapping.cache.peek(no) == nil {
			t.Errorf("slice %d is not in the cache any more", no)
		}
	}
}
