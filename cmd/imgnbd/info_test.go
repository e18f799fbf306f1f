package main

import (
	"encoding/binary"
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// gallery makes images of all kinds in the current folder.
func gallery(t *testing.T) {
	t.Helper()
	workplace(t)
	create := func(args ...string) { qemu.Img(t, append([]string{"create", "-q", "-f", "qcow2"}, args...)...) }
	create("-o", "compat=0.10", "v2.qcow2", "4M")
	create("-o", "cluster_size=512,refcount_bits=1", "small.qcow2", "4M")
	create("-o", "cluster_size=2M,refcount_bits=64,lazy_refcounts=on", "large.qcow2", "4M")
	create("-o", "extended_l2=on,compression_type=zstd", "modern.qcow2", "4M")
	create("-o", "preallocation=metadata", "meta.qcow2", "4M")
	create("-o", "data_file=data.raw", "external.qcow2", "4M")
	create("-o", "data_file=data2.raw,data_file_raw=on", "external-raw.qcow2", "4M")
	create("empty.qcow2", "0")
	create("odd.qcow2", "1000")
	create("huge.qcow2", "1P")
	create("base.qcow2", "10M")
	qemu.IO(t, "qcow2", "base.qcow2", "write 0 1M", "write 3M 100k")
	create("-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2")
	create("-b", "overlay.qcow2", "-F", "qcow2", "-o", "cluster_size=4k", "dir/../top.qcow2", "20M")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", "dir/overlay.qcow2")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "on-raw.qcow2")
	create("snapshots.qcow2", "4M")
	qemu.Img(t, "snapshot", "-c", "first", "snapshots.qcow2")
	qemu.IO(t, "qcow2", "snapshots.qcow2", "write 0 64k")
	qemu.Img(t, "snapshot", "-c", "a name that is longer than its column", "snapshots.qcow2")
	create("bitmaps.qcow2", "4M")
	qemu.Img(t, "bitmap", "--add", "bitmaps.qcow2", "b0")
	qemu.Img(t, "bitmap", "--add", "-g", "4096", "--disable", "bitmaps.qcow2", "b1")
	qemu.Img(t, "convert", "-c", "-O", "qcow2", "base.qcow2", "compressed.qcow2")

	patch := func(name string, off int64, b ...byte) {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, "base.qcow2", "corrupt-bit.qcow2")
	patch("corrupt-bit.qcow2", 79, 2) // incompatible features: corrupt
	copyFile(t, "base.qcow2", "dirty.qcow2")
	patch("dirty.qcow2", 79, 1)

	// Refcounts that are wrong: base.qcow2 has one block of them.
	header, err := os.ReadFile("base.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	table := int64(binary.BigEndian.Uint64(header[48:]))
	block := int64(binary.BigEndian.Uint64(header[table:]))
	clusters := int64(len(header)) / 65536
	copyFile(t, "base.qcow2", "leaks.qcow2")
	patch("leaks.qcow2", block+2*clusters, 0, 1)
	if err := os.Truncate("leaks.qcow2", (clusters+1)*65536); err != nil {
		t.Fatal(err)
	}
	copyFile(t, "base.qcow2", "wrong.qcow2")
	patch("wrong.qcow2", block+2*5, 0, 0, 0, 5)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sameAsImg compares a command with qemu-img's, with its name replaced.
func sameAsImg(t *testing.T, args ...string) {
	t.Helper()
	want := theirs(t, append([]string{"qemu-img"}, args...)...)
	want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "imgnbd: ")
	got := ours(append([]string{"imgnbd"}, args...)...)
	got.Stderr = hintLine.ReplaceAllString(got.Stderr, "")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%q, - qemu-img, + ours:\n%s", args, diff)
	}
}

// info prints what qemu-img prints, to the byte.
func TestInfoSameAsQEMUImg(t *testing.T) {
	gallery(t)
	for _, name := range []string{
		"disk.raw", "disk.qcow2", "v2.qcow2", "small.qcow2", "large.qcow2", "modern.qcow2", "meta.qcow2", "external.qcow2",
		"external-raw.qcow2", "empty.qcow2", "odd.qcow2", "huge.qcow2", "base.qcow2", "overlay.qcow2", "top.qcow2",
		"dir/overlay.qcow2", "on-raw.qcow2", "snapshots.qcow2", "bitmaps.qcow2", "compressed.qcow2", "corrupt-bit.qcow2",
		"dirty.qcow2", "./disk.qcow2", "nonexistent",
	} {
		for _, options := range [][]string{nil, {"--output=json"}, {"--backing-chain"}, {"--backing-chain", "--output=json"}, {"-U"}} {
			sameAsImg(t, append(append([]string{"info"}, options...), name)...)
		}
	}
	for _, name := range []string{"\u00e4\u2028\u4e2d\U0001d11e.raw", "\x1b[2J\x7f\u009b\t\"\\u00e4\\.raw", "a\n<&>.raw"} {
		copyFile(t, "disk.raw", name)
		sameAsImg(t, "info", "--output=json", "-f", "raw", name)
	}
	sameAsImg(t, "info", "-f", "raw", "disk.qcow2")
	sameAsImg(t, "info", "-f", "foo", "disk.qcow2")
	sameAsImg(t, "info", "-f", "qcow2", "disk.raw")
	sameAsImg(t, "info", "--image-opts", "driver=qcow2,file.filename=overlay.qcow2")
	sameAsImg(t, "info", "--output=json", "--image-opts", "driver=qcow2,file.filename=base.qcow2")
}

// Of a part of a file info prints what qemu-img does, but for the name: the size
// of the disk is that of the part, what it takes that of the file.
func TestInfoOfPart(t *testing.T) {
	workplace(t)
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-o", "preallocation=full", "inner.qcow2", "1M")
	inner, err := os.ReadFile("inner.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create("archive")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(8 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(inner, 4<<20); err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`(?m)^(image:|    "filename":) .*\n`)
	for _, name := range []string{
		`json:{"driver":"qcow2","file":{"driver":"raw","offset":4194304,"file":{"driver":"file","filename":"archive"}}}`,
		`json:{"driver":"raw","file":{"driver":"raw","offset":4194304,"size":1048576,"file":{"driver":"file","filename":"archive"}}}`,
		`json:{"driver":"raw","offset":4194304,"size":1048576,"file":{"driver":"file","filename":"archive"}}`,
		`json:{"driver":"raw","offset":16777216,"file":{"driver":"file","filename":"archive"}}`,
		`json:{"driver":"raw","offst":4194304,"file":{"driver":"file","filename":"archive"}}`,
		`json:{"driver":"qcow2","offset":4194304,"file":{"driver":"file","filename":"inner.qcow2"}}`,
		`json:{"driver":"qcow2","l2-cache-size":"2M","cache-size":"1M","file":{"driver":"file","filename":"inner.qcow2"}}`,
	} {
		for _, output := range []string{"human", "json"} {
			args := []string{"info", "--output=" + output, name}
			want := theirs(t, append([]string{"qemu-img"}, args...)...)
			want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "imgnbd: ")
			got := ours(append([]string{"imgnbd"}, args...)...)
			got.Stderr = hintLine.ReplaceAllString(got.Stderr, "")
			for _, o := range []*outcome{&want, &got} {
				o.Stdout = named.ReplaceAllString(o.Stdout, "")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q, - qemu-img, + ours:\n%s", args, diff)
			}
		}
	}
}

// check prints what qemu-img prints, and ends with its status.
func TestCheckSameAsQEMUImg(t *testing.T) {
	gallery(t)
	for _, name := range []string{
		"disk.raw", "disk.qcow2", "v2.qcow2", "small.qcow2", "large.qcow2", "modern.qcow2", "meta.qcow2", "external.qcow2",
		"external-raw.qcow2", "empty.qcow2", "base.qcow2", "overlay.qcow2", "snapshots.qcow2", "bitmaps.qcow2",
		"compressed.qcow2", "leaks.qcow2", "wrong.qcow2", "nonexistent",
	} {
		for _, options := range [][]string{nil, {"--output=json"}, {"-q"}, {"-q", "--output=json"}, {"-U"}} {
			sameAsImg(t, append(append([]string{"check"}, options...), name)...)
		}
	}
}

// What cannot be read has not been checked, whatever it is; of an encrypted image
// the structure is in the clear.
func TestCheckDifferences(t *testing.T) {
	workplace(t)
	qemu.Img(t, "create", "-q", "-f", "vmdk", "disk.vmdk", "4M")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s", "secret.qcow2", "4M")
	for args, want := range map[string]outcome{
		"disk.vmdk":                {Code: 1, Stderr: "imgnbd: Could not open 'disk.vmdk': it is a VMDK image"},
		"-r leaks disk.vmdk":       {Code: 1, Stderr: "imgnbd: Could not open 'disk.vmdk': it is a VMDK image"},
		"-f vmdk disk.qcow2":       {Code: 1, Stderr: "imgnbd: Could not open 'disk.qcow2': Image is not in vmdk format\n"},
		"-r leaks -f vdi disk.raw": {Code: 1, Stderr: "imgnbd: Could not open 'disk.raw': Image is not in vdi format\n"},
		"-f raw disk.vmdk":         {Code: exitUnsupported, Stderr: "imgnbd: This image format does not support checks\n"},
		"secret.qcow2":             {Stdout: "No errors were found on the image.\n"},
	} {
		got := ours(append([]string{"imgnbd", "check"}, strings.Fields(args)...)...)
		if got.Code != want.Code || !strings.HasPrefix(got.Stderr, want.Stderr) || !strings.HasPrefix(got.Stdout, want.Stdout) {
			t.Errorf("%s: %+v", args, got)
		}
	}
	if got, want := ours("imgnbd", "-r", "-k", t.TempDir()+"/s", "-f", "vmdk", "disk.qcow2"), "Image is not in vmdk format\n"; got.Code != 1 || !strings.HasSuffix(got.Stderr, want) {
		t.Errorf("%+v", got)
	}
}

// What else docs/compat.md has of info, check and create.
func TestOtherWords(t *testing.T) {
	workplace(t)
	for args, want := range map[string]string{
		"info json:{a":                          "imgnbd: Could not open 'json:{a': Could not parse the JSON options: ",
		"--object {a disk.raw":                  "imgnbd: JSON parse error, ",
		"info --object secret,id=s disk.qcow2":  "imgnbd: unrecognized option '--object'\n",
		"check --object secret,id=s disk.qcow2": "imgnbd: unrecognized option '--object'\n",
		"check -T none disk.qcow2":              "imgnbd: invalid option -- 'T'\n",
		"create --object secret,id=s c 1M":      "imgnbd: unrecognized option '--object'\n",
		"create c:d 1M":                         "imgnbd: c:d: ",
	} {
		o := ours(append([]string{"imgnbd"}, strings.Fields(args)...)...)
		if o.Code != 1 || !strings.HasPrefix(o.Stderr, want) {
			t.Errorf("%s: %+v", args, o)
		}
	}
	qemu.Img(t, "create", "-q", "-f", "parallels", "disk.hdd", "4M")
	if o := ours("imgnbd", "info", "--output=json", "disk.hdd"); o.Code != 0 || !strings.Contains(o.Stdout, `"dirty-flag": false`) {
		t.Errorf("%+v", o)
	}
}

// What is in an image that no version of this program can open is shown all
// the same: here a feature that nobody knows.
func TestInfoOfWhatCannotBeServed(t *testing.T) {
	workplace(t)
	f, err := os.OpenFile("disk.qcow2", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0x80}, 72); err != nil { // incompatible feature 63
		t.Fatal(err)
	}
	o := ours("imgnbd", "info", "disk.qcow2")
	if o.Code != 0 || !strings.Contains(o.Stdout, "virtual size: 64 MiB (67108864 bytes)\n") ||
		!strings.HasPrefix(o.Stderr, "imgnbd: warning: disk.qcow2 cannot be opened: ") {
		t.Errorf("%+v", o)
	}
	if o := ours("imgnbd", "-r", "--run", "true", "disk.qcow2"); o.Code != 1 || !strings.Contains(o.Stderr, "Unsupported qcow2 feature(s)") {
		t.Errorf("%+v", o)
	}
}

// Of a header that is not whole nothing is known but its format.
func TestInfoOfHalfAHeader(t *testing.T) {
	workplace(t)
	if err := os.Truncate("disk.qcow2", 50); err != nil {
		t.Fatal(err)
	}
	if o := ours("imgnbd", "info", "disk.qcow2"); o.Code != 0 || !strings.Contains(o.Stdout, "\nvirtual size: unknown\n") {
		t.Errorf("%+v", o)
	}
	if o := ours("imgnbd", "info", "--output=json", "disk.qcow2"); o.Code != 0 || strings.Contains(o.Stdout, "virtual-size") {
		t.Errorf("%+v", o)
	}
}

// No name in an image steers a terminal or fakes a line.
func TestInfoIsPrintable(t *testing.T) {
	workplace(t)
	const name = "\x1b[2J\nimgnbd, no \u00fcber \u009b.raw"
	const shown = "'\ufffd[2J\ufffdimgnbd, no \u00fcber \ufffd.raw'"
	copyFile(t, "disk.raw", name)
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "named.qcow2")
	qemu.Img(t, "snapshot", "-c", name, "named.qcow2")
	qemu.Img(t, "bitmap", "--add", "named.qcow2", name)
	strange := func(s string) bool {
		return strings.ContainsFunc(s, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
	}
	for _, args := range [][]string{{"info", "named.qcow2"}, {"info", "--backing-chain", "named.qcow2"}} {
		o := ours(append([]string{"imgnbd"}, args...)...)
		if o.Code != 0 || strange(o.Stdout) || strings.Contains(o.Stdout, "\nimgnbd") || strings.Count(o.Stdout, strings.Trim(shown, "'")) < 3 {
			t.Errorf("%q: %+v", args, o)
		}
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"info", "--backing-chain", "named.qcow2"}, {"-r", "--run", "true", "named.qcow2"}} {
		o := ours(append([]string{"imgnbd"}, args...)...)
		if o.Code != 1 || strange(o.Stderr) || !strings.Contains(o.Stderr, "Could not open "+shown) {
			t.Errorf("%q: %+v", args, o)
		}
	}
}

// A result that gets nowhere is a failure.
func TestLostResults(t *testing.T) {
	gallery(t)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for args, want := range map[string]int{
		"info disk.qcow2": 1, "check --output=json disk.qcow2": 1, "check leaks.qcow2": exitLeaks, "devices --output=json": 1, "--help": 1, "--version": 1,
		"create -q c.raw 1M": 0, "-f raw -r --run true disk.raw": 0,
	} {
		var stderr strings.Builder
		code := run(append([]string{"imgnbd"}, strings.Fields(args)...), nil, full, &stderr)
		if code != want || strings.HasSuffix(stderr.String(), "imgnbd: write /dev/full: no space left on device\n") != (want != 0) {
			t.Errorf("%s: %d, %s", args, code, &stderr)
		}
	}
}

// check -r prints what qemu-img prints, where it does the same, and what
// qemu-img says of the image afterwards.
func TestRepairSameAsQEMUImg(t *testing.T) {
	gallery(t)
	for _, name := range []string{"disk.qcow2", "base.qcow2", "snapshots.qcow2", "leaks.qcow2", "corrupt-bit.qcow2", "dirty.qcow2", "nonexistent"} {
		for _, options := range [][]string{
			{"-r", "leaks"}, {"-r", "all"}, {"-r", "all", "--output=json"}, {"-q", "-r", "all"}, {"-U", "-r", "leaks"},
		} {
			before, err := os.ReadFile(name)
			sameAsImgFrom(t, before, name, append(append([]string{"check"}, options...), name)...)
			if err != nil {
				continue
			}
			if o := theirs(t, "qemu-img", "check", name); o.Code != 0 && options[0] != "-U" {
				t.Errorf("%s after %q: %+v", name, options, o)
			}
			if err := os.WriteFile(name, before, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	// What is advised for an image that is marked as corrupt works.
	o := ours("imgnbd", "--run", "true", "corrupt-bit.qcow2")
	if o.Code != 1 || !strings.Contains(o.Stderr, "\nimgnbd: hint: repair it with imgnbd check -r all\n") {
		t.Errorf("%+v", o)
	}
	if o := ours("imgnbd", "check", "-r", "all", "corrupt-bit.qcow2"); o.Code != 0 {
		t.Errorf("%+v", o)
	}
	if o := ours("imgnbd", "--run", "true", "corrupt-bit.qcow2"); o.Code != 0 {
		t.Errorf("%+v", o)
	}
	o = ours("imgnbd", "check", "-r", "some", "disk.qcow2")
	if want := "Unknown option value for -r (expecting 'leaks' or 'all'): some"; o.Code != 1 || !strings.Contains(o.Stderr, want) {
		t.Errorf("%+v", o)
	}
	// With a new refcount structure the words are others.
	o = ours("imgnbd", "check", "-r", "all", "--output=json", "wrong.qcow2")
	if v := theirs(t, "qemu-img", "check", "wrong.qcow2"); o.Code != 0 || v.Code != 0 || !strings.Contains(o.Stdout, `"corruptions-fixed": 1`) {
		t.Errorf("%+v, then qemu-img: %+v", o, v)
	}
}

// sameAsImgFrom is sameAsImg for a command that changes an image, which both
// begin with as it was.
func sameAsImgFrom(t *testing.T, before []byte, name string, args ...string) {
	t.Helper()
	want := theirs(t, append([]string{"qemu-img"}, args...)...)
	want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "imgnbd: ")
	if before != nil {
		if err := os.WriteFile(name, before, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := ours(append([]string{"imgnbd"}, args...)...)
	got.Stderr = hintLine.ReplaceAllString(got.Stderr, "")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%q, - qemu-img, + ours:\n%s", args, diff)
	}
}
