package image_test

import (
	"context"
	"errors"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// Of what a failed Create made nothing remains; what was there before does.
func TestCreateRemoves(t *testing.T) {
	for _, test := range []struct {
		name, data string
		fails      bool
		remain     []string
	}{
		{"new", "newdata", false, []string{"new", "newdata", "old"}},
		{"new", "newdata", true, []string{"old"}},
		{"old", "newdata", true, []string{"old"}},
		{"new", "old", true, []string{"old"}},
		{"new", "nowhere/data", false, []string{"old"}},
		{"new", "new", false, []string{"old"}}, // its own data file
		{"new", "", true, []string{"old"}},
	} {
		d := newDir(t)
		d.file("old", "OLD")
		f := toy()
		f.Name = "pair"
		f.Create = func(ctx context.Context, s storage.Store, opt image.CreateOptions) error {
			if test.data != "" {
				data, err := opt.NewStore(ctx, test.data)
				if err != nil {
					return err
				}
				if err := errors.Join(data.WriteAt([]byte("data"), 0, 0), data.Close()); err != nil {
					return err
				}
			}
			if test.fails {
				return syscall.EIO
			}
			return s.WriteAt([]byte("TOY\n"), 0, 0)
		}
		c := d.chain
		c.Formats = []image.Format{f}
		err := c.Create(t.Context(), filepath.Join(d.path, test.name), "pair", image.CreateOptions{})
		if (err == nil) != (len(test.remain) == 3) || test.fails && !errors.Is(err, syscall.EIO) {
			t.Errorf("%s, %s: %v", test.name, test.data, err)
		}
		entries, err := os.ReadDir(d.path)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if len(names) != len(test.remain) {
			t.Errorf("%s, %s, fails %t: %q remain, want %q", test.name, test.data, test.fails, names, test.remain)
		}
	}
}

// Whatever a format is doing when Create is cancelled, it goes no further, and
// nothing remains.
func TestCreateCancelled(t *testing.T) {
	ended := errors.New("ended")
	for name, step := range map[string]func(storage.Store) error{
		"write":    func(s storage.Store) error { return s.WriteAt([]byte("TOY\n"), 0, 0) },
		"zero":     func(s storage.Store) error { return s.WriteZeroes(0, 4096, 0) },
		"truncate": func(s storage.Store) error { return s.Truncate(4096) },
		"sync":     func(s storage.Store) error { return s.Sync() },
		"nothing":  func(storage.Store) error { return nil },
	} {
		d := newDir(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		f := toy()
		f.Create = func(ctx context.Context, s storage.Store, opt image.CreateOptions) error {
			data, err := opt.NewStore(ctx, "data")
			if err != nil {
				return err
			}
			cancel(ended)
			return errors.Join(step(s), step(data), data.Close())
		}
		c := d.chain
		c.Formats = []image.Format{f}
		if err := c.Create(ctx, filepath.Join(d.path, "new"), f.Name, image.CreateOptions{}); !errors.Is(err, ended) {
			t.Errorf("%s: %v", name, err)
		}
		if entries, err := os.ReadDir(d.path); err != nil || len(entries) > 0 {
			t.Errorf("%s: %v remain, %v", name, entries, err)
		}
	}
}

// A file that somebody else makes, after Create has looked and found none, is not
// Create's to remove.
func TestCreateRemovesOnlyItsOwn(t *testing.T) {
	for _, name := range []string{"new", "data"} {
		d := newDir(t)
		c := d.chain
		c.Protocols = []storage.Protocol{{Name: "file", Remove: file.Protocol().Remove, Open: func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
			if opt.Create && filepath.Base(u.Path) == name {
				d.file(name, "THEIRS")
			}
			return file.Open(ctx, u, opt)
		}}}
		f := toy()
		f.Create = func(ctx context.Context, s storage.Store, opt image.CreateOptions) error {
			data, err := opt.NewStore(ctx, "data")
			if err != nil {
				return err
			}
			return errors.Join(syscall.EINVAL, data.Close())
		}
		c.Formats = []image.Format{f}
		if err := c.Create(t.Context(), filepath.Join(d.path, "new"), f.Name, image.CreateOptions{}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v", name, err)
		}
		entries, err := os.ReadDir(d.path)
		if err != nil || len(entries) != 1 || entries[0].Name() != name {
			t.Errorf("%s: %v remain, %v", name, entries, err)
		}
	}
}

// removedJournals are journals of which only the end is of interest.
type removedJournals struct{ removed func(storage.Info) error }

func (j removedJournals) Open(storage.Info) (image.Journal, error) { return nil, nil }
func (j removedJournals) Left(storage.Info) string                 { return "" }
func (j removedJournals) Remove(i storage.Info) error              { return j.removed(i) }

// The journal of an image is given up with the first change of the image, and
// not by a Create that comes to none.
func TestCreateRemovesJournal(t *testing.T) {
	refused := errors.New("refused")
	changes := map[string]func(storage.Store) error{
		"write":                         func(s storage.Store) error { return s.WriteAt([]byte("TOY\n"), 0, 0) },
		"zero":                          func(s storage.Store) error { return s.WriteZeroes(0, 3, 0) },
		"discard":                       func(s storage.Store) error { return s.Discard(0, 3) },
		"truncate":                      func(s storage.Store) error { return s.Truncate(0) },
		"no change but zeros behind it": func(s storage.Store) error { return errors.Join(s.Truncate(4), refused) },
		"no change": func(s storage.Store) error {
			_, err := s.ReadAt(make([]byte, 3), 0)
			return errors.Join(err, s.Sync(), refused)
		},
	}
	for name, change := range changes {
		for _, test := range []struct {
			file  string // that is changed
			data  string // an image that becomes the data file of another
			there bool
		}{{"old", "", true}, {"old", "data", true}, {"data", "data", true}, {"new", "", false}} {
			d := newDir(t)
			var left []string // what is in the file at its end
			old := d.file("old", "OLD")
			d.file("data", "OLD")
			f := toy()
			f.Create = func(ctx context.Context, s storage.Store, opt image.CreateOptions) error {
				if test.data != "" {
					data, err := opt.NewStore(ctx, test.data)
					if err != nil {
						return err
					}
					defer data.Close()
					if test.file == test.data {
						s = data
					}
				}
				return errors.Join(change(s), change(s))
			}
			c := d.chain
			c.Formats = []image.Format{f}
			c.Journals = removedJournals{func(i storage.Info) error {
				b, err := os.ReadFile(i.URL.Path)
				if err != nil {
					t.Error(err)
				}
				left = append(left, filepath.Base(i.URL.Path)+" "+string(b))
				return refused
			}}
			path := old
			if !test.there {
				path = filepath.Join(d.path, test.file)
			}
			err := c.Create(t.Context(), path, f.Name, image.CreateOptions{})
			var want []string
			spared := strings.HasPrefix(name, "no change")
			if test.there && !spared {
				want = []string{test.file + " OLD"}
			}
			if !slices.Equal(left, want) || errors.Is(err, refused) != (want != nil || spared) {
				t.Errorf("%s of %s: journals that ended: %q, not %q; %v", name, test.file, left, want, err)
			}
			if b, err := os.ReadFile(old); err != nil || strings.TrimRight(string(b), "\x00") != "OLD" {
				t.Errorf("%s of %s: %q is left, %v", name, test.file, b, err)
			}
		}
	}
}

func TestParseSize(t *testing.T) {
	const bad, big = math.MaxUint64, math.MaxUint64 - 1
	for s, want := range map[string]uint64{
		"0": 0, "512": 512, "08": 8, "+1": 1, " 1": 1, "1b": 1, "1B": 1, "1k": 1 << 10, "1K": 1 << 10, "3M": 3 << 20, "1g": 1 << 30, "2T": 2 << 40,
		"1P": 1 << 50, "15E": 15 << 60, "1.5k": 1536, "1.k": 1024, "1.0": 1, "0x1f": 31, "0X10": 16, "0x1b": 27, "0.1M": 104857,
		"18446744073709551613": math.MaxUint64 - 2, "16E": big, "15.99999999999999999999E": big, "18446744073709551616": big, "0x10000000000000000": big, "99999999999999999999": big,
		"": bad, "k": bad, "-1": bad, "1.5": bad, ".5k": bad, "1.5.5k": bad, "1kb": bad, "1 k": bad, "1 ": bad, "0x": bad, "0x1k": bad, "0x1.8": bad,
		"1e3": bad, "inf": bad, "nan": bad, "1_000": bad, "1.+5k": bad, "1.1e1k": bad,
	} {
		n, err := image.ParseSize(s)
		switch {
		case want == bad && (err == nil || errors.Is(err, syscall.ERANGE)),
			want == big && !errors.Is(err, syscall.ERANGE),
			want < big && (err != nil || n != want):
			t.Errorf("%q: %d, %v", s, n, err)
		}
	}
}

func TestParseNumber(t *testing.T) {
	for s, want := range map[string]uint64{"0": 0, "16": 16, "0x10": 16, "010": 8, "-1": math.MaxUint64, " 7": 7, "+7": 7} {
		if n, err := image.ParseNumber(s); err != nil || n != want {
			t.Errorf("%q: %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"", "x", "1k", "1.0", "0b1", "1_0", "--1", "+-1", "18446744073709551616"} {
		if n, err := image.ParseNumber(s); err == nil {
			t.Errorf("%q: %d", s, n)
		}
	}
}
