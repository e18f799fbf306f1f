package qcow2

import (
	"bytes"
	"context"
	"strings"
	"testing"

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
	if _, records, err := openJournal(memory, 0, ""); len(records) > 0 || err != nil {
		t.Errorf("the journal has %d records, %v", len(records), err)
	}
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
		{"entry changed elsewhere", "which the journal does not know", func(store, _ []byte) []byte {
			s := recorded(store)
			im, err := Open(context.Background(), s, image.Options{})
			if err != nil {
				panic(err)
			}
			if err := im.WriteAt(make([]byte, 65536), 0, 0); err != nil {
				panic(err)
			}
			if err := im.Close(); err != nil {
				panic(err)
			}
			return s.Bytes()
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

// A slot that a killed writer left half made is skipped, not the end.
func TestJournalTornRecord(t *testing.T) {
	memory := newJournalMemory(64)
	j, _, err := openJournal(memory, 1, "x")
	if err != nil {
		t.Fatal(err)
	}
	j.start(1, "x")
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
	memory[journalHeader+int((j.end()-2)%j.slots())*recordSize+20] ^= 1
	_, records, err := openJournal(memory, 1, "x")
	if err != nil {
		t.Fatal(err)
	}
	last := records[len(records)-1]
	if last.cluster != 99 || len(records) != int(j.end()-j.base.Load())-1 {
		t.Errorf("%d records, the last of cluster %d", len(records), last.cluster)
	}
}
