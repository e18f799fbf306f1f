package storagetest

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/storage"
)

func TestMemExtents(t *testing.T) {
	m := NewMem(10 * memPage)
	mustPass(t, m.WriteAt(make([]byte, 2*memPage), memPage, 0))
	mustPass(t, m.WriteAt([]byte{1}, 5*memPage+7, 0))
	got, err := m.AppendExtents([]storage.Extent{{Offset: 0, Length: 100}}, 100, 1<<40)
	mustPass(t, err)
	want := []storage.Extent{
		{Offset: 0, Length: 100},
		{Offset: 100, Length: memPage - 100, Hole: true},
		{Offset: memPage, Length: 2 * memPage},
		{Offset: 3 * memPage, Length: 2 * memPage, Hole: true},
		{Offset: 5 * memPage, Length: memPage},
		{Offset: 6 * memPage, Length: 4 * memPage, Hole: true},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	mustPass(t, m.Discard(memPage, memPage+1))
	if n := m.Allocated(); n != 2*memPage {
		t.Errorf("%d bytes are allocated, not two pages", n)
	}
}

func TestMemIsSparse(t *testing.T) {
	m := NewMem(1 << 60)
	mustPass(t, m.WriteAt([]byte("end"), 1<<62, 0))
	mustPass(t, m.WriteZeroes(0, 1<<62, storage.MayUnmap))
	if n := m.Allocated(); n != memPage {
		t.Errorf("%d bytes are allocated, not one page", n)
	}
}
