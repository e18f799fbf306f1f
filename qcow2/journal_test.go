package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// abandonedJournal writes through a journal and dies, and returns what is left.
func abandonedJournal(t *testing.T) (store, memory []byte) {
	t.Helper()
	memory = newJournalMemory(1024)
	s := memImage(t, "cluster_size=4k", "1M", 0)
	im, err := Open(context.Background(), s, image.Options{Journal: memory})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.WriteAt(bytes.Repeat([]byte{9}, 8192), 4096, 0); err != nil {
		t.Fatal(err)
	}
	im.writer.commit.stop()
	im.mapping.close()
	return s.Bytes(), memory
}

func recorded(b []byte) *storagetest.Recorder {
	return new(storagetest.Log).NewStore(b, storage.Info{NewReadsZero: true})
}

func TestTakeover(t *testing.T) {
	store, memory := abandonedJournal(t)
	mem := recorded(store)
	read := func(opt image.Options) []byte {
		im, err := Open(context.Background(), mem, opt)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 8192)
		if _, err := im.ReadAt(p, 4096); err != nil {
			t.Fatal(err)
		}
		if err := im.writer.close(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if !bytes.Equal(read(image.Options{Journal: memory}), bytes.Repeat([]byte{9}, 8192)) {
		t.Error("what was acknowledged is not there")
	}
	// It is in the image now, and the journal says nothing any more.
	if !bytes.Equal(read(image.Options{}), bytes.Repeat([]byte{9}, 8192)) {
		t.Error("what was taken over is not in the image")
	}
	if v := crashJudge(mem.Bytes(), nil, nil); len(v.corrupt) > 0 || v.leaks > 0 {
		t.Errorf("%v, %d leaks", v.corrupt, v.leaks)
	}
	if _, records, err := openJournal(memory, nil, owner{}); len(records) > 0 || err != nil {
		t.Errorf("the journal has %d records, %v", len(records), err)
	}
}

// Clusters that the journal names do not count as free while the refcount block
// that is to count them is still being made.
func TestTakeoverBehindNewBlock(t *testing.T) {
	const size, cluster = 1 << 20, 512
	for _, tables := range []bool{false, true} {
		t.Run(fmt.Sprint("tables ", tables), func(t *testing.T) {
			open := func(s storage.Store, opt image.Options) *Image {
				im, err := Open(context.Background(), s, opt)
				if err != nil {
					t.Fatal(err)
				}
				return im
			}
			s := memImage(t, "cluster_size=512", "1M", 0)
			want := make([]byte, size)
			write := func(im *Image, at int64, value byte) error {
				p := bytes.Repeat([]byte{value}, cluster)
				copy(want[at:], p)
				return im.WriteAt(p, at, 0)
			}
			if tables { // one cluster of each
				im := open(s, image.Options{})
				for at := int64(64-1) * cluster; at < size; at += 64 * cluster {
					if err := write(im, at, 251); err != nil {
						t.Fatal(err)
					}
				}
				if err := im.writer.close(); err != nil {
					t.Fatal(err)
				}
			}
			h, err := parseHeader(s.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			block := int64(binary.BigEndian.Uint64(s.Bytes()[h.refTableOffset:]))

			// While no count can be written, what is written is in the journal.
			memory := newJournalMemory(4096)
			faulty := storagetest.Fault(s, nil)
			im := open(faulty, image.Options{Journal: memory})
			faulty.Inject(storagetest.Within(storagetest.OpWrite, block, cluster, storagetest.Failure{Err: syscall.EIO}))
			for i := range int64(300) {
				if err := write(im, i*cluster, byte(i%250+1)); err != nil {
					t.Fatal(err)
				}
			}
			im.writer.commit.stop()
			im.mapping.close()

			mem := recorded(s.Bytes())
			im = open(mem, image.Options{Journal: memory})
			for i := range int64(400) {
				if err := write(im, size/2+i*cluster, 255); err != nil {
					t.Fatal(err)
				}
			}
			got := make([]byte, size)
			if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("what was written does not read back, %v", err)
			}
			if err := im.writer.close(); err != nil {
				t.Error(err)
			}
			if v := crashJudge(mem.Bytes(), nil, nil); len(v.corrupt) > 0 || v.leaks > 0 {
				t.Errorf("%v, %d leaks", v.corrupt, v.leaks)
			}
		})
	}
}

// Refcount blocks that were not linked yet are made again where the device has
// room, though it has none at its end.
func TestTakeoverMakesBlocksOnFullDevice(t *testing.T) {
	const size, cluster = 1 << 20, 512
	s := memImage(t, "cluster_size=512", "1M", size/2)
	h, err := parseHeader(s.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	block := int64(binary.BigEndian.Uint64(s.Bytes()[h.refTableOffset:]))
	// While no count can be written, what is written is in the journal.
	memory := newJournalMemory(4096)
	faulty := storagetest.Fault(s, nil)
	im, err := Open(context.Background(), faulty, image.Options{Journal: memory})
	if err != nil {
		t.Fatal(err)
	}
	faulty.Inject(storagetest.Within(storagetest.OpWrite, block, cluster, storagetest.Failure{Err: syscall.EIO}))
	want := make([]byte, size)
	for at := int64(0); at < size; at += cluster {
		p := bytes.Repeat([]byte{byte(at/cluster%250 + 1)}, cluster)
		if err := im.WriteAt(p, at, 0); err != nil {
			break
		}
		copy(want[at:], p)
	}
	if a := im.writer.alloc; a.tail != size/2/cluster {
		t.Fatalf("%d clusters were handed out", a.tail)
	}
	im.writer.commit.stop()
	im.mapping.close()

	mem := new(storagetest.Log).NewStore(s.Bytes(), storage.Info{FixedSize: true})
	if im, err = Open(context.Background(), mem, image.Options{Journal: memory}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was written does not read back, %v", err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if v := crashJudge(mem.Bytes(), nil, nil); len(v.corrupt) > 0 || v.leaks > 0 || !bytes.Equal(v.guest, want) {
		t.Errorf("%v, %d leaks, contents as written: %v", v.corrupt, v.leaks, bytes.Equal(v.guest, want))
	}
}

// A takeover that finds no room says so, and is done when there is some: what the
// process that died had counted for a table is a leak, and the device is full.
func TestTakeoverOnFullDevice(t *testing.T) {
	s := memImage(t, "cluster_size=512", "4M", 512<<10)
	memory := newJournalMemory(4096)
	faulty := storagetest.Fault(s, nil)
	im, err := Open(context.Background(), faulty, image.Options{Journal: memory})
	if err != nil {
		t.Fatal(err)
	}
	pass := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := bytes.Repeat([]byte{7}, 512)
	for off := int64(0); ; off += 512 {
		if err := im.WriteAt(p, off, 0); storage.NoSpace(err) {
			break
		} else {
			pass(err)
		}
	}
	pass(im.Flush())
	pass(im.Discard(0, 1024)) // room for a cluster and its table
	for range maxDry {
		pass(im.Flush())
	}
	pass(im.WriteAt(p, 3<<20, 0))
	// It dies when the table is counted and nothing refers to it.
	var store, left []byte
	faulty.Inject(func(op storagetest.Op) *storagetest.Failure {
		if op.Kind == storagetest.OpSync && store == nil {
			store, left = bytes.Clone(s.Bytes()), bytes.Clone(memory)
		}
		return nil
	})
	pass(im.Flush())
	pass(im.Close())
	copy(memory, left)

	open := func(b []byte) (im *Image, err error) {
		device := new(storagetest.Log).NewStore(b, storage.Info{FixedSize: true})
		opened := make(chan struct{})
		go func() {
			defer close(opened)
			im, err = Open(context.Background(), device, image.Options{Journal: memory})
		}()
		select {
		case <-opened:
		case <-time.After(time.Minute):
			t.Fatal("the takeover does not end")
		}
		return im, err
	}
	if _, err := open(store); !storage.NoSpace(err) {
		t.Fatalf("a full device: %v", err)
	}
	im, err = open(append(store, make([]byte, 64<<10)...))
	pass(err)
	got := make([]byte, 512)
	if _, err := im.ReadAt(got, 3<<20); err != nil || !bytes.Equal(got, p) {
		t.Errorf("what was written does not read back, %v", err)
	}
	pass(im.Close())
}

func TestTakeoverRefused(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		edit       func(store, memory []byte) []byte
	}{
		{"another disk", "of another image", func(store, _ []byte) []byte {
			store[31] ^= 0x10 // its size
			return store
		}},
		{"another size of memory", "another size", func(store, memory []byte) []byte {
			memory[8]++
			return store
		}},
		{"a failed sync", "a sync of the image failed", func(store, memory []byte) []byte {
			memory[24] = 1
			return store
		}},
		{"another version of the program", "another version", func(store, memory []byte) []byte {
			memory[0]++
			return store
		}},
		{"opened for writing elsewhere", "opened for writing by another", func(store, _ []byte) []byte {
			return elsewhere(t, store, 0)
		}},
		// Whoever does not know of seals.
		{"entry changed elsewhere", "which the journal does not know", func(store, _ []byte) []byte {
			changed := elsewhere(t, store, 65536)
			copy(changed[88:96], store[88:96])
			return changed
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store, memory := abandonedJournal(t)
			store = tt.edit(store, memory)
			mem := recorded(store)
			before := bytes.Clone(memory)
			_, err := Open(context.Background(), mem, image.Options{Journal: memory})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if !bytes.Equal(memory, before) {
				t.Error("the journal was changed")
			}
		})
	}
}

// After a failed sync the journal promises nothing: who comes next is told, be
// it by the journal, or by the error of closing the image.
func TestJournalAfterFailedSync(t *testing.T) {
	for _, dies := range []bool{true, false} {
		t.Run(fmt.Sprintf("dies %t", dies), func(t *testing.T) {
			memory := newJournalMemory(1024)
			mem := memImage(t, "cluster_size=4k", "1M", 0)
			store := storagetest.Fault(mem, nil)
			im, err := Open(context.Background(), store, image.Options{Journal: memory})
			if err != nil {
				t.Fatal(err)
			}
			if err := im.WriteAt([]byte{1}, 0, 0); err != nil {
				t.Fatal(err)
			}
			store.Inject(storagetest.Nth(storagetest.OpSync, 1, storagetest.Failure{Err: syscall.EIO}))
			if err := im.Flush(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("flush: %v", err)
			}
			// This one is answered, and in the journal.
			if err := im.WriteAt([]byte{2}, 8192, 0); err != nil {
				t.Fatal(err)
			}
			if dies {
				im.writer.commit.stop()
				im.mapping.close()
			} else if err := im.writer.close(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("close: %v", err)
			}
			im, err = Open(context.Background(), mem, image.Options{Journal: memory})
			if dies {
				if !errors.Is(err, image.ErrJournal) || !strings.Contains(err.Error(), "a sync of the image failed") {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := im.WriteAt([]byte{3}, 0, 0); err != nil {
				t.Error(err)
			}
			if err := errors.Join(im.Flush(), im.Close()); err != nil {
				t.Errorf("opened again: %v", err)
			}
		})
	}
}

// elsewhere returns the image after somebody else opened it, who does not know
// of the journal, and wrote n bytes.
func elsewhere(t *testing.T, store []byte, n int) []byte {
	t.Helper()
	s := recorded(store)
	im, err := Open(context.Background(), s, image.Options{})
	if err == nil {
		err = im.WriteAt(make([]byte, n), 0, 0)
	}
	if err == nil {
		err = im.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.Bytes()
}

// The seal is on the image from the first change to the end, and no longer:
// who only reads changes nothing, and what is left has no trace of it.
func TestSeal(t *testing.T) {
	for _, options := range []string{"", "compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			s := memImage(t, options, "1M", 0)
			seal := func() uint64 { return binary.BigEndian.Uint64(s.Bytes()[88:]) }
			before := seal()
			im, err := Open(context.Background(), s, image.Options{Journal: newJournalMemory(1024)})
			if err != nil {
				t.Fatal(err)
			}
			if err := im.Flush(); err != nil || seal() != before {
				t.Errorf("sealed without a change, %v", err)
			}
			if err := im.WriteAt([]byte{1}, 0, 0); err != nil {
				t.Fatal(err)
			}
			if sealed := seal() != before; sealed != (options == "") {
				t.Errorf("after a write it is sealed: %t", sealed)
			}
			if err := im.writer.close(); err != nil || seal() != before {
				t.Errorf("the seal is left, or %v", err)
			}
		})
	}
}

// The repair of an image that was not closed says what it gives up, and a journal
// that turns up later does not fit any more.
func TestRepairSealed(t *testing.T) {
	killed, left := abandonedJournal(t)
	for _, repair := range []image.Repair{image.RepairNothing, image.RepairLeaks, image.RepairAll} {
		s, warnings := recorded(killed), 0
		opt := image.Options{Name: "disk", Warn: func(string) { warnings++ }}
		for range 2 { // the second finds no seal
			if res, err := check(t.Context(), s, opt, image.CheckOptions{Repair: repair}); err != nil || res.Corruptions+res.CheckErrors > 0 {
				t.Errorf("repair %d: %+v, %v", repair, res, err)
			}
		}
		im, err := Open(t.Context(), s, image.Options{Journal: bytes.Clone(left)})
		if repaired := repair != image.RepairNothing; errors.Is(err, image.ErrJournal) != repaired || (warnings == 1) != repaired {
			t.Errorf("repair %d: %d warnings, and then the journal: %v", repair, warnings, err)
		}
		if err == nil {
			im.Close()
		}
	}
}

// Who opens an image for writing that was not closed is told if the journal is not
// found; and only then. Until the first change it can still be found.
func TestSealWithoutJournal(t *testing.T) {
	killed, left := abandonedJournal(t)
	unsealed := bytes.Clone(killed)
	clear(unsealed[88:92])
	idle := func() (store, memory []byte) { // all that was acknowledged is durable
		s := storagetest.MemOf(unsealed)
		memory = newJournalMemory(1024)
		im, err := Open(t.Context(), s, image.Options{Journal: memory})
		if err == nil {
			err = errors.Join(im.WriteAt([]byte{1}, 0, 0), im.Flush())
		}
		if err != nil {
			t.Fatal(err)
		}
		store, memory = bytes.Clone(s.Bytes()), bytes.Clone(memory)
		im.Close()
		return store, memory
	}
	idleStore, idleJournal := idle()
	for _, test := range []struct {
		name           string
		store, journal []byte
		readOnly       bool
		want           int
	}{
		{"none", killed, nil, false, 1},
		{"an empty one", killed, newJournalMemory(1024), false, 1},
		{"another that has nothing", killed, idleJournal, false, 1},
		{"its own", killed, bytes.Clone(left), false, 0},
		{"its own that has nothing", idleStore, idleJournal, false, 0},
		{"for reading", killed, nil, true, 0},
		{"closed", unsealed, nil, false, 0},
	} {
		s, warnings := recorded(test.store), 0
		opt := image.Options{Journal: bytes.Clone(test.journal), ReadOnly: test.readOnly, Notice: func(string) { warnings++ }}
		im, err := Open(t.Context(), s, opt)
		if err != nil || warnings != test.want {
			t.Errorf("%s: %d warnings, %v", test.name, warnings, err)
			continue
		}
		if test.want == 0 {
			im.Close()
			continue
		}
		if err := im.writer.close(); err != nil {
			t.Fatal(err)
		}
		if im, err = Open(t.Context(), s, image.Options{Journal: bytes.Clone(left)}); err != nil {
			t.Errorf("%s, and then its own: %v", test.name, err)
			continue
		}
		im.Close()
	}
}

// Once its journal is used up a seal is of no meaning: nobody is told of it, though
// the one who found the journal changed nothing, and closed the image or died.
func TestSealIsUsedUp(t *testing.T) {
	killed, left := abandonedJournal(t)
	for _, dies := range []bool{false, true} {
		s, memory := recorded(killed), bytes.Clone(left)
		im, err := Open(t.Context(), s, image.Options{Journal: memory})
		if err != nil {
			t.Fatal(err)
		}
		store, journal := bytes.Clone(s.Bytes()), bytes.Clone(memory)
		if err := im.writer.close(); err != nil {
			t.Fatal(err)
		}
		if !dies {
			store, journal = bytes.Clone(s.Bytes()), nil
		}
		opt := image.Options{Journal: journal, Notice: func(text string) { t.Errorf("dies %t: %s", dies, text) }}
		if im, err = Open(t.Context(), recorded(store), opt); err != nil {
			t.Fatal(err)
		}
		im.Close()
	}
}

// What a journal may become is not touched before it has grown, and records of
// before are found afterwards. Where it cannot grow, commits make room.
func TestJournalGrows(t *testing.T) {
	const first, all = 16 << 10, 64 << 10
	for _, full := range []bool{false, true} {
		t.Run(fmt.Sprintf("full %t", full), func(t *testing.T) {
			memory, err := unix.Mmap(-1, 0, all, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err == nil {
				err = unix.Mprotect(memory[first:], unix.PROT_NONE)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(memory)
			asked, warned := 0, 0
			opt := image.Options{
				Journal: memory[:first],
				GrowJournal: func() error {
					if asked++; full {
						return syscall.ENOSPC
					}
					return unix.Mprotect(memory[first:], unix.PROT_READ|unix.PROT_WRITE)
				},
				Warn: func(string) { warned++ },
			}
			s := memImage(t, "cluster_size=512", "1M", 0)
			im, err := Open(context.Background(), s, opt)
			if err != nil {
				t.Fatal(err)
			}
			const writes = 1000 // and slots for 384 of them at first
			for i := range int64(writes) {
				if i == 300 && asked != 0 {
					t.Error("it grows before it has to")
				}
				if err := im.WriteAt(bytes.Repeat([]byte{byte(i) | 1}, 512), i*1024, 0); err != nil {
					t.Fatal(err)
				}
			}
			if asked != 1 || full != (warned == 1) {
				t.Errorf("asked %d times to grow, warned %d times", asked, warned)
			}
			im.writer.commit.stop()
			im.mapping.close()

			opt.Journal, opt.GrowJournal = memory[:first], func() error { return syscall.ENOSPC }
			again, err := Open(context.Background(), recorded(s.Bytes()), opt)
			if err != nil {
				t.Fatal(err)
			}
			defer again.Close()
			p := make([]byte, 1024)
			for i := range int64(writes) {
				if _, err := again.ReadAt(p, i*1024); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(p[:512], bytes.Repeat([]byte{byte(i) | 1}, 512)) || !bytes.Equal(p[512:], make([]byte, 512)) {
					t.Fatalf("write %d is lost", i)
				}
			}
		})
	}
}

// A ring that grows after a commit loses none of the records in it.
func TestJournalGrowsAfterCommit(t *testing.T) {
	memory := newJournalMemory(256)
	first := memory[:journalHeader+64*recordSize]
	is, more := owner{identity: 1, name: "x"}, func() error { return nil }
	j, _, err := openJournal(first, more, is)
	if err != nil {
		t.Fatal(err)
	}
	j.start(is)
	add := func(n uint64) {
		t.Helper()
		for range n {
			if !j.reserve(1) {
				t.Fatal("no room")
			}
			j.append(record{cluster: j.end()})
			j.unreserve(1)
		}
	}
	add(50)
	j.discard(41)
	add(40)
	if !j.reserve(128) {
		t.Fatal("it has not grown")
	}
	j.unreserve(128)
	add(100)
	_, records, err := openJournal(first, more, is)
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != 150 {
		t.Errorf("%d records, not 150", len(records))
	}
	for i, r := range records {
		if want := uint64(41 + i); r.cluster != want {
			t.Fatalf("record %d is of cluster %d, not %d", i, r.cluster, want)
		}
	}
}

// A request that changes more than the journal has room for does so in parts.
func TestJournalSmallerThanARequest(t *testing.T) {
	for _, options := range []string{"", "extended_l2=on"} {
		im, err := Open(context.Background(), memImage(t, options, "64M", 0), image.Options{Journal: newJournalMemory(64)})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			done <- errors.Join(
				im.WriteAt(bytes.Repeat([]byte{1}, 16<<20), 0, 0),
				im.WriteZeroes(0, 64<<20, 0),
				im.Discard(0, 64<<20),
				im.Close())
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("it does not end")
		}
	}
}

// A slot that a killed writer left half made is skipped, not the end.
func TestJournalTornRecord(t *testing.T) {
	memory := newJournalMemory(64)
	is := owner{identity: 1, name: "x"}
	j, _, err := openJournal(memory, nil, is)
	if err != nil {
		t.Fatal(err)
	}
	j.start(is)
	for i := range uint64(100) {
		if !j.reserve(1) {
			j.discard(j.end() - 3)
			if !j.reserve(1) {
				t.Fatal("no room after discarding")
			}
		}
		j.append(record{cluster: i, now: entry{word: l2Entry(i)}})
		j.unreserve(1)
	}
	memory[journalHeader+int((j.end()-2)%j.slots.Load())*recordSize+20] ^= 1
	_, records, err := openJournal(memory, nil, is)
	if err != nil {
		t.Fatal(err)
	}
	last := records[len(records)-1]
	if last.cluster != 99 || len(records) != int(j.end()-j.base.Load())-1 {
		t.Errorf("%d records, the last of cluster %d", len(records), last.cluster)
	}
}
