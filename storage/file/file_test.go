package file

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

func open2(path string, opt storage.Options) (*store, error) {
	s, err := Open(context.Background(), &url.URL{Scheme: "file", Path: path}, opt)
	if err != nil {
		return nil, err
	}
	return s.(*store), nil
}

func TestSmoke(t *testing.T) {
	for _, dir := range []string{t.TempDir(), "/dev/shm"} {
		for _, direct := range []bool{false, true} {
			path := filepath.Join(dir, "smoke")
			defer os.Remove(path)
			s, err := open2(path, storage.Options{Access: storage.WriteGrow, Create: true, Direct: direct})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", s.Info())
			if err := s.WriteAt([]byte("hello"), 10001, storage.FUA); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, 6)
			n, err := s.ReadAt(p, 10000)
			t.Logf("%q %d %v", p, n, err)
			t.Log(s.TryReadAt(p, 10000), s.TryReadAt(p, 10001))
			t.Log(s.Size())
			t.Log(s.AppendExtents(nil, 0, 1<<20))
			t.Log(s.WriteZeroes(0, 100000, storage.MayUnmap))
			t.Log(s.AppendExtents(nil, 0, 1<<20))
			t.Log(s.WriteZeroes(0, 200000, 0))
			t.Log(s.AppendExtents(nil, 0, 1<<20))
			_, err = open2(path, storage.Options{Access: storage.WriteGrow})
			t.Log(err)
			t.Log(s.Close(), s.Close())
			os.Remove(path)
		}
	}
}
