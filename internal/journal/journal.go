// Package journal keeps the journals of images in files that are memory: on a
// tmpfs, mapped, so that what a process put there outlives it, but not the
// machine.
//
// A file belongs to one image, and is found by its identity alone: whichever
// process of ours opens the image for writing next finds what one that died
// left. While a process uses the file it holds a lock on it (flock), which the
// kernel ends with the process; nothing depends on process numbers, which mean
// nothing across containers.
//
// What the memory means is the format's business. The package knows that there
// is nothing in it if its first eight bytes are zero.
package journal

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"

	"github.com/imgnbd/imgnbd/storage"
)

// Files is an [image.Journals] of files.
type Files struct {
	// Dirs are searched for what a process left. A new journal goes into the
	// first that can be used: on a tmpfs, and nobody's but ours. Those that do
	// not exist are made.
	Dirs []string

	// Also are searched, too.
	Also []string

	// Off begins no new journal. What a process left is still brought back.
	Off bool

	// Holder is noted in a journal, for whoever has to find out later whether
	// anybody else has used the image since: who opens it for writing becomes
	// the holder. With Continue there has to be a journal that Holder left.
	Holder   string
	Continue bool

	// Without is asked about an image that no journal can be kept of, and why.
	// It returns nil if the image is to be opened all the same. nil: it is not.
	Without func(cause error) error
}

// Dirs are the directories for journals of this user.
func Dirs() []string {
	uid := os.Getuid()
	dirs := []string{fmt.Sprintf("/dev/shm/imgnbd-%d", uid)}
	if uid == 0 {
		return append([]string{"/run/imgnbd"}, dirs...)
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return append([]string{filepath.Join(dir, "imgnbd")}, dirs...)
	}
	return dirs
}

// ErrGone is the error of Open with Continue: what Holder had acknowledged may
// not be in the image.
var ErrGone = errors.New("its journal is gone, or somebody else has used the image since")

const (
	headerSize = 4096
	memorySize = 8 << 20 // what the format gets: a quarter of a million changes
	fileSize   = headerSize + memorySize
	firstSize  = 128 << 10 // what a server that has just started gets of it
)

// fileName returns the name of the file for an identity.
func fileName(id string) (string, error) {
	name := url.PathEscape(id) + ".journal"
	if id == "" || len(name) > 255 {
		return "", errors.New("the image has no identity to find it by")
	}
	return name, nil
}

// A header is the first page of a file: lines for people and programs, then
// zeros. It is complete before anything is in the memory behind it.
type header [headerSize]byte

const headerMagic = "imgnbd journal 1"

// newHeader returns the header of the journal of an image.
func newHeader(boot, holder string, image storage.Info) (h header, err error) {
	name := ""
	if image.URL != nil {
		name = image.URL.Redacted()
	}
	text := fmt.Sprintf("%s\nboot %s\nimage %q\ngeneration %q\nopened as %q\nholder %q\n", headerMagic, boot, image.ID, image.Generation, name, holder)
	if len(text) > len(h) {
		return h, errors.New("the name of the image is too long")
	}
	copy(h[:], text)
	return h, nil
}

// holder returns the line of the holder, nil if there is none.
func (h *header) holder() []byte {
	lines := bytes.SplitN(h[:], []byte("\n"), 7)
	if len(lines) != 7 {
		return nil
	}
	return lines[5]
}

// A standing is how the header of a file that was found compares with the one
// that it would be given now.
type standing int

const (
	same    standing = iota
	past             // of another boot, or of a file that is not there any more
	foreign          // of what nobody can tell
)

func (h *header) compare(now *header) standing {
	was, is := bytes.SplitN(h[:], []byte("\n"), 5), bytes.SplitN(now[:], []byte("\n"), 5)
	switch {
	case len(was) != 5 || !bytes.Equal(was[0], is[0]):
		return foreign
	case !bytes.Equal(was[1], is[1]):
		return past
	case !bytes.Equal(was[2], is[2]):
		return foreign
	case bytes.Equal(was[3], is[3]):
		return same
	case bytes.Contains(was[2], []byte(`"file `)):
		return past
	}
	return foreign // a device may have been given the same medium again
}

// foreignError is about a file that nothing is known of.
func foreignError(path string) error {
	return &storage.Hint{
		Err:    fmt.Errorf("the journal %s is of another version of this program, or of what this device was before it was attached anew", path),
		Advice: "to use the image without what a process that died had acknowledged, remove that file",
	}
}

func inUse(path string) error {
	return fmt.Errorf("the journal %s is %w", strconv.Quote(path), storage.ErrInUse)
}
