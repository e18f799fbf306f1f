package image_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// toy is a format that does nothing but name others:
//
//	TOY
//	backing=NAME
//	format=FORMAT
//	data=NAME
//
// Its disk is the last image or data file of what it names, else itself.
func toy() image.Format {
	return image.Format{
		Name: "toy",
		Probe: func(r io.ReaderAt, _ int64) bool {
			var b [4]byte
			r.ReadAt(b[:], 0)
			return string(b[:]) == "TOY\n"
		},
		Open:    openToy,
		Inspect: inspectToy,
		Create: func(_ context.Context, s storage.Store, opt image.CreateOptions) error {
			text := "TOY\n"
			for _, p := range opt.Params {
				text += p.Key + "=" + p.Value + "\n"
			}
			return s.WriteAt([]byte(text), 0, 0)
		},
		Grows: true,
	}
}

func readToy(s storage.Store) (map[string]string, error) {
	size, err := s.Size()
	if err != nil {
		return nil, err
	}
	keys := make(map[string]string)
	sc := bufio.NewScanner(io.NewSectionReader(s, 0, size))
	for sc.Scan() {
		k, v, _ := strings.Cut(sc.Text(), "=")
		keys[k] = v
	}
	if _, ok := keys["TOY"]; !ok {
		return nil, image.ErrWrongFormat
	}
	return keys, sc.Err()
}

func inspectToy(_ context.Context, s storage.Store, _ []image.Param) (*image.Inspection, error) {
	keys, err := readToy(s)
	if err != nil {
		return nil, err
	}
	return &image.Inspection{Format: "toy", BackingName: keys["backing"], BackingFormat: keys["format"], DataFile: keys["data"]}, nil
}

type toyDisk struct {
	image.Device
	store storage.Store
}

func (d *toyDisk) Close() error { return errors.Join(d.Device.Close(), d.store.Close()) }

func openToy(ctx context.Context, s storage.Store, opt image.Options) (image.Device, error) {
	keys, err := readToy(s)
	if err != nil {
		return nil, err
	}
	ref := image.Reference{Name: keys["data"], From: s}
	for _, p := range opt.Params {
		if p.Key != "data-file" {
			return nil, fmt.Errorf("toy: unknown option %s", p.Key)
		}
		ref = image.Reference{Name: p.Value}
	}
	switch {
	case ref.Name != "":
		data, err := opt.Refs.OpenStore(ctx, ref, !opt.ReadOnly)
		if err != nil {
			return nil, err
		}
		d, err := raw.Open(data, image.Options{ReadOnly: opt.ReadOnly})
		if err != nil {
			return nil, errors.Join(err, data.Close())
		}
		return &toyDisk{d, s}, nil
	case keys["backing"] != "":
		d, err := opt.Refs.OpenImage(ctx, image.Reference{Name: keys["backing"], Format: keys["format"], From: s})
		if err != nil {
			return nil, err
		}
		return &toyDisk{d, s}, nil
	}
	return raw.Open(s, opt)
}

// A dir is a directory of images.
type dir struct {
	*testing.T
	path  string
	chain image.Chain
	warns []string
}

func newDir(t *testing.T) *dir {
	d := &dir{T: t, path: t.TempDir()}
	d.chain = image.Chain{
		Formats:   []image.Format{toy(), raw.Format()},
		Protocols: []storage.Protocol{file.Protocol()},
		Warn:      func(s string) { d.warns = append(d.warns, s) },
	}
	before := openFiles(t)
	t.Cleanup(func() {
		if after := openFiles(t); after != before {
			t.Errorf("%d files are open, and were %d", after, before)
		}
	})
	return d
}

func openFiles(t *testing.T) int {
	if runtime.GOOS != "linux" {
		return 0
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// file makes a file, and directories above it, and returns its path.
func (d *dir) file(name, content string) string {
	d.Helper()
	path := filepath.Join(d.path, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		d.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		d.Fatal(err)
	}
	return path
}

func (d *dir) link(to, name string) {
	d.Helper()
	if err := os.Symlink(to, filepath.Join(d.path, name)); err != nil {
		d.Fatal(err)
	}
}

// read opens an image read-only and returns how it begins.
func (d *dir) read(name string) (string, error) {
	d.Helper()
	dev, err := d.chain.Open(d.Context(), filepath.Join(d.path, name), image.OpenOptions{ReadOnly: true})
	if err != nil {
		return "", err
	}
	defer dev.Close()
	p := make([]byte, 4)
	if _, err := dev.ReadAt(p, 0); err != nil {
		d.Error(err)
	}
	return string(p), nil
}

// wants reads an image and checks what comes of it: how the disk begins, or
// what the error says.
func (d *dir) wants(name, begin, says string) {
	d.Helper()
	got, err := d.read(name)
	switch {
	case says == "" && (err != nil || got != begin):
		d.Errorf("%s: %q, %v; not %q", name, got, err, begin)
	case says != "" && (err == nil || !strings.Contains(err.Error(), says)):
		d.Errorf("%s: %q, %v; without %q", name, got, err, says)
	}
}

func TestBackingNames(t *testing.T) {
	d := newDir(t)
	d.file("base", "BASE")
	d.file("sub/base", "SUB!")
	d.file("a:b", "COLN")
	abs := filepath.Join(d.path, "base")
	for i, tt := range []struct{ name, begin, says string }{
		{"base", "BASE", ""},
		{"./base", "BASE", ""},
		{"sub/base", "SUB!", ""},
		{"sub/../base", "BASE", ""},
		{abs, "BASE", ""},
		{"file:" + abs, "BASE", ""},
		{"./a:b", "COLN", ""},
		{"a:b", "", "Unknown protocol 'a'"},
		{"fat:/x", "", "Unknown protocol 'fat'"},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"` + abs + `"}}`, "BASE", ""},
		{`json:{"driver":"raw","size":512,"file.filename":"` + abs + `"}`, "BASE", ""},
		{`json:{"driver":"raw","junk":512,"file.filename":"` + abs + `"}`, "", "does not support the option 'junk'"},
		{`json:{"driver":"toy","file.filename":"` + abs + `"}`, "", "says that it is toy, but raw"},
		{"absent", "", "no such file"},
		{"sub", "", "is a directory"},
	} {
		if strings.Contains(tt.name, ":") && !strings.Contains(tt.says, "does not support") {
			d.chain.Policy.Remote = true // to get as far as to ask for the protocol
		}
		top := fmt.Sprintf("top%d", i)
		d.file(top, "TOY\nbacking="+tt.name+"\nformat=raw\n")
		d.wants(top, tt.begin, tt.says)
	}
	// Seen through a link, an image has the neighbours of the link, as in QEMU.
	d.file("far/base", "FAR!")
	d.file("far/top", "TOY\nbacking=base\nformat=raw\n")
	d.link("far/top", "link")
	d.wants("link", "BASE", "")
	d.wants("far/top", "FAR!", "")
}

// Who does not trust an image does not ask it for its format.
func TestUntrusted(t *testing.T) {
	d := newDir(t)
	d.file("top", "TOY\n")
	d.chain.Policy.Untrusted = true
	_, err := d.read("top")
	if hint, ok := errors.AsType[*image.Hint](err); !ok || !strings.Contains(hint.Advice, "-f raw") {
		t.Errorf("%v", err)
	}
	for _, format := range []string{"toy", "raw"} {
		dev, err := d.chain.Open(t.Context(), filepath.Join(d.path, "top"), image.OpenOptions{Format: format, ReadOnly: true})
		if err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		dev.Close()
	}
}

func TestUndeclaredFormat(t *testing.T) {
	d := newDir(t)
	d.file("raw", "BASE")
	d.file("toy", "TOY\nbacking=raw\nformat=raw\n")
	d.file("good", "TOY\nbacking=toy\n")
	d.wants("good", "BASE", "")
	if len(d.warns) != 1 || !strings.Contains(d.warns[0], "recognised as toy") {
		t.Errorf("warnings %q", d.warns)
	}
	d.file("bad", "TOY\nbacking=raw\n")
	_, err := d.read("bad")
	hint, ok := errors.AsType[*image.Hint](err)
	if !errors.Is(err, image.ErrReference) || !ok || !strings.Contains(hint.Advice, "rebase -u -F raw") {
		t.Errorf("a backing image that may be raw: %v", err)
	}
	// json: may say what the image does not.
	d.file("said", `TOY
backing=json:{"driver":"raw","file.filename":"`+filepath.Join(d.path, "raw")+`"}
`)
	d.wants("said", "BASE", "")
}

func TestLoops(t *testing.T) {
	d := newDir(t)
	d.file("self", "TOY\nbacking=self\nformat=toy\n")
	d.file("a", "TOY\nbacking=b\nformat=toy\n")
	d.file("b", "TOY\nbacking=sub/../link\nformat=toy\n")
	d.file("sub/x", "")
	d.link("a", "link")
	d.file("c", "TOY\nbacking=a\nformat=toy\n")
	d.file("data", "TOY\ndata=hard\n")
	if err := os.Link(filepath.Join(d.path, "data"), filepath.Join(d.path, "hard")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"self", "a", "b", "link", "c", "data"} {
		_, err := d.read(name)
		if !errors.Is(err, image.ErrReference) || !strings.Contains(err.Error(), "loop") {
			t.Errorf("%s: %v", name, err)
		}
		// The lock of the image that is open for writing must not hide it.
		_, err = d.chain.Open(t.Context(), filepath.Join(d.path, name), image.OpenOptions{})
		if !errors.Is(err, image.ErrReference) || !strings.Contains(err.Error(), "loop") {
			t.Errorf("%s for writing: %v", name, err)
		}
		if name == "data" {
			continue
		}
		if _, err := d.chain.InspectChain(t.Context(), filepath.Join(d.path, name), image.OpenOptions{}); !errors.Is(err, image.ErrReference) {
			t.Errorf("%s inspected: %v", name, err)
		}
	}
	_, err := d.read("a")
	for _, name := range []string{"link", "b names it"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%q does not tell %q", err, name)
		}
	}
}

func TestDepth(t *testing.T) {
	d := newDir(t)
	d.file("0", "BASE")
	d.file("1", "TOY\nbacking=0\nformat=raw\n")
	for i := 2; i <= 201; i++ {
		d.file(fmt.Sprint(i), fmt.Sprintf("TOY\nbacking=%d\nformat=toy\n", i-1))
	}
	d.wants("200", "BASE", "")
	d.wants("201", "", "more than 200 images")
	d.chain.MaxDepth = 3
	d.wants("3", "BASE", "")
	d.wants("4", "", "more than 3 images")
}

func TestPolicy(t *testing.T) {
	d := newDir(t)
	d.file("in/base", "BASE")
	d.file("in/sub/base", "DEEP")
	d.file("out/base", "OUT!")
	d.file("inner/base", "NEAR") // its path begins as that of in
	d.link("base", "in/good")
	d.link("../out/base", "in/escape")
	d.link("../out", "in/outdir")
	d.link(filepath.Join(d.path, "in/base"), "in/abs")
	d.link(filepath.Join(d.path, "out/base"), "in/absout")
	d.link("../in/base", "out/back")
	d.link("in", "alias")
	if err := syscall.Mkfifo(filepath.Join(d.path, "in/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(d.path, "in/sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	part := func(name string) string { // without its first byte
		return `json:{"driver":"raw","file.driver":"raw","file.offset":1,"file.file.filename":"` + filepath.Join(d.path, name) + `"}`
	}
	const refused = "refused by policy"
	for _, tt := range []struct {
		name                string
		any, sameDir, inDir string // how it begins, or what the error says
	}{
		{"base", "BASE", "BASE", "BASE"},
		{"sub/base", "DEEP", "DEEP", "DEEP"},
		{"good", "BASE", "BASE", "BASE"},
		{"abs", "BASE", "BASE", "BASE"},
		{"../in/base", "BASE", "BASE", "BASE"},
		{"../alias/base", "BASE", "BASE", "BASE"},
		{"../out/back", "BASE", "BASE", "BASE"}, // what is opened lies within
		{"../out/base", "OUT!", refused, refused},
		{"../inner/base", "NEAR", refused, refused},
		{"escape", "OUT!", refused, refused},
		{"absout", "OUT!", refused, refused},
		{"outdir/base", "OUT!", refused, refused},
		{part("in/base"), "ASE", "ASE", "ASE"},
		{part("out/back"), "ASE", "ASE", "ASE"},
		{part("in/escape"), "UT!", refused, refused},
		{part("out/base"), "UT!", refused, refused},
		{"outdir/../base", "no such file", "no such file", "no such file"}, // d.path/base
		{"fifo", "FIFO", "FIFO", "FIFO"},
		{"sock", "socket", "socket", "socket"},
		{"/dev/null", "character device", "character device", "character device"},
		{"sub", "directory", "directory", "directory"},
		{"http://localhost/x", "URL", "URL", "URL"},
		{"nbd:unix:/x", "URL", "URL", "URL"},
	} {
		for _, kind := range []string{"backing", "data"} {
			d.file("in/top", "TOY\n"+kind+"="+tt.name+"\nformat=raw\n")
			for _, p := range []struct {
				policy image.Policy
				want   string
			}{
				{image.Policy{}, tt.any},
				{image.Policy{Allow: image.AllowSameDir}, tt.sameDir},
				{image.Policy{Dir: filepath.Join(d.path, "in")}, tt.inDir},
				{image.Policy{Dir: filepath.Join(d.path, "alias")}, tt.inDir},
				{image.Policy{Allow: image.AllowNothing}, refused},
				{image.Policy{Allow: image.AllowNothing, Dir: d.path, Remote: true}, refused},
			} {
				d.chain.Policy = p.policy
				got, err := d.read("in/top")
				if err != nil {
					got = err.Error()
				}
				if !strings.Contains(got, p.want) || p.want == refused && !errors.Is(err, image.ErrReference) {
					t.Errorf("%s %s with %+v: %q, without %q", kind, tt.name, p.policy, got, p.want)
				}
			}
		}
	}
	// Two rules are both kept.
	d.file("in/top", "TOY\nbacking=sub/base\nformat=raw\n")
	for _, tt := range []struct{ dir, begin, says string }{
		{"in", "DEEP", ""}, {"in/sub", "DEEP", ""}, {"out", "", refused}, {"absent", "", "no such file"},
	} {
		d.chain.Policy = image.Policy{Allow: image.AllowSameDir, Dir: filepath.Join(d.path, tt.dir)}
		d.wants("in/top", tt.begin, tt.says)
	}
}

// What the user says with a parameter is not subject to the policy; what an
// image says by way of one is.
func TestParameterReference(t *testing.T) {
	d := newDir(t)
	data := d.file("out/data", "DATA")
	d.file("in/toy", "TOY\n")
	d.file("in/top", `TOY
backing=json:{"driver":"toy","data-file":"`+data+`","file.filename":"`+filepath.Join(d.path, "in/toy")+`"}
`)
	d.chain.Policy.Allow = image.AllowSameDir
	dev, err := d.chain.Open(t.Context(), filepath.Join(d.path, "in/toy"), image.OpenOptions{Params: []image.Param{{Key: "data-file", Value: data}}})
	if err != nil {
		t.Errorf("named by the user: %v", err)
	} else if err := dev.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.read("in/top"); !errors.Is(err, image.ErrReference) {
		t.Errorf("named by the image: %v", err)
	}
}

// What is said of a data file beyond which file it is holds, or is refused: it is
// read and written as it is.
func TestDataFileAsItIs(t *testing.T) {
	d := newDir(t)
	path := d.file("data", "DATA")
	for _, tt := range []struct{ options, reading, writing string }{
		{``, "", ""},
		{`"driver":"raw",`, "", ""},
		{`"driver":"raw","offset":512,`, "no option 'offset'", "no option 'offset'"},
		{`"driver":"toy",`, "format toy", "format toy"},
		{`"read-only":true,`, "", "read-only"},
		{`"file.read-only":true,`, "", "read-only"},
		{`"file.locking":"off",`, "", "only be used with read-only images"},
		{`"force-share":true,`, "", "only be used with read-only images"},
	} {
		d.file("top", "TOY\ndata=json:{"+tt.options+`"file.filename":"`+path+"\"}\n")
		for _, readOnly := range []bool{true, false} {
			want := tt.writing
			if readOnly {
				want = tt.reading
			}
			dev, err := d.chain.Open(t.Context(), filepath.Join(d.path, "top"), image.OpenOptions{Format: "toy", ReadOnly: readOnly})
			if err == nil {
				err = dev.Close()
			}
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%s read-only %t: %v, want %q", tt.options, readOnly, err, want)
			}
		}
		name := filepath.Join(d.path, "made")
		f := toy()
		f.Create = func(ctx context.Context, s storage.Store, opt image.CreateOptions) error {
			data, err := opt.NewStore(ctx, "json:{"+tt.options+`"file.filename":"`+path+`"}`)
			if err != nil {
				return err
			}
			return data.Close()
		}
		c := d.chain
		c.Formats = []image.Format{f, raw.Format()}
		if err := c.Create(t.Context(), name, "toy", image.CreateOptions{}); (err == nil) != (tt.reading == "") {
			t.Errorf("%s made: %v", tt.options, err)
		}
	}
}

// TestDirect: who asks for direct I/O, the user or an image about the one below
// it, gets it for that image and all below.
func TestDirect(t *testing.T) {
	d := newDir(t)
	d.file("raw", strings.Repeat("x", 4096))
	d.file("middle", "TOY\nbacking=raw\nformat=raw\n")
	d.file("top", "TOY\nbacking="+`json:{"driver":"toy","file.filename":"`+filepath.Join(d.path, "middle")+`","cache.direct":true}`+"\n")
	direct := make(map[string]bool)
	open := d.chain.Protocols[0].Open
	d.chain.Protocols[0].Open = func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
		name := filepath.Base(u.Path)
		direct[name] = opt.Direct // the last one counts: the first only looks
		opt.Direct = false        // which not every file system has
		return open(ctx, u, opt)
	}
	for asked, want := range map[bool]map[string]bool{
		false: {"top": false, "middle": true, "raw": true},
		true:  {"top": true, "middle": true, "raw": true},
	} {
		dev, err := d.chain.Open(t.Context(), filepath.Join(d.path, "top"), image.OpenOptions{Format: "toy", ReadOnly: true, Direct: asked})
		if err != nil {
			t.Fatal(err)
		}
		dev.Close()
		if !maps.Equal(direct, want) {
			t.Errorf("asked for %v: %v, want %v", asked, direct, want)
		}
	}
}

func TestLocks(t *testing.T) {
	d := newDir(t)
	rawPath := d.file("raw", strings.Repeat("x", 4096))
	toyPath := d.file("toy", "TOY\n")
	over := d.file("over", "TOY\nbacking=toy\nformat=toy\n")
	open := func(path, format string, ro, noLock bool) (func(), error) {
		dev, err := d.chain.Open(t.Context(), path, image.OpenOptions{Format: format, ReadOnly: ro, NoLock: noLock})
		if err != nil {
			return nil, err
		}
		return func() {
			if err := dev.Close(); err != nil {
				t.Error(err)
			}
		}, nil
	}
	for _, tt := range []struct {
		first, second string
		fro, sro      bool
		noLock        bool
		inUse         bool
	}{
		{"raw", "raw", false, false, false, false}, // clients agree
		{"raw", "raw", true, true, false, false},
		{"raw", "raw", false, true, false, true},
		{"raw", "raw", true, false, false, true},
		{"toy", "toy", false, false, false, true},
		{"toy", "toy", true, true, false, false},
		{"toy", "toy", false, true, false, true},
		{"toy", "toy", false, true, true, false},
		{"over", "toy", false, false, false, true}, // a backing image is being read
		{"over", "toy", false, true, false, false},
		{"toy", "over", false, true, false, true},
	} {
		paths := map[string]string{"raw": rawPath, "toy": toyPath, "over": over}
		formats := map[string]string{"raw": "raw", "toy": "toy", "over": "toy"}
		closeFirst, err := open(paths[tt.first], formats[tt.first], tt.fro, false)
		if err != nil {
			t.Fatal(err)
		}
		closeSecond, err := open(paths[tt.second], formats[tt.second], tt.sro, tt.noLock)
		if errors.Is(err, image.ErrInUse) != tt.inUse || err != nil && !tt.inUse {
			t.Errorf("%+v: %v", tt, err)
		}
		if tt.sro {
			_, err := d.chain.Inspect(t.Context(), paths[tt.second], image.OpenOptions{NoLock: tt.noLock})
			if inUse := tt.inUse && tt.second == "toy"; errors.Is(err, image.ErrInUse) != inUse {
				t.Errorf("%+v inspected: %v", tt, err)
			}
		}
		if closeSecond != nil {
			closeSecond()
		}
		closeFirst()
	}
	if _, err := open(toyPath, "toy", false, true); err == nil {
		t.Error("writing without a lock is allowed")
	}
}

func TestFormats(t *testing.T) {
	d := newDir(t)
	path := d.file("toy", "TOY\n")
	for format, says := range map[string]string{"": "", "toy": "", "raw": "", "foo": "Unknown driver 'foo'"} {
		dev, err := d.chain.Open(t.Context(), path, image.OpenOptions{Format: format})
		if err == nil {
			dev.Close()
		}
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("format %q: %v", format, err)
		}
	}
	d.file("other", "text")
	if _, err := d.chain.Open(t.Context(), filepath.Join(d.path, "other"), image.OpenOptions{Format: "toy"}); !errors.Is(err, image.ErrWrongFormat) {
		t.Errorf("another format: %v", err)
	}
	d.chain.Formats = d.chain.Formats[:1]
	if _, err := d.read("other"); !errors.Is(err, image.ErrWrongFormat) {
		t.Errorf("unknown without raw: %v", err)
	}
}

func TestGuessedRaw(t *testing.T) {
	d := newDir(t)
	path := d.file("disk", strings.Repeat("x", 4096))
	open := func(opt image.OpenOptions) image.Device {
		t.Helper()
		dev, err := d.chain.Open(t.Context(), path, opt)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Close() })
		return dev
	}
	dev := open(image.OpenOptions{})
	want := "Image format was not specified for '" + path + "' and probing guessed raw.\n" +
		"         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n" +
		"         Specify the 'raw' format explicitly to remove the restrictions."
	if len(d.warns) != 1 || d.warns[0] != want {
		t.Errorf("warnings %q", d.warns)
	}
	if err := dev.WriteAt([]byte("TOY\nbacking=/etc/passwd\n"), 0, 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("a header is written into a raw image: %v", err)
	}
	if err := dev.WriteAt([]byte("TO"), 0, 0); err != nil {
		t.Error(err)
	}
	dev.Close()
	d.warns = nil
	// With an offset, the guard would look at another disk than is recognised.
	if _, err := d.chain.Open(t.Context(), path, image.OpenOptions{Params: []image.Param{{Key: "offset", Value: "512"}}}); err == nil {
		t.Error("an offset into a guess is accepted")
	}
	dev = open(image.OpenOptions{Format: "raw"})
	if err := dev.WriteAt([]byte("TOY\n"), 0, 0); err != nil {
		t.Errorf("a header is not written although the format is given: %v", err)
	}
	if err := dev.WriteAt([]byte("toy\n"), 0, 0); err != nil {
		t.Error(err)
	}
	dev.Close()
	open(image.OpenOptions{ReadOnly: true}).Close()
	if d.warns != nil {
		t.Errorf("warnings %q", d.warns)
	}
}

// A file that is exchanged while it is being opened is an error.
func TestExchanged(t *testing.T) {
	d := newDir(t)
	path := d.file("disk", strings.Repeat("x", 1000))
	d.file("base", "BASE")
	over := d.file("over", "TOY\nbacking=base\nformat=raw\n")
	var swap func()
	opens := 0
	d.chain.Protocols = []storage.Protocol{{Name: "file", Open: func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
		if filepath.Base(u.Path) != "over" {
			if opens++; opens == 2 {
				swap()
			}
		}
		return file.Open(ctx, u, opt)
	}}}
	for name, f := range map[string]func(){
		"content": func() { d.file("disk", "TOY\n") },
		"file": func() {
			if err := os.Rename(d.file("new", strings.Repeat("x", 1000)), path); err != nil {
				t.Error(err)
			}
		},
	} {
		d.file("disk", strings.Repeat("x", 1000))
		swap, opens = f, 0
		if dev, err := d.chain.Open(t.Context(), path, image.OpenOptions{}); err == nil || !strings.Contains(err.Error(), "changed") {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				dev.Close()
			}
		}
	}
	swap, opens = func() {
		if err := os.Rename(d.file("new", "NEW!"), filepath.Join(d.path, "base")); err != nil {
			t.Error(err)
		}
	}, 0
	if dev, err := d.chain.Open(t.Context(), over, image.OpenOptions{}); err == nil || !strings.Contains(err.Error(), "changed") {
		t.Errorf("backing file: %v", err)
		if err == nil {
			dev.Close()
		}
	}
}

func TestInspectChain(t *testing.T) {
	d := newDir(t)
	d.file("base", strings.Repeat("x", 100))
	d.file("sub/mid", "TOY\nbacking=../base\nformat=raw\n")
	top := d.file("top", "TOY\nbacking=sub/mid\n")
	all, err := d.chain.InspectChain(t.Context(), top, image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, in := range all {
		got = append(got, fmt.Sprintf("%s %s %q", in.Format, strings.TrimPrefix(in.Name, d.path), strings.TrimPrefix(in.Backing, d.path)))
		if in.DiskSize <= 0 {
			t.Errorf("%s takes %d bytes", in.Name, in.DiskSize)
		}
	}
	want := []string{`toy /top "/sub/mid"`, `toy /sub/mid "/sub/../base"`, `raw /sub/../base ""`}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, not %v", got, want)
	}
	// One image is inspected without opening what it names.
	if err := os.Remove(filepath.Join(d.path, "sub/mid")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.chain.Inspect(t.Context(), top, image.OpenOptions{}); err != nil {
		t.Error(err)
	}
	if all, err := d.chain.InspectChain(t.Context(), top, image.OpenOptions{}); !errors.Is(err, os.ErrNotExist) || len(all) != 1 {
		t.Errorf("%d images, %v", len(all), err)
	}
}

func TestCreate(t *testing.T) {
	d := newDir(t)
	d.file("base", "BASE")
	path := filepath.Join(d.path, "new")
	err := d.chain.Create(t.Context(), path, "toy", image.CreateOptions{Params: []image.Param{{Key: "backing", Value: "base"}, {Key: "format", Value: "raw"}}})
	if err != nil {
		t.Fatal(err)
	}
	d.wants("new", "BASE", "")
	if err := d.chain.Create(t.Context(), path, "foo", image.CreateOptions{}); err == nil {
		t.Error("an unknown format is made")
	}
	if err := d.chain.Create(t.Context(), filepath.Join(d.path, "raw"), "raw", image.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(d.path, "raw")); err != nil || fi.Size() != 1<<20 {
		t.Errorf("%v, %v", fi, err)
	}
}

// The Chain itself is an Opener, for who has no more than a store.
func TestChainIsOpener(t *testing.T) {
	d := newDir(t)
	base := d.file("base", "BASE")
	from, err := file.Open(t.Context(), &url.URL{Scheme: "file", Path: d.file("top", "x")}, storage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	var refs image.Opener = &d.chain
	dev, err := refs.OpenImage(t.Context(), image.Reference{Name: "base", Format: "raw", From: from})
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	if _, err := refs.OpenImage(t.Context(), image.Reference{Name: "top", Format: "raw", From: from}); !errors.Is(err, image.ErrReference) {
		t.Errorf("an image that names itself: %v", err)
	}
	s, err := refs.OpenStore(t.Context(), image.Reference{Name: base, From: from}, true)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := refs.OpenImage(t.Context(), image.Reference{Name: "x", From: storagetest.NewMem(1)}); !errors.Is(err, image.ErrReference) {
		t.Errorf("beside what has no place: %v", err)
	}
	var deny image.Opener = image.DenyReferences{}
	if _, err := deny.OpenImage(t.Context(), image.Reference{Name: base, From: from}); !errors.Is(err, image.ErrReference) {
		t.Errorf("DenyReferences: %v", err)
	}
	if _, err := deny.OpenStore(t.Context(), image.Reference{Name: base, From: from}, false); !errors.Is(err, image.ErrReference) {
		t.Errorf("DenyReferences: %v", err)
	}
}
