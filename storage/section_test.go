package storage_test

import (
	"bytes"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// A section keeps the contract of a store, and nothing around it changes.
func TestSection(t *testing.T) {
	const before, after = 100_000, 70_000
	for name, open := range map[string]bool{"Section": false, "OpenEnd": true} {
		t.Run(name, func(t *testing.T) {
			around := func(m *storagetest.Mem, begin, n int64) (storage.Store, error) {
				if open {
					n = -1
				}
				return storage.Section(m, begin, n)
			}
			storagetest.Run(t, storagetest.Target{
				New: func(t testing.TB, size int64) storage.Store {
					content := bytes.Repeat([]byte{0xee}, int(before+size+after))
					if open {
						content = content[:before+size]
					}
					m := storagetest.MemOf(content)
					s, err := around(m, before, size)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() {
						now := m.Bytes()
						if !bytes.Equal(now[:before], content[:before]) {
							t.Error("what is before the section changed")
						}
						if !open && !bytes.Equal(now[before+size:], content[before+size:]) {
							t.Error("what is behind the section changed")
						}
					})
					return s
				},
				NewReadOnly: func(t testing.TB, content []byte) storage.Store {
					all := append(make([]byte, before), content...)
					s, err := around(storagetest.MemOf(all, storagetest.ReadOnly), before, int64(len(content)))
					if err != nil {
						t.Fatal(err)
					}
					return s
				},
			})
		})
	}
	m := storagetest.NewMem(100)
	for _, r := range [][2]int64{{-1, 10}, {101, -1}, {50, 51}, {101, 0}} {
		if _, err := storage.Section(m, r[0], r[1]); err == nil {
			t.Errorf("%d bytes from %d on of 100", r[1], r[0])
		}
	}
}

// Two parts of one file are two images, each with a journal of its own; what begins
// with the file is that.
func TestSectionIdentity(t *testing.T) {
	m := identified{storagetest.NewMem(100)}
	seen := map[string]int64{}
	for _, begin := range []int64{0, 10, 50} {
		s, err := storage.Section(m, begin, 10)
		if err != nil {
			t.Fatal(err)
		}
		id := s.Info().ID
		if other, found := seen[id]; found || (id == m.Info().ID) != (begin == 0) {
			t.Errorf("from %d on it is %q, as from %d", begin, id, other)
		}
		seen[id] = begin
	}
}

type identified struct{ storage.Store }

func (s identified) Info() storage.Info {
	info := s.Store.Info()
	info.ID = "file 1:2 3"
	return info
}

// What somebody cuts off is not there any more.
func TestSectionCutShort(t *testing.T) {
	m := storagetest.NewMem(100)
	s, err := storage.Section(m, 10, 50)
	if err != nil {
		t.Fatal(err)
	}
	for to, want := range map[int64]int64{100: 50, 60: 50, 40: 30, 5: 0} {
		if err := m.Truncate(to); err != nil {
			t.Fatal(err)
		}
		if size, err := s.Size(); err != nil || size != want {
			t.Errorf("of %d bytes %d are there, %v", to, size, err)
		}
	}
}
