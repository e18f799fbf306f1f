package image_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// recorder writes down what it is asked for. The conformance suite is run on
// all wrappers in package raw; here it is what they ask for.
type recorder struct {
	image.Device
	calls []string
	err   error
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	d, err := raw.Open(storagetest.NewMem(1<<20), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &recorder{Device: d}
}

func (r *recorder) note(format string, args ...any) error {
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
	return r.err
}

func (r *recorder) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	return r.note("write %d+%d %d", off, len(p), flags)
}

func (r *recorder) WriteZeroes(off, n int64, flags image.WriteFlags) error {
	return r.note("zero %d+%d %d", off, n, flags)
}

func (r *recorder) Discard(off, n int64) error { return r.note("discard %d+%d", off, n) }
func (r *recorder) Flush() error               { return r.note("flush") }

func TestWrappersAskFor(t *testing.T) {
	data := []byte("data")
	for _, tt := range []struct {
		name string
		wrap func(image.Device) image.Device
		do   func(image.Device) error
		want []string
	}{
		{"IgnoreDiscard discards", image.IgnoreDiscard,
			func(d image.Device) error { return d.Discard(512, 1024) }, []string{"discard 512+0"}},
		{"IgnoreDiscard zeroes", image.IgnoreDiscard,
			func(d image.Device) error { return d.WriteZeroes(0, 512, image.MayUnmap|image.FUA) }, []string{"zero 0+512 1"}},
		{"IgnoreDiscard past the end", image.IgnoreDiscard,
			func(d image.Device) error { return want(d.Discard(1<<20, 1), image.ErrOutOfRange) }, nil},
		{"DetectZeroes data", func(d image.Device) image.Device { return image.DetectZeroes(d, true) },
			func(d image.Device) error { return d.WriteAt(data, 0, image.FUA) }, []string{"write 0+4 1"}},
		{"DetectZeroes", func(d image.Device) image.Device { return image.DetectZeroes(d, false) },
			func(d image.Device) error { return d.WriteAt(make([]byte, 100_000), 0, image.FUA) }, []string{"zero 0+100000 1"}},
		{"DetectZeroes unmap", func(d image.Device) image.Device { return image.DetectZeroes(d, true) },
			func(d image.Device) error { return d.WriteAt(make([]byte, 512), 0, 0) }, []string{"zero 0+512 2"}},
		{"DetectZeroes almost", func(d image.Device) image.Device { return image.DetectZeroes(d, true) },
			func(d image.Device) error { p := make([]byte, 200_000); p[150_001] = 1; return d.WriteAt(p, 0, 0) }, []string{"write 0+200000 0"}},
		{"DetectZeroes of nothing", func(d image.Device) image.Device { return image.DetectZeroes(d, true) },
			func(d image.Device) error { return d.WriteAt(nil, 0, 0) }, []string{"write 0+0 0"}},
		{"WriteThrough writes", image.WriteThrough,
			func(d image.Device) error { return d.WriteAt(data, 0, 0) }, []string{"write 0+4 1"}},
		{"WriteThrough zeroes", image.WriteThrough,
			func(d image.Device) error { return d.WriteZeroes(0, 512, image.FastOnly) }, []string{"zero 0+512 5"}},
		{"WriteThrough discards", image.WriteThrough,
			func(d image.Device) error { return d.Discard(0, 512) }, []string{"discard 0+512", "flush"}},
		{"Unsafe writes", image.Unsafe,
			func(d image.Device) error { return d.WriteAt(data, 0, image.FUA) }, []string{"write 0+4 0"}},
		{"Unsafe zeroes", image.Unsafe,
			func(d image.Device) error { return d.WriteZeroes(0, 512, image.FUA|image.MayUnmap) }, []string{"zero 0+512 2"}},
		{"Unsafe flushes", image.Unsafe, func(d image.Device) error { return d.Flush() }, nil},
		{"ReadOnly", image.ReadOnly, func(d image.Device) error {
			return errors.Join(want(d.WriteAt(data, 0, 0), image.ErrReadOnly), want(d.WriteZeroes(0, 1, 0), image.ErrReadOnly), want(d.Discard(0, 1), image.ErrReadOnly))
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRecorder(t)
			if err := tt.do(tt.wrap(r)); err != nil {
				t.Error(err)
			}
			if !slices.Equal(r.calls, tt.want) {
				t.Errorf("asks for %q, not %q", r.calls, tt.want)
			}
		})
	}
}

func want(err, target error) error {
	if !errors.Is(err, target) {
		return fmt.Errorf("%v, not %v", err, target)
	}
	return nil
}

// A device that cannot zero gets the zeros as data.
func TestDetectZeroesFallsBack(t *testing.T) {
	r := newRecorder(t)
	r.err = errors.ErrUnsupported
	image.DetectZeroes(r, false).WriteAt(make([]byte, 512), 0, image.FUA)
	if !slices.Equal(r.calls, []string{"zero 0+512 1", "write 0+512 1"}) {
		t.Errorf("asks for %q", r.calls)
	}
}

func TestAsSeesNoWrapper(t *testing.T) {
	r := newRecorder(t)
	if _, ok := image.As[*recorder](r); !ok {
		t.Error("a device is not what it is")
	}
	if _, ok := image.As[*recorder](image.ReadOnly(r)); ok {
		t.Error("As looks through a wrapper")
	}
}

func TestZeroByWriting(t *testing.T) {
	r := newRecorder(t)
	if err := image.ZeroByWriting(r, 100, 150_000, image.FUA|image.MayUnmap); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.calls, []string{"write 100+65536 1", "write 65636+65536 1", "write 131172+18928 1"}) {
		t.Errorf("asks for %q", r.calls)
	}
	if err := image.ZeroByWriting(r, 0, 1, image.FastOnly); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("fast: %v", err)
	}
}

func TestCheckRange(t *testing.T) {
	const most = 1<<63 - 1
	for _, tt := range []struct {
		size, off, n int64
		ok           bool
	}{
		{10, 0, 10, true}, {10, 10, 0, true}, {10, 9, 1, true}, {10, 9, 2, false}, {10, 11, 0, false}, {10, -1, 1, false},
		{10, 0, -1, false}, {10, most, most, false}, {10, 1, most, false}, {most, most, 0, true}, {most, 1, most, false}, {0, 0, 0, true}, {0, 0, 1, false},
	} {
		if err := image.CheckRange(tt.size, tt.off, tt.n); (err == nil) != tt.ok {
			t.Errorf("CheckRange(%d, %d, %d) = %v", tt.size, tt.off, tt.n, err)
		}
	}
}

// scripted answers AppendExtents with what it is told.
type scripted struct {
	image.Device
	answers [][]image.Extent
	err     error
}

func (s *scripted) AppendExtents(dst []image.Extent, _, _ int64, _ image.Want) ([]image.Extent, error) {
	if len(s.answers) == 0 {
		return dst, s.err
	}
	a := s.answers[0]
	s.answers = s.answers[1:]
	return append(dst, a...), nil
}

func TestExtents(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name    string
		answers [][]image.Extent
		yields  int
		fails   bool
	}{
		{"prefixes", [][]image.Extent{{{Offset: 10, Length: 5}}, {{Offset: 15, Length: 3}, {Offset: 18, Length: 2}}}, 3, false},
		{"error in the middle", [][]image.Extent{{{Offset: 10, Length: 5}}}, 1, true},
		{"nothing", [][]image.Extent{{}}, 0, true},
		{"no progress", [][]image.Extent{{{Offset: 10, Length: 0}}}, 0, true},
		{"too long", [][]image.Extent{{{Offset: 10, Length: 11}}}, 0, true},
		{"elsewhere", [][]image.Extent{{{Offset: 9, Length: 1}}}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, failed := 0, false
			for _, err := range image.Extents(&scripted{answers: tt.answers, err: boom}, 10, 10, image.WantZero) {
				if failed {
					t.Error("something follows an error")
				}
				if err != nil {
					failed = true
				} else {
					n++
				}
			}
			if n != tt.yields || failed != tt.fails {
				t.Errorf("%d extents, failed %v; not %d, %v", n, failed, tt.yields, tt.fails)
			}
		})
	}
	for range image.Extents(newRecorder(t), 0, 1<<20, image.WantZero) {
		break // leaving early is allowed
	}
	for range image.Extents(newRecorder(t), 0, 0, 0) {
		t.Error("nothing has an extent")
	}
}

func TestWrapOnce(t *testing.T) {
	if image.Wrap("open", "a", nil) != nil {
		t.Error("no error becomes one")
	}
	inner := image.Wrap("read", "base", errors.New("boom"))
	if got := image.Wrap("open", "top", fmt.Errorf("backing: %w", inner)).Error(); got != "backing: read base: boom" {
		t.Errorf("%q", got)
	}
}
