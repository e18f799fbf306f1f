package file

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
)

// lockedBytes returns which bytes an open file has locked, as the kernel tells.
func lockedBytes(t testing.TB, pid, fd int) (in []int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	pass(t, err)
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if words[0] != "lock:" {
			continue
		}
		first, err := strconv.Atoi(words[7])
		pass(t, err)
		last, err := strconv.Atoi(words[8])
		pass(t, err)
		if words[2] != "OFDLCK" || words[4] != "READ" {
			t.Errorf("not a read lock of an open file: %s", line)
		}
		for ; first <= last; first++ {
			in = append(in, first)
		}
	}
	slices.Sort(in)
	return in
}

func TestLockedBytes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, nil, 0o600))
	for _, c := range []struct {
		opt  storage.Options
		want []int
	}{
		{storage.Options{Access: storage.Read}, []int{100, 201, 203}},
		{storage.Options{Access: storage.Write}, []int{100, 101, 201, 203}},
		{storage.Options{Access: storage.WriteGrow}, []int{100, 101, 103, 201, 203}},
		{storage.Options{Access: storage.Read, Share: storage.ShareWrite}, []int{100}},
		{storage.Options{Access: storage.Write, Share: storage.ShareWrite}, []int{100, 101}},
		{storage.Options{Access: storage.WriteGrow, Share: storage.ShareNoLock}, nil},
	} {
		s := mustOpen(t, path, c.opt)
		if got := lockedBytes(t, os.Getpid(), s.fd); !slices.Equal(got, c.want) {
			t.Errorf("%+v locks %v, want %v", c.opt, got, c.want)
		}
		pass(t, s.Close())
	}
}

const (
	writeLock  = `Failed to get "write" lock`
	sharedLock = `Failed to get shared "write" lock`
)

var openings = map[string]storage.Options{
	"read":           {Access: storage.Read},
	"read, share":    {Access: storage.Read, Share: storage.ShareWrite},
	"write":          {Access: storage.Write},
	"write, share":   {Access: storage.Write, Share: storage.ShareWrite},
	"grow":           {Access: storage.WriteGrow},
	"write, no lock": {Access: storage.Write, Share: storage.ShareNoLock},
}

// wantLock opens path and wants to be refused with the words, or not if there
// are none.
func wantLock(t *testing.T, path, how, words, holder string) {
	t.Helper()
	s, err := tryOpen(path, openings[how])
	if err == nil {
		s.Close()
	}
	if words == "" {
		if err != nil {
			t.Errorf("opening (%s): %v", how, err)
		}
		return
	}
	if err == nil || !strings.HasPrefix(err.Error(), words+": ") || !strings.Contains(err.Error(), holder) {
		t.Errorf("opening (%s): error %v, want %s ... %s", how, err, words, holder)
	}
	wantErr(t, err, storage.ErrInUse)
	hint, ok := errors.AsType[*storage.Hint](err)
	if !ok || !strings.Contains(hint.Advice, "end that process first") {
		t.Errorf("opening (%s): hint %+v does not say what to do", how, hint)
	}
}

// A child between fork and exec has the files of its parent, and would keep
// their locks beyond Close.
func TestCloseUnlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, nil, 0o600))
	opt := storage.Options{Access: storage.WriteGrow}
	s := mustOpen(t, path, opt)
	child, err := unix.Dup(s.fd)
	pass(t, err)
	defer unix.Close(child)
	pass(t, s.Close())
	if got := lockedBytes(t, os.Getpid(), child); len(got) > 0 {
		t.Errorf("still locked: %v", got)
	}
	pass(t, mustOpen(t, path, opt).Close())
}

// An image that QEMU has open is refused exactly where QEMU refuses itself.
func TestRespectsQEMU(t *testing.T) {
	for _, c := range []struct {
		format, readOnly string
		refused          map[string]string
	}{
		{"qcow2", "", map[string]string{
			"read": sharedLock, "write": writeLock, "write, share": writeLock, "grow": writeLock,
		}},
		{"qcow2", "--read-only", map[string]string{
			"write": writeLock, "write, share": writeLock, "grow": writeLock,
		}},
		{"raw", "", map[string]string{
			"read": sharedLock, "write": sharedLock, "grow": sharedLock,
		}},
	} {
		t.Run(c.format+c.readOnly, func(t *testing.T) {
			path := qemu.Create(t, c.format, "", "1M")
			args := []string{"--persistent", "--socket", filepath.Join(t.TempDir(), "s"), "--pid-file", path + ".pid", "--format", c.format, path}
			if c.readOnly != "" {
				args = append(args, c.readOnly)
			}
			cmd, stop := qemu.Start(t, "qemu-nbd", args...)
			waitForFile(t, path+".pid")
			for how := range openings {
				wantLock(t, path, how, c.refused[how], fmt.Sprintf("(qemu-nbd, process %d)", cmd.Process.Pid))
			}
			stop()
			for how := range openings {
				wantLock(t, path, how, "", "")
			}
		})
	}
}

func waitForFile(t testing.TB, path string) {
	t.Helper()
	for range 6000 {
		if text, err := os.ReadFile(path); err == nil && len(text) > 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s did not appear", path)
}

// An image that we have open is refused by QEMU.
func TestRespectedByQEMU(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		path := qemu.Create(t, format, "", "1M")
		tools := map[string][]string{
			"info":       {"qemu-img", "info", "-f", format, path},
			"info -U":    {"qemu-img", "info", "-U", "-f", format, path},
			"write":      {"qemu-io", "-f", format, "-c", "write 0 512", path},
			"read":       {"qemu-io", "-r", "-f", format, "-c", "read 0 512", path},
			"read -U":    {"qemu-io", "-U", "-r", "-f", format, "-c", "read 0 512", path},
			"share read": {"qemu-img", "check", "-f", format, path},
		}
		if format == "raw" {
			delete(tools, "share read") // no checks for raw
		}
		for how, opt := range openings {
			s := mustOpen(t, path, opt)
			for tool, line := range tools {
				words := ""
				switch {
				case how == "write, no lock", strings.HasSuffix(tool, "-U"):
				case tool == "write" && opt.Share == storage.ShareRead:
					words = writeLock
				case format == "qcow2" && opt.Access != storage.Read:
					words = sharedLock // QEMU's tools share raw images with everybody
				}
				r := qemu.Try(t, line[0], line[1:]...)
				refused := r.Code != 0 || strings.Contains(r.Stderr, "lock")
				if refused != (words != "") || !strings.Contains(r.Stderr, words) {
					t.Errorf("%s, opened by us (%s): qemu's %s: status %d, %s%s want %q",
						format, how, tool, r.Code, r.Stdout, r.Stderr, words)
				}
			}
			pass(t, s.Close())
		}
	}
}

// Two openings within this process exclude each other as two processes do.
func TestLocksWithinOneProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, make([]byte, 512), 0o600))
	for _, c := range []struct{ first, second, words string }{
		{"read", "read", ""},
		{"read", "write", writeLock},
		{"read", "write, share", writeLock},
		{"write", "read", sharedLock},
		{"write", "write", writeLock},
		{"write", "write, share", writeLock},
		{"write", "read, share", ""},
		{"write", "write, no lock", ""},
		{"write, share", "write, share", ""},
		{"write, share", "write", sharedLock},
		{"write, no lock", "write", ""},
	} {
		s := mustOpen(t, path, openings[c.first])
		wantLock(t, path, c.second, c.words, "in use by this process already")
		// A refused opening leaves no lock.
		pass(t, s.Close())
		wantLock(t, path, "grow", "", "")
	}
}

// Who has an image is found where files have another device than the locks on them.
func TestLockHolderOnOverlay(t *testing.T) {
	qemu.Require(t, "mount", "umount")
	requireRoot(t)
	lower, upper, dir := memoryDir(t), t.TempDir(), t.TempDir()
	pass(t, os.WriteFile(filepath.Join(lower, "file"), make([]byte, 512), 0o600))
	qemu.Run(t, "mount", "-t", "tmpfs", "imgnbd-test", upper) // an overlay needs one that is none itself
	t.Cleanup(func() { qemu.Run(t, "umount", upper) })
	for _, sub := range []string{"up", "work"} {
		pass(t, os.Mkdir(filepath.Join(upper, sub), 0o700))
	}
	layers := fmt.Sprintf("lowerdir=%s,upperdir=%s/up,workdir=%s/work,xino=off", lower, upper, upper)
	if r := qemu.Try(t, "mount", "-t", "overlay", "-o", layers, "overlay", dir); r.Code != 0 {
		t.Skipf("this kernel does not mount it: %s", r.Stderr)
	}
	t.Cleanup(func() { qemu.Run(t, "umount", dir) })
	path := filepath.Join(dir, "file")
	mustOpen(t, path, openings["write"])
	wantLock(t, path, "write", writeLock, "in use by this process already")
}

// The locks of a store outlive it in a file, and go to whoever opens the bytes
// next: at no moment can a third one have them.
func TestHoldLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	pass(t, os.WriteFile(path, nil, 0o600))
	open := func(opt storage.Options) error {
		s, err := tryOpen(path, opt)
		if err == nil {
			err = s.Close()
		}
		return err
	}
	s := mustOpen(t, path, openings["grow"])
	held, err := s.HoldLocks()
	pass(t, err)
	pass(t, s.Close())
	if got, want := lockedBytes(t, os.Getpid(), int(held.Fd())), []int{100, 101, 103, 201, 203}; !slices.Equal(got, want) {
		t.Errorf("%v are held, not %v", got, want)
	}
	third := func(when string) {
		t.Helper()
		for _, name := range []string{"read", "write", "write, share", "grow"} {
			if err := open(openings[name]); !errors.Is(err, storage.ErrInUse) && name != "read" {
				t.Errorf("%s, %s: %v", when, name, err)
			}
		}
	}
	third("closed")
	heir := openings["grow"]
	heir.Taken = func(info storage.Info) {
		if want := s.Info().ID; info.ID != want {
			t.Errorf("%s, not %s", info.ID, want)
		}
		third("before")
		pass(t, held.Close())
		third("after")
	}
	next := mustOpen(t, path, heir)
	third("opened again")
	pass(t, next.Close())
	pass(t, open(openings["grow"]))

	// Who opens the bytes is refused if somebody else has them, too.
	other := mustOpen(t, path, openings["write"])
	let := false
	refused := openings["grow"]
	refused.Taken = func(storage.Info) { let = true }
	if err := open(refused); !errors.Is(err, storage.ErrInUse) || !let {
		t.Errorf("%v, %v", err, let)
	}
	if _, err := s.HoldLocks(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("of a closed one: %v", err)
	}
	pass(t, other.Close())
	none := mustOpen(t, path, openings["write, no lock"])
	if held, err := none.HoldLocks(); held != nil || err != nil {
		t.Errorf("of one without: %v, %v", held, err)
	}
	pass(t, none.Close())
}
