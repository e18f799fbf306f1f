package main

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

var (
	usageLine = regexp.MustCompile("(?m)^.*Try [`']imgnbd( create)? --help' for more information.?\n|^.*Try 'qemu-img --help' for more information\n")
	noNewline = regexp.MustCompile(`(Detected format of \w+\.)$`)
)

// createLikeImg compares create with qemu-img's, for a file that neither finds
// there, and whether it is there afterwards.
func createLikeImg(t *testing.T, args ...string) {
	t.Helper()
	args = append([]string{"create"}, args...)
	exists := func() (names []string) {
		for _, name := range []string{"new", "newdata"} {
			if os.Remove(name) == nil {
				names = append(names, name)
			}
		}
		return names
	}
	exists()
	want := theirs(t, append([]string{"qemu-img"}, args...)...)
	want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "imgnbd: ")
	want.Stderr = noNewline.ReplaceAllString(usageLine.ReplaceAllString(want.Stderr, ""), "$1\n")
	wantFiles := exists()
	if want.Code != 0 {
		// It makes the file before it looks at all options. We look first.
		want.Stdout, wantFiles = "", nil
	}
	got := ours(append([]string{"imgnbd"}, args...)...)
	got.Stderr = usageLine.ReplaceAllString(hintLine.ReplaceAllString(got.Stderr, ""), "")
	if got.Code != 0 {
		got.Stdout = ""
	}
	gotFiles := exists()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%.200q, - qemu-img, + ours:\n%s", args, diff)
	}
	if diff := cmp.Diff(wantFiles, gotFiles); diff != "" {
		t.Errorf("%.200q, files, - qemu-img, + ours:\n%s", args, diff)
	}
}

// create prints what qemu-img prints, to the byte, and succeeds where it does.
func TestCreateSameAsQEMUImg(t *testing.T) {
	workplace(t)
	qemu.Img(t, "create", "-q", "-f", "qcow2", "base.qcow2", "3M")
	if err := os.WriteFile("base.raw", make([]byte, 1000), 0o644); err != nil {
		t.Fatal(err)
	}

	// The line with every option.
	options := []string{
		"", "cluster_size=4k", "cluster_size=0x1000", "cluster_size=2M", "compat=v2", "compat=0.10", "compat=1.1", "extended_l2=on",
		"preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=off", "lazy_refcounts=on",
		"lazy_refcounts=yes", "lazy_refcounts", "nolazy_refcounts", "refcount_bits=1", "refcount_bits=0x40", "compression_type=zstd",
		"compression_type=zlib,cluster_size=512,refcount_bits=8", "data_file=newdata", "data_file=newdata,data_file_raw=true",
		"data_file=newdata,preallocation=metadata,lazy_refcounts=off", "data_file_raw=off", "cluster_size=4k,cluster_size=8k",
		"backing_file=base.qcow2,backing_fmt=qcow2", "backing_file=base.raw,backing_fmt=raw,compat=v2",
		"backing_file=base.qcow2,backing_fmt=qcow2,data_file=newdata",
		"backing_file=base.qcow2,backing_fmt=qcow2,extended_l2=on,preallocation=full",
		"refcount_bits=64,preallocation=metadata,extended_l2=on,lazy_refcounts=on,compression_type=zstd,cluster_size=128k,compat=v3",
		// What does not go together.
		"cluster_size=1000", "cluster_size=256", "cluster_size=4M", "cluster_size=0", "cluster_size=foo", "cluster_size=", "cluster_size=16E",
		"refcount_bits=3", "refcount_bits=0", "refcount_bits=128", "refcount_bits=1k", "refcount_bits=-1", "refcount_bits=99999999999999999999",
		"compat=2", "compat=", "compat=0.10,lazy_refcounts=on", "compat=0.10,refcount_bits=8", "compat=0.10,extended_l2=on",
		"compat=0.10,compression_type=zstd", "compat=v2,data_file=newdata", "extended_l2=on,cluster_size=8k", "extended_l2=x",
		"preallocation=x", "preallocation", "compression_type=foo", "data_file_raw=on", "backing_fmt=qcow2", "backing_fmt=foo",
		"backing_file=", "backing_file=,backing_fmt=raw", "foo=1", "foo", "nofoo", "node=on", "node", "nocow", "nosize", "nolazy_refcounts=on", "size=x", "size=-1", "size=1M", "size=16E", "size=",
		"backing_file=base.qcow2,backing_fmt=qcow2,preallocation=metadata", "backing_file=base.qcow2,backing_fmt=qcow2,data_file=newdata,data_file_raw=on",
		"cluster_size=1000,refcount_bits=3", "cluster_size=1000,preallocation=x", "compat=0.10,lazy_refcounts=on,refcount_bits=3",
		"compat=0.10,extended_l2=on,cluster_size=4k", "compat=0.10,compression_type=zstd,refcount_bits=8", "data_file_raw=on,refcount_bits=3",
		"data_file_raw=on,compat=0.10", "backing_fmt=raw,cluster_size=1000", ",cluster_size=4k", "cluster_size=4k,", "cluster_size=4k,,",
	}
	for _, o := range options {
		createLikeImg(t, "-f", "qcow2", "-o", o, "new", "1M")
	}

	long := strings.Repeat("x", 1024)
	for _, args := range [][]string{
		{}, {"new"}, {"-f", "qcow2", "new"}, {"-f", "qcow2"}, {"new", "1M", "2M"}, {"new", "x"}, {"new", "1M"}, {"new", "1000"},
		{"-q", "new", "1M"}, {"new", "1M", "-f", "qcow2"}, {"-fqcow2", "new", "1M"}, {"-f", "foo", "new", "1M"},
		{"-f", "qcow2", "-o", "size=1M", "new"}, {"-f", "qcow2", "-o", "size=1M,size=3M", "new"}, {"-o", "size=2M", "new", "1M"},
		{"-f", "qcow2", "-o", "cluster_size=4k", "-o", "compat=v2", "new", "1M"},
		{"-o", "cluster_size=4k", "new", "1M"}, {"-o", "preallocation=full", "new", "1M"}, {"-o", "preallocation=falloc", "new", "1M"},
		{"-o", "preallocation=off", "new", "1M"}, {"-o", "preallocation=metadata", "new", "1M"}, {"-o", "preallocation=foo", "new", "1M"},
		{"-f", "qcow2", "-b", "base.qcow2", "new"}, {"-f", "qcow2", "-b", "base.raw", "new"}, {"-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new"},
		{"-f", "qcow2", "-b", "base.qcow2", "-F", "raw", "new"}, {"-f", "qcow2", "-b", "base.raw", "-F", "raw", "new"},
		{"-f", "qcow2", "-b", "base.raw", "-F", "qcow2", "new"}, {"-f", "qcow2", "-b", "base.qcow2", "-F", "foo", "new"},
		{"-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new", "1k"}, {"-f", "qcow2", "-b", "nope", "-F", "qcow2", "new"},
		{"-f", "qcow2", "-b", "nope", "-F", "qcow2", "new", "1M"}, {"-f", "qcow2", "-u", "-b", "nope", "-F", "qcow2", "new"},
		{"-f", "qcow2", "-u", "-b", "nope", "-F", "qcow2", "new", "1M"}, {"-f", "qcow2", "-u", "-b", "nope", "new", "1M"},
		{"-f", "qcow2", "-b", "new", "-F", "qcow2", "new", "1M"}, {"-b", "base.qcow2", "-F", "qcow2", "new", "1M"}, {"-F", "qcow2", "new", "1M"},
		{"-f", "qcow2", "-F", "qcow2", "new", "1M"}, {"-f", "qcow2", "-b", "../nope", "-F", "raw", "dir/new"}, {"-f", "qcow2", "-b", "", "new", "1M"},
		{"-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "backing_file=nope,backing_fmt=raw", "new"},
		{"-f", "qcow2", "-b", `json:{"driver":"raw","file.filename":"base.raw"}`, "-F", "raw", "new"},
		{"-f", "qcow2", "-u", "-b", "a,b", "-F", "raw", "new", "1M"}, {"-f", "qcow2", "-u", "-b", long, "-F", "raw", "new", "1M"},
		{"-f", "qcow2", "-u", "-b", long[1:], "-F", "raw", "new", "1M"}, {"-f", "qcow2", "-u", "-b", long[1:], "-F", "raw", "-o", "cluster_size=512", "new", "1M"},
		{"-f", "qcow2", "-u", "-b", long[:300], "-F", "raw", "-o", "cluster_size=512", "new", "1M"},
		{`json:{"driver":"qcow2","file.filename":"new"}`, "1M"}, {"-f", "qcow2", "-b", "base.raw", "-F", "raw", `json:{"driver":"qcow2","file.filename":"new"}`},
		{"-f", "qcow2", "nope/new", "1M"}, {"nope/new", "1M"}, {"-f", "qcow2", "dir", "1M"}, {"-f", "qcow2", "-o", "data_file=nope/data", "new", "1M"},
		{"-f", "qcow2", "-o", "data_file=dir", "new", "1M"}, {"-f", "qcow2", "file:new", "1M"}, {"new", "1E"},
		{"-f", "qcow2", "-o", "cluster_size=512", "new", "1T"}, {"-f", "qcow2", "new", "4P"}, {"-f", "qcow2", "new", "2P"},
		{"-f", "qcow2", "-o", "cluster_size=2M", "new", "4E"}, {"-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on", "new", "1E"},
	} {
		createLikeImg(t, args...)
	}

	// Sizes.
	for _, s := range []string{
		"0", "1", "1000", "1k", "1K", "1m", "1.5G", "1.25k", "2.0000001k", "0x1000", "9E", "8E", "7.9E", "0.5", "0.5k", "1b", "1B", "1kb", "1e3",
		"08", " 1", "1 ", "+1", "1.k", ".5k", "1.5.5", "9223372036854775808", "18446744073709551616", "", "inf", "nan", "0x1.8k", "1T", "1x", "1.0", "1.0b",
	} {
		createLikeImg(t, "-f", "qcow2", "new", s)
	}
}

// Every option that help lists is qemu-img's, in its words, and none of
// qemu-img's is unknown.
func TestCreateHelp(t *testing.T) {
	workplace(t)
	for _, format := range []string{"qcow2", "raw"} {
		text := theirs(t, "qemu-img", "create", "-f", format, "-o", "help", "file").Stdout
		var lines []string
		for line := range strings.Lines(text) {
			name, _, isOption := strings.Cut(strings.TrimSpace(line), "=")
			if isOption {
				got := ours("imgnbd", "create", "-f", format, "-o", name+"=1", "new", "1M")
				if strings.Contains(got.Stderr, "Invalid parameter") {
					t.Errorf("%s: %s is unknown", format, name)
				}
				if strings.Contains(got.Stderr, "not supported") || strings.Contains(got.Stderr, "Invalid parameter") {
					continue
				}
				lines = append(lines, line)
			}
		}
		slices.Sort(lines)
		got := ours("imgnbd", "create", "-f", format, "-o", "help")
		if diff := cmp.Diff("Supported "+format+" options:\n"+strings.Join(lines, ""), got.Stdout); diff != "" || got.Code != 0 {
			t.Errorf("%s:\n%s", format, diff)
		}
	}
}

// What is in use, or would be needed, is not overwritten.
func TestCreateSpares(t *testing.T) {
	workplace(t)
	qemu.Img(t, "create", "-q", "-f", "qcow2", "base.qcow2", "3M")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "data_file=data.raw", "top.qcow2")
	before, err := os.ReadFile("base.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("base.qcow2", "link"); err != nil {
		t.Fatal(err)
	}
	const base = `json:{"driver":"qcow2","l2-cache-size":65536,"file.filename":"base.qcow2"}`
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "over.qcow2")
	// An archive, of which the image is a part.
	if err := os.WriteFile("archive", slices.Concat(make([]byte, 1<<16), before), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink("archive", "linkarchive"), os.Link("archive", "hardarchive")); err != nil {
		t.Fatal(err)
	}
	const part = `json:{"driver":"qcow2","file.driver":"raw","file.offset":65536,"file.file.filename":"archive"}`
	const farPart = `json:{"driver":"qcow2","file.driver":"raw","file.offset":1048576,"file.file.filename":"archive"}`
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", part, "-F", "qcow2", "overpart.qcow2")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", "overpart.qcow2", "-F", "qcow2", "overover.qcow2")
	archive, err := os.ReadFile("archive")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.Stat("data.raw")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-b", "base.qcow2", "-F", "qcow2", "./base.qcow2"},
		{"-b", "./base.qcow2", "-F", "qcow2", "link"},
		{"-b", "top.qcow2", "-F", "qcow2", "base.qcow2"},
		{"-b", "top.qcow2", "-F", "qcow2", "file:base.qcow2"},
		{"-b", "top.qcow2", "-F", "qcow2", "data.raw"},
		{"-b", "top.qcow2", "-F", "qcow2", "-o", "data_file=base.qcow2", "new"},
		{"-b", base, "-F", "qcow2", "base.qcow2"},
		{"-b", "over.qcow2", "-F", "qcow2", "base.qcow2"},
		{"-b", "over.qcow2", "-F", "qcow2", "-o", "data_file=base.qcow2", "new"},
		{"-u", "-b", "./base.qcow2", "-F", "qcow2", "base.qcow2", "1M"},
		{"-u", "-b", "link", "-F", "raw", "base.qcow2", "1M"},
		{"-u", "-b", "base.qcow2", "-F", "raw", "-o", "data_file=./base.qcow2", "new", "1M"},
		{"-u", "-b", "over.qcow2", "-F", "qcow2", "base.qcow2", "1M"},
		{"-b", part, "-F", "qcow2", "archive"},
		{"-b", part, "-F", "qcow2", "linkarchive"},
		{"-b", part, "-F", "qcow2", "hardarchive"},
		{"-b", part, "-F", "qcow2", "-o", "data_file=archive", "new"},
		{"-u", "-b", part, "-F", "qcow2", "./archive", "1M"},
		{"-u", "-b", farPart, "-F", "qcow2", "archive", "1M"},
		{"-b", "overpart.qcow2", "-F", "qcow2", "archive"},
		{"-b", "overover.qcow2", "-F", "qcow2", "file:linkarchive"},
		{"-u", "-b", "overover.qcow2", "-F", "qcow2", "archive", "1M"},
		{"-b", "base.qcow2", "-F", "qcow2", "-o", "data_file=" + strings.ReplaceAll(part, ",", ",,"), "archive"},
		{"-o", "data_file=" + strings.ReplaceAll(`json:{"driver":"raw","file.driver":"raw","file.offset":65536,"file.file.filename":"archive"}`, ",", ",,"), "archive", "1M"},
		{"-o", "data_file=" + strings.ReplaceAll(`json:{"driver":"raw","file.driver":"raw","file.file.filename":"newdata"}`, ",", ",,"), "new", "1M"},
		{base, "1M"},
		{"-b", "nope", "-F", "raw", base},
		{"-o", "data_file=link", "base.qcow2", "1M"},
		{"-o", "cluster_size=3", "base.qcow2", "1M"},
		{"-o", "encryption=on", "base.qcow2", "1M"},
		{"-o", "encrypt.format=luks,encrypt.key-secret=s", "base.qcow2", "1M"},
		{"-f", "raw", "-o", "nocow=on", "base.qcow2", "1M"},
		{"-o", "nocow=on", "base.qcow2", "1M"},
		{"-o", "nocow=off", "base.qcow2", "1M"},
		{"-o", "extent_size_hint=1M", "base.qcow2", "1M"},
	} {
		got := ours(append([]string{"imgnbd", "create", "-f", "qcow2"}, args...)...)
		after, err := os.ReadFile("base.qcow2")
		if err != nil {
			t.Fatal(err)
		}
		if now, err := os.ReadFile("archive"); err != nil || string(now) != string(archive) {
			t.Fatalf("%q: the archive was written to, %v\n%s", args, err, got.Stderr)
		}
		if _, err := os.Stat("newdata"); err == nil {
			t.Errorf("%q: made newdata\n%s", args, got.Stderr)
		}
		if _, err := os.Stat("new"); got.Code != 1 || string(after) != string(before) || err == nil {
			t.Errorf("%q: exit status %d, changed: %t, made: %t\n%s", args, got.Code, string(after) != string(before), err == nil, got.Stderr)
		}
	}
	if now, err := os.Stat("data.raw"); err != nil || now.ModTime() != data.ModTime() {
		t.Errorf("data.raw was written to, %v", err)
	}

	user := exec.Command("qemu-io", "-f", "qcow2", "base.qcow2")
	stdin, err := user.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := user.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil { // the prompt: it is open
		t.Fatal(err)
	}
	for _, format := range []string{"qcow2", "raw"} {
		got := ours("imgnbd", "create", "-f", format, "base.qcow2", "1M")
		if got.Code != 1 || !strings.HasPrefix(got.Stderr, `imgnbd: base.qcow2: Failed to get "write" lock`) ||
			strings.Count(got.Stderr, "Is another process using the image [") != 1 {
			t.Errorf("in use: %+v", got)
		}
	}
	if got := ours("imgnbd", "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"); got.Code != 0 {
		t.Errorf("an overlay of an image in use: %+v", got)
	}
	stdin.Close()
	if err := user.Wait(); err != nil {
		t.Error(err)
	}
}

// A signal ends create, and what it had begun to make is gone, also if another
// signal follows at once.
func TestCreateSignalled(t *testing.T) {
	for name, test := range map[string]struct {
		sig  syscall.Signal
		args string
	}{
		"qcow2":       {syscall.SIGINT, "-f qcow2 -o preallocation=full"},
		"raw":         {syscall.SIGTERM, "-f raw -o preallocation=full"},
		"a data file": {syscall.SIGHUP, "-f qcow2 -o preallocation=full,data_file=data"},
	} {
		t.Run(name, func(t *testing.T) {
			// What is caught here is not ignored there, as it may be with nohup.
			caught := make(chan os.Signal, 1)
			signal.Notify(caught, test.sig)
			defer signal.Stop(caught)
			t.Chdir(t.TempDir())
			cmd := exec.Command("imgnbd", append(strings.Fields("create -q new 16G"), strings.Fields(test.args)...)...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kill := time.AfterFunc(deadline, func() { cmd.Process.Kill() })
			defer kill.Stop()
			for begun := false; !begun; time.Sleep(time.Millisecond) {
				_, err := os.Stat("new")
				begun = err == nil
			}
			if err := cmd.Process.Signal(test.sig); err != nil {
				t.Fatal(err)
			}
			cmd.Process.Signal(test.sig) // unless it has ended
			cmd.Wait()
			if st := cmd.ProcessState.Sys().(syscall.WaitStatus); !st.Signaled() || st.Signal() != test.sig {
				t.Errorf("ended with %v\n%s", cmd.ProcessState, &stderr)
			}
			if left, err := os.ReadDir("."); err != nil || len(left) > 0 {
				t.Errorf("%v remain, %v", left, err)
			}
			if want := "imgnbd: new: ended by a signal: "; !strings.HasPrefix(stderr.String(), want) {
				t.Errorf("%q", &stderr)
			}
		})
	}
}

// A data file lies where the image will look for it.
func TestCreateDataFileBeside(t *testing.T) {
	workplace(t)
	if got := ours("imgnbd", "create", "-f", "qcow2", "-o", "data_file=data.raw", "dir/new.qcow2", "1M"); got.Code != 0 {
		t.Fatalf("%+v", got)
	}
	t.Chdir("dir") // where QEMU's names of data files start
	qemu.IO(t, "qcow2", "new.qcow2", "write -P 7 0 64k")
	if fi, err := os.Stat("data.raw"); err != nil || fi.Size() != 1<<20 {
		t.Errorf("%v, %v", fi, err)
	}
}
