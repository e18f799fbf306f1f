package journal

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// memory returns a directory on a tmpfs that does not exist yet.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "imgnbd-test-")
	if err != nil {
		t.Skipf("no /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "journals")
}

var disk = storage.Info{ID: "file 1:2 3", Generation: "born 4"}

func open(t *testing.T, j *Files, info storage.Info) image.Journal {
	t.Helper()
	f, err := j.Open(info)
	if err != nil {
		t.Fatal(err)
	}
	if f == nil {
		t.Fatal("no journal")
	}
	return f
}

// die leaves a journal as a process does that dies with something in it.
func die(t *testing.T, f image.Journal) {
	t.Helper()
	f.Memory()[0] = 1
	f.Memory()[100] = 42
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestJournalOutlives(t *testing.T) {
	j := &Files{Dirs: []string{memory(t)}}
	f := open(t, j, disk)
	if m := f.Memory(); len(m) != firstSize-headerSize || cap(m) != memorySize || m[0] != 0 || m[len(m)-1] != 0 {
		t.Error("it does not begin with zeros")
	}
	if name := j.Left(disk); name != "" {
		t.Errorf("%s is left, while it is used", name)
	}
	die(t, f)
	if name := j.Left(disk); name != f.Name() {
		t.Errorf("%q is left, not %q", name, f.Name())
	}

	// Who wants no journal gets what is left, too.
	j.Off = true
	again := open(t, j, disk)
	if again.Memory()[100] != 42 {
		t.Error("what was in it is not there any more")
	}
	again.Memory()[0] = 0
	for range 2 {
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(f.Name()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal is there after a clean end: %v", err)
	}
	if f, err := j.Open(disk); f != nil || err != nil {
		t.Errorf("a journal, though there are to be none: %v", err)
	}
}

// The kernel has set memory aside for what may be used of a journal, and for no
// more.
func TestJournalGrows(t *testing.T) {
	f := open(t, &Files{Dirs: []string{memory(t)}}, disk)
	defer f.Close()
	for _, want := range []int64{firstSize, fileSize} {
		var st unix.Stat_t
		if err := unix.Stat(f.Name(), &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 != want {
			t.Errorf("%d bytes are set aside, not %d", st.Blocks*512, want)
		}
		if err := f.Grow(); err != nil {
			t.Fatal(err)
		}
	}
	f.Memory()[:memorySize][memorySize-1] = 1
}

// A journal that a killed process left is found by who comes next, and not
// while the process lives.
func TestJournalOfKilledProcess(t *testing.T) {
	if dir := os.Getenv("JOURNAL_TEST_DIR"); dir != "" {
		j := &Files{Dirs: []string{dir}}
		open(t, j, disk).Memory()[0] = 9
		os.Stdout.WriteString("ready\n")
		select {}
	}
	dir := memory(t)
	j := &Files{Dirs: []string{dir}}
	cmd := exec.Command(os.Args[0], "-test.run=^TestJournalOfKilledProcess$")
	cmd.Env = append(os.Environ(), "JOURNAL_TEST_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if name := j.Left(disk); name != "" {
		t.Errorf("%s is left by a process that lives", name)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if j.Left(disk) == "" {
		t.Error("nothing is left")
	}
	if f := open(t, j, disk); f.Memory()[0] != 9 {
		t.Error("what was in it is not there any more")
	} else if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestJournalOfSomethingElse(t *testing.T) {
	device := storage.Info{ID: "device 7:0", Generation: "disk 5"}
	for _, tt := range []struct {
		name      string
		was, is   storage.Info
		edit      func(t *testing.T, path string)
		want      string // the error; "": an empty journal
		forgotten bool
	}{
		{name: "a file in its place", was: disk, is: storage.Info{ID: disk.ID, Generation: "born 5"}},
		{name: "another boot", was: disk, is: disk, edit: func(t *testing.T, path string) { overwrite(t, path, len(headerMagic)+6, "x") }},
		{name: "another version", was: disk, is: disk, edit: func(t *testing.T, path string) { overwrite(t, path, len(headerMagic)-1, "2") }, want: "of another version"},
		{name: "another size", was: disk, is: disk, edit: func(t *testing.T, path string) {
			if err := os.Truncate(path, fileSize/2); err != nil {
				t.Fatal(err)
			}
		}, want: "of another version"},
		{name: "a device attached anew", was: device, is: storage.Info{ID: device.ID, Generation: "disk 6"}, want: "attached anew"},
		{name: "a process that died before it had a header", was: disk, is: disk, edit: func(t *testing.T, path string) {
			overwrite(t, path, 0, strings.Repeat("\x00", headerSize+8))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := &Files{Dirs: []string{memory(t)}}
			f := open(t, j, tt.was)
			die(t, f)
			if tt.edit != nil {
				tt.edit(t, f.Name())
			}
			if j.Left(tt.is) != "" {
				t.Error("it is said to be left for an image that it is not of")
			}
			again, err := j.Open(tt.is)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), f.Name()) {
					t.Fatalf("got %v, want %q and the name of the file", err, tt.want)
				}
				if _, err := os.Stat(f.Name()); err != nil {
					t.Error("the journal is gone: ", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if again.Memory()[0] != 0 || again.Memory()[100] != 0 {
				t.Error("the contents of another journal")
			}
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func overwrite(t *testing.T, path string, at int, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte(text), int64(at))
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Where somebody else could have put it, or it would not outlive the process
// for long, or would the machine, no journal is kept.
func TestJournalPlaces(t *testing.T) {
	shared := memory(t)
	if err := errors.Join(os.Mkdir(shared, 0), os.Chmod(shared, 0o770)); err != nil {
		t.Fatal(err)
	}
	target, link := memory(t), memory(t)
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	onDisk := filepath.Join("/var/tmp", filepath.Base(filepath.Dir(shared)))
	t.Cleanup(func() { os.RemoveAll(onDisk) })
	for _, tt := range []struct{ name, dir, want string }{
		{"others can write there", shared, "not a directory of this user alone"},
		{"a symbolic link", link, "not a directory"},
		{"no directory to make it in", filepath.Join(target, "a", "b"), "no such file"},
		{"a disk", onDisk, "not on a tmpfs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := &Files{Dirs: []string{tt.dir}}
			if f, err := j.Open(disk); f != nil || err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, %v, want %q", f, err, tt.want)
			}
			var cause error
			j.Without = func(err error) error { cause = err; return nil }
			if f, err := j.Open(disk); f != nil || err != nil || cause == nil {
				t.Errorf("got %v, %v, cause %v", f, err, cause)
			}
		})
	}
	if _, err := os.Stat(onDisk); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory is left behind on the disk: %v", err)
	}
	next := memory(t)
	j := &Files{Dirs: []string{shared, next}}
	if f := open(t, j, disk); filepath.Dir(f.Name()) != next {
		t.Errorf("it is in %s, not in the directory that can be used", f.Name())
	} else {
		f.Close()
	}

	// Others may know that it is there.
	seen := memory(t)
	if err := errors.Join(os.Mkdir(seen, 0), os.Chmod(seen, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := open(t, &Files{Dirs: []string{seen}}, disk).Close(); err != nil {
		t.Error(err)
	}

	// A file that is not ours is not touched.
	name, err := fileName(disk.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(target, name)); err != nil {
		t.Fatal(err)
	}
	j = &Files{Dirs: []string{target}}
	if f, err := j.Open(disk); f != nil || err == nil {
		t.Errorf("a symbolic link was followed: %v", err)
	}
}

// Who overwrites the image gives up what was in the journal.
func TestJournalRemove(t *testing.T) {
	j := &Files{Dirs: []string{memory(t)}}
	if err := j.Remove(disk); err != nil {
		t.Error(err)
	}
	f := open(t, j, disk)
	die(t, f)
	if err := j.Remove(disk); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(f.Name()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

// Who goes on for another gets that one's journal and no other, whatever has
// happened to the image in between.
func TestJournalContinued(t *testing.T) {
	dir := memory(t)
	first := &Files{Dirs: []string{dir}, Holder: "first"}
	goesOn := &Files{Dirs: []string{dir}, Holder: "first", Continue: true}
	gone := func(when string) {
		t.Helper()
		if f, err := goesOn.Open(disk); f != nil || !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v, %v", when, f, err)
		}
	}
	gone("nobody had one")
	die(t, open(t, first, disk))
	for range 2 { // whoever goes on may die too
		f := open(t, goesOn, disk)
		if f.Memory()[100] != 42 {
			t.Error("what was in it is not there any more")
		}
		die(t, f)
	}
	if f, err := goesOn.Open(storage.Info{ID: disk.ID, Generation: "born 5"}); f != nil || !errors.Is(err, ErrGone) {
		t.Errorf("another file in its place: %v, %v", f, err)
	}
	gone("that one made it void")
	if f, err := goesOn.Open(storage.Info{}); f != nil || !errors.Is(err, ErrGone) {
		t.Errorf("a store without identity: %v, %v", f, err)
	}

	die(t, open(t, first, disk))
	die(t, open(t, &Files{Dirs: []string{dir}, Holder: "second"}, disk))
	gone("somebody else has used it")
	die(t, open(t, &Files{Dirs: []string{dir}}, disk))
	gone("somebody without a name has used it")

	f := open(t, first, disk)
	f.Memory()[0] = 0
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	gone("it has ended well")
}

func TestJournalNames(t *testing.T) {
	seen := map[string]bool{}
	for _, id := range []string{"file 1:2 3", "file_1:2 3", "file%201:2 3", "https://a/b", "../x"} {
		name, err := fileName(id)
		if err != nil || seen[name] || filepath.Base(name) != name {
			t.Errorf("%q becomes %q, %v", id, name, err)
		}
		seen[name] = true
	}
	if _, err := fileName(""); err == nil {
		t.Error("a name for nothing")
	}
}
