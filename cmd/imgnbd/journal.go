package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/journal"
)

// A journalMode is what --journal says. The zero value keeps journals where
// that is possible.
type journalMode struct {
	off  bool
	must bool   // on, or else the image is not served
	dir  string // "": the directories for this user
}

func (m *journalMode) set(s string) (err error) {
	*m = journalMode{off: s == "off", must: s != "off"}
	switch {
	case s == "on" || s == "off":
	case s == "":
		return errors.New("--journal needs on, off or a directory")
	default:
		m.dir, err = filepath.Abs(s)
	}
	return err
}

// journals keeps the journals of what is served. With quiet it does without
// them in silence: who returns 1 after a warning must not warn of what is no
// fault of the command line.
func (m *journalMode) journals(u *ui, quiet bool) image.Journals {
	j := &journal.Files{Dirs: journal.Dirs(), Off: m.off}
	if m.dir != "" {
		j.Dirs, j.Also = []string{m.dir}, j.Dirs
	}
	j.Without = func(cause error) error {
		switch {
		case m.must:
			return hinted(fmt.Errorf("no journal: %w", cause),
				"--journal=off serves without: if the server is killed, writes are lost that were answered but not flushed")
		case !quiet && !u.compat():
			u.warning(fmt.Sprintf("no journal (%v): if the server is killed, writes are lost that were answered but not flushed", cause))
		}
		return nil
	}
	return j
}
