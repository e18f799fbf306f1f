package connect

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// A shortFile takes only so much.
type shortFile struct {
	text  []byte
	left  int // bytes until writes fail, as where the process is killed; negative: they do not
	pages int // there is room for; 0: no limit
}

func (f *shortFile) WriteAt(b []byte, at int64) (n int, err error) {
	for ; n < len(b); n++ {
		if f.left == 0 {
			return n, syscall.EINTR
		}
		f.left--
		i := int(at) + n
		if f.pages > 0 && i >= f.pages*os.Getpagesize() {
			return n, syscall.ENOSPC
		}
		for len(f.text) <= i {
			f.text = append(f.text, 0)
		}
		f.text[i] = b[n]
	}
	return n, nil
}

func (f *shortFile) Truncate(size int64) error {
	if f.left == 0 {
		return syscall.EINTR
	}
	f.text = f.text[:size]
	return nil
}

// A record that could not be written to its end, since the process was killed or
// there was no room, is the one before or the new one, and the next can be written.
func TestRecordIsWhole(t *testing.T) {
	line := func(r Record) []byte {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return append(b, '\n')
	}
	record := func(pid, length int) Record {
		return Record{Backend: "imgnbd:A", PID: pid, Image: strings.Repeat("x", length), Connections: 1}
	}
	write := func(f *shortFile, r Record) error { return overwrite(f, int64(len(f.text)), line(r)) }
	for _, lengths := range [][2]int{{10, 10}, {10, 200}, {200, 10}, {200, 201}, {201, 200}} {
		t.Run(fmt.Sprint(lengths), func(t *testing.T) {
			old, new := record(1111, lengths[0]), record(2222, lengths[1])
			read := func(f *shortFile) string {
				r, err := parseRecord(f.text)
				if err != nil {
					t.Fatalf("%v: %q", err, f.text)
				}
				return string(line(r))
			}
			for n := 0; ; n++ {
				f := &shortFile{text: line(old), left: n}
				err := write(f, new)
				if got := read(f); got != string(line(new)) && (err == nil || got != string(line(old))) {
					t.Fatalf("after %d bytes, %v: %q", n, err, f.text)
				}
				f.left = -1
				if again := write(f, old); again != nil || string(f.text) != string(line(old)) {
					t.Fatalf("after %d bytes: %v, %q", n, again, f.text)
				}
				if err == nil {
					break
				}
			}
		})
	}
	page := os.Getpagesize()
	for _, test := range []struct {
		old, new, pages int
		fits            bool
	}{
		{10, 20, 1, true},
		{10, page - 200, 1, true},
		{page - 200, 10, 1, true},
		{page - 200, page, 1, false},
		{page - 200, page, 3, true},
		{page, page - 200, 2, true},
		{10, 3 * page, 3, false},
	} {
		f := &shortFile{text: line(record(1111, test.old)), left: -1, pages: test.pages}
		err := write(f, record(2222, test.new))
		want := record(1111, test.old)
		if test.fits {
			want = record(2222, test.new)
		}
		if (err == nil) != test.fits || string(f.text) != string(line(want)) {
			t.Errorf("%+v: %v, %d bytes", test, err, len(f.text))
		}
	}
}
