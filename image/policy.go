package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/imgnbd/imgnbd/storage"
)

// A Policy says what an image may name. The zero Policy lets it name local
// files and block devices, as QEMU does; never FIFOs, sockets or character
// devices, which the file back end refuses to open.
type Policy struct {
	// Allow is the rule for local files.
	Allow Allow
	// Dir, if set, is the directory that local files have to lie below.
	Dir string
	// Remote lets an image name URLs too.
	Remote bool
	// Untrusted is for images that strangers have made: an image says nothing
	// of its own format, and formats hold it to strict limits. What it names is
	// left to Allow.
	Untrusted bool
}

// Allow is a rule for the local files that an image may name.
type Allow uint8

const (
	AllowLocal   Allow = iota // any
	AllowSameDir              // below the directory of the image that names them
	AllowNothing              // none, and no URL either
)

// DenyReferences is the Opener that refuses everything.
type DenyReferences struct{}

func (DenyReferences) OpenImage(_ context.Context, ref Reference) (Device, error) {
	return nil, refused(ref.Name, "an image may not name others here")
}

func (DenyReferences) OpenStore(_ context.Context, ref Reference, _ bool) (storage.Store, error) {
	return nil, refused(ref.Name, "an image may not name others here")
}

func refused(name, why string) error {
	return fmt.Errorf("%q: %w: %s", name, ErrReference, why)
}

// checkName is the part of the policy that can be told before anything is
// opened. It returns the directories that the file has to lie below.
func (p Policy) checkName(from storage.Store, ref string, src source) (dirs []string, err error) {
	if p.Allow == AllowNothing {
		return nil, &Hint{
			Err:    refused(ref, "images may not name others"),
			Advice: "if the image can be trusted, allow it with --backing=any or --backing=same-dir, and do without --untrusted",
		}
	}
	if src.url.Scheme != "file" {
		if !p.Remote {
			return nil, refused(ref, "images may not name URLs")
		}
		return nil, nil
	}
	if p.Dir != "" {
		dirs = append(dirs, p.Dir)
	}
	if p.Allow == AllowSameDir {
		u := from.Info().URL
		if u == nil || u.Scheme != "file" {
			return nil, refused(ref, "the image that names it is not a file, so nothing lies beside it")
		}
		dirs = append(dirs, dirOf(u.Path))
	}
	return dirs, nil
}

// dirOf is the directory that a path is looked up in. Not filepath.Dir, which
// cleans, and would so misread "link/../x".
func dirOf(path string) string {
	dir, _ := filepath.Split(path)
	return dir
}

// checkFile makes sure that s, opened as path, lies below dir.
//
// The path is resolved again, component by component, by os.Root, which no
// symbolic link leads out of, and what is found there has to be the very file
// that was opened. So links may be exchanged at any time without an escape: at
// worst the open is refused. A hard link below dir is below dir.
func checkFile(s storage.Store, path, dir string) error {
	escape := func(cause error) error {
		err := refused(path, fmt.Sprintf("not below %s", dir))
		if cause != nil && !errors.Is(cause, os.ErrNotExist) {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		return &Hint{Err: err, Advice: "move it there, or allow more with --backing or --backing-dir"}
	}
	f := s.File()
	if f == nil {
		return refused(path, "cannot tell where it lies")
	}
	opened, err := f.Stat()
	if err != nil {
		return err
	}
	realDir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	realPath, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(realDir, realPath)
	if err != nil || !filepath.IsLocal(rel) {
		return escape(err)
	}
	root, err := os.OpenRoot(realDir)
	if err != nil {
		return err
	}
	defer root.Close()
	found, err := root.Stat(rel)
	if err != nil || !os.SameFile(opened, found) {
		return escape(err)
	}
	return nil
}
