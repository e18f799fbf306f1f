package connect

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Record is what a server notes about a device that it serves, in
// /run/imgnbd. It keeps the file locked for its whole life: the kernel does
// not tell whether anybody is at the other end of its sockets.
type Record struct {
	Backend     string `json:"backend"` // the same as in /sys/block/nbdX/backend
	PID         int    `json:"pid"`
	Image       string `json:"image,omitempty"` // that it serves
	Partition   int    `json:"partition,omitempty"`
	Server      string `json:"server,omitempty"` // or where the server is
	Connections int    `json:"connections"`
	Identity

	Direct bool `json:"direct,omitempty"` // the kernel reaches the server without this process
	Away   bool `json:"away,omitempty"`   // the server cannot be reached
}

// newBackend returns what tells one attachment from all others.
func newBackend() string { return backendPrefix + rand.Text() }

const backendPrefix = "imgnbd:"

// A record is the locked file.
type record struct {
	mu sync.Mutex // to write it, and to change what is written
	Record
	lost string // why what was answered may be lost, whatever else is noted; "": it is not

	path string
	f    *os.File
}

// update writes it as changed. On an error the file holds either.
func (r *record) update(change func(*Record)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.Record)
	return r.write()
}

// spoil notes why what was answered may be lost, for good. Nobody needs to know
// once the record is closed.
func (r *record) spoil(why string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost = why
	if err := r.write(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// identity returns what is noted of the image.
func (r *record) identity() Identity {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Identity
}

func (r *record) write() error {
	if r.lost != "" {
		r.Volatile = r.lost
	}
	line, err := json.Marshal(r.Record)
	if err != nil {
		return err
	}
	st, err := r.f.Stat()
	if err != nil {
		return err
	}
	return overwrite(r.f, st.Size(), append(line, '\n'))
}

// overwrite has f, of that many bytes, hold a line in place of what is there. Who
// reads it meanwhile, or after an end in the midst of it, finds either, see
// parseRecord. If there is no room for it, f is as it was.
func overwrite(f interface {
	io.WriterAt
	Truncate(size int64) error
}, size int64, line []byte) error {
	// A copy comes first, beyond both.
	beyond := append(bytes.Repeat([]byte{' '}, max(0, len(line)-int(size))), '\n')
	if _, err := f.WriteAt(append(beyond, line...), size); err != nil {
		err = errors.Join(err, f.Truncate(size))
		// In memory that is there no room is needed, and an end comes between pages.
		if page := int64(os.Getpagesize()); int64(len(line)) > (size+page-1)/page*page {
			return err
		}
	}
	if _, err := f.WriteAt(line, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(line)))
}

func (h *host) recordPath(index int) string { return filepath.Join(h.run, name(index)+".json") }

// makeRun makes the directory of the records, and closes one that others may
// enter: who can open a record can lock it, and is taken for its server.
func (h *host) makeRun() error {
	if err := os.MkdirAll(h.run, 0o755); err != nil {
		return err
	}
	return os.Chmod(h.run, 0o700)
}

// newRecord waits for the server that had the device before, which may still
// be writing to its image. follow, unless nil, is that of Options.
func (h *host) newRecord(ctx context.Context, index int, r Record, follow func(spoil func(string) error)) (*record, error) {
	if err := h.makeRun(); err != nil {
		return nil, err
	}
	path := h.recordPath(index)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lock(ctx, f, syscall.LOCK_EX); err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		// The server before has removed it, perhaps while we waited.
		if !isAt(f, path) {
			f.Close()
			continue
		}
		rec := &record{Record: r, path: path, f: f}
		if follow != nil {
			follow(rec.spoil)
		}
		if err := rec.update(func(*Record) {}); err != nil {
			return nil, errors.Join(err, rec.close())
		}
		return rec, nil
	}
}

func readRecord(f *os.File) (r Record, err error) {
	var text []byte
	for room := 16 << 10; ; room *= 4 { // in one piece, or it could be of several
		text = make([]byte, room)
		n, err := f.ReadAt(text, 0)
		if errors.Is(err, io.EOF) {
			return parseRecord(text[:n])
		}
		if err != nil {
			return r, err
		}
	}
}

// parseRecord returns the last line that is whole: others are being overwritten.
func parseRecord(text []byte) (Record, error) {
	lines := bytes.Split(bytes.TrimRight(text, "\n"), []byte{'\n'})
	var err error
	for _, line := range slices.Backward(lines) {
		var r Record
		if err = json.Unmarshal(line, &r); err == nil {
			return r, nil
		}
	}
	return Record{}, err
}

func (r *record) close() error { return errors.Join(removeRecord(r.path), r.f.Close()) }

// removeRecord also removes the socket that a server which died has left.
func removeRecord(path string) error {
	err := os.Remove(strings.TrimSuffix(path, ".json") + ".sock")
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.Remove(path))
}

// isAt reports whether path is the name of f.
func isAt(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// lock waits for a lock on f.
func lock(ctx context.Context, f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// A server is who serves a device, as far as it is one of ours.
type server struct {
	Record
	path string
	f    *os.File // nil: it is not
}

// server finds it. The file is kept open, so it must be waited for or closed.
func (h *host) server(index int) server {
	s := server{path: h.recordPath(index)}
	f, err := os.Open(s.path)
	if err != nil {
		return server{}
	}
	if s.Record, err = readRecord(f); err != nil || s.Backend != h.read(index, name(index), "backend") {
		f.Close()
		return server{}
	}
	s.f = f
	return s
}

func (s server) known() bool { return s.f != nil }

// dead reports whether it is one of ours and has ended without a word, so that
// nobody answers. Where the kernel reaches a server by itself, somebody may.
func (s server) dead() bool { return s.known() && !s.alive() && (!s.Direct || s.Away) }

// state is that of a device of ours.
func (s server) state() State {
	switch {
	case s.dead():
		return Dead
	case !s.alive():
		return Unattended
	case s.Away:
		return Away
	}
	return Live
}

// alive reports whether the server still runs.
func (s server) alive() bool { return alive(s.f) }

// alive reports whether the process whose record f is still runs.
func alive(f *os.File) bool {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	if err == nil {
		syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
	}
	return errors.Is(err, syscall.EWOULDBLOCK)
}

// wait waits until the server has closed the image. What a dead one left is
// removed.
func (s server) wait(ctx context.Context) error {
	if s.f == nil {
		return nil
	}
	defer s.close()
	if err := lock(ctx, s.f, syscall.LOCK_SH); err != nil {
		return fmt.Errorf("process %d has not finished with %s: %w", s.PID, s.Image, err)
	}
	if isAt(s.f, s.path) {
		return removeRecord(s.path)
	}
	return nil
}

func (s server) close() {
	if s.f != nil {
		s.f.Close()
	}
}
