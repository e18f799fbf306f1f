package connect

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// A server hands its device over to another process without the kernel
// noticing: what moves is the server's end of each socket, with the lock on the
// record. On the control socket beside the record
//
//	the successor connects;
//	the server finishes, closes its image and sends a letter, with the record,
//	the sockets and the locks of the image as descriptors, and what has arrived
//	on the sockets;
//	the successor opens the image, for which it lets go of the locks, and says
//	"taken";
//	the server says "go" and ends.
//
// Before "go" the successor touches no socket, and after it the server does
// not. If either end is gone before, the server goes on, or the device waits.

const (
	handoverTime = time.Minute // of a handover, for the successor to open the image
	maxHanded    = 200         // connections
	maxFiles     = 253         // that the kernel passes at once
)

// A Handed connection is the server's end of one that the kernel has.
type Handed struct {
	Conn  net.Conn
	Input []byte // has arrived, and begins with a request
}

// A HeldLock keeps others from what belongs to an image while it is open
// nowhere.
type HeldLock struct {
	Store string // what is locked, by a name that both sides know
	File  *os.File
}

// A letter says what comes with it.
type letter struct {
	Inputs []int    `json:"inputs"`          // lengths, in the order of the sockets
	Locks  []string `json:"locks,omitempty"` // of which stores
}

func (h *host) controlPath(index int) string { return filepath.Join(h.run, name(index)+".sock") }

// A Successor is a process that wants to serve the device in place of this one.
type Successor struct {
	PID  int
	conn *net.UnixConn
}

// Close turns the successor away.
func (s *Successor) Close() error { return s.conn.Close() }

// Successors are those that ask, one after the other.
func (a *Attachment) Successors() <-chan *Successor { return a.successors }

// listen begins to wait for successors.
func (a *Attachment) listen() error {
	path := a.host.controlPath(a.index)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	a.control, a.successors = l, make(chan *Successor)
	go a.accept(l, a.successors)
	return nil
}

// accept passes on who asks, until the listener is closed.
func (a *Attachment) accept(l *net.UnixListener, to chan<- *Successor) {
	defer close(to)
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.opt.Log.Warn("cannot accept a successor", "device", a.Path(), "err", err)
			time.Sleep(time.Second)
			continue
		}
		pid, uid, err := caller(conn)
		if err != nil || uid != os.Geteuid() {
			a.opt.Log.Warn("somebody else wants the device", "device", a.Path(), "uid", uid, "err", err)
			conn.Close()
			continue
		}
		to <- &Successor{pid, conn}
	}
}

// stopListening ends accept. Nobody who asks is heard any more.
func (a *Attachment) stopListening() error {
	if a.control == nil {
		return nil
	}
	err := a.control.Close()
	a.control = nil
	for s := range a.successors {
		s.Close()
	}
	a.successors = nil
	return err
}

// Spoil notes why what was answered may be lost, for good: nobody can take the
// device over any more. It may be called at any time, by any goroutine.
func (a *Attachment) Spoil(why string) error { return a.record.spoil(why) }

// HandOver gives the device to a successor: the server's ends of its
// connections, at which nobody may do anything until this returns, and the
// image of which must be closed and have all that was answered, and its locks,
// which are closed here. taken means that the device is the successor's, and this
// process is done with it; before is called when that is certain, while the
// successor still waits. Otherwise the device is still ours, and goes on with
// Keep.
func (a *Attachment) HandOver(s *Successor, conns []Handed, locks []HeldLock, before func()) (taken bool, err error) {
	defer s.Close()
	// Should both ends die now, there is no journal to be found, and need not be.
	err = a.record.update(func(r *Record) { r.Journal, r.Volatile = "", "" })
	if err == nil {
		err = s.conn.SetDeadline(time.Now().Add(handoverTime))
	}
	if err == nil {
		err = a.send(s.conn, conns, locks)
	}
	for _, l := range locks {
		l.File.Close()
	}
	if err != nil {
		return false, fmt.Errorf("%s is not handed over to process %d: %w", a.Path(), s.PID, err)
	}
	if err := expect(s.conn, "taken\n"); err != nil {
		return false, fmt.Errorf("process %d has not taken %s: %w", s.PID, a.Path(), err)
	}
	err = a.stopListening() // the place is the successor's
	before()
	if _, e := io.WriteString(s.conn, "go\n"); e != nil {
		return false, fmt.Errorf("process %d has not taken %s: %w", s.PID, a.Path(), e)
	}
	for _, h := range conns {
		h.Conn.Close()
	}
	return true, errors.Join(err, a.record.f.Close())
}

// Keep goes on with a device that nobody has taken, with what is noted for
// whoever takes it over. The image was closed, and may have been replaced: one that
// is not the same is a *DifferentError. One that has grown is served at the size of
// the device, as before. On an error the device waits for another server, as if
// this one had ended before.
func (a *Attachment) Keep(ctx context.Context, i Identity) error {
	if err := a.unchanged(a.opt.Image, i); err != nil {
		return err
	}
	a.session = nil
	conns, err := a.negotiate(ctx, max(a.opt.Connections, 1))
	for _, conn := range conns {
		conn.Close()
	}
	if err != nil {
		return err
	}
	if size := int64(a.Size()); a.session.Size > size {
		a.opt.Size = size
	}
	c, err := a.compare()
	if err == nil && a.control == nil {
		err = a.listen()
	}
	if err != nil {
		return err
	}
	return a.record.update(func(r *Record) { r.Identity = i.with(c.properties()) })
}

func (a *Attachment) send(to *net.UnixConn, conns []Handed, locks []HeldLock) error {
	if len(conns) > maxHanded {
		return fmt.Errorf("%d connections are too many to be handed over", len(conns))
	}
	files := []*os.File{a.record.f}
	var l letter
	var inputs []byte
	for _, h := range conns {
		fc, ok := h.Conn.(interface{ File() (*os.File, error) })
		if !ok {
			return fmt.Errorf("%T is not a socket", h.Conn)
		}
		f, err := fc.File()
		if err != nil {
			return err
		}
		defer f.Close()
		files = append(files, f)
		l.Inputs = append(l.Inputs, len(h.Input))
		inputs = append(inputs, h.Input...)
	}
	for _, lock := range locks[:min(len(locks), maxFiles-len(files))] {
		files = append(files, lock.File)
		l.Locks = append(l.Locks, lock.Store)
	}
	text, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return sendFiles(to, append(append(text, '\n'), inputs...), files)
}

// livePredecessor returns the server of a device, if it can be asked.
func (h *host) livePredecessor(index int, r Record) (*Predecessor, error) {
	if _, err := os.Stat(h.controlPath(index)); err != nil {
		return nil, fmt.Errorf("%s: process %d cannot be asked to hand it over: %w", h.path(index), r.PID, err)
	}
	return &Predecessor{host: h, index: index, record: &record{Record: r, path: h.recordPath(index)}, lives: true}, nil
}

// Lives reports whether the server lives, and is to hand the device over.
func (p *Predecessor) Lives() bool { return p.lives }

// Receive asks a server that lives, and waits until it has closed its image and
// nothing but its sockets is left of it. It goes on as before unless TakeOver
// succeeds.
func (p *Predecessor) Receive(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, handoverTime, fmt.Errorf("it has not answered after %v: its medium may be slow", handoverTime))
	defer cancel()
	failed := func(err error) error {
		switch {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
			err = errors.New("it has hung up, and its own messages may say why")
		}
		return fmt.Errorf("%s: process %d has not handed it over: %w", p.Path(), p.record.PID, err)
	}
	if p.control, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: p.host.controlPath(p.index), Net: "unix"}); err != nil {
		return failed(err)
	}
	stop := context.AfterFunc(ctx, func() { p.control.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, uid, err := caller(p.control); err != nil || uid != os.Geteuid() {
		return failed(fmt.Errorf("it belongs to user %d: %w", uid, cmp.Or(err, fs.ErrPermission)))
	}
	r, files, err := receiveFiles(p.control)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return failed(err)
	}
	var l letter
	in := bufio.NewReader(r)
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &l)
	}
	if err == nil && (len(files) != 1+len(l.Inputs)+len(l.Locks) || len(l.Inputs) > maxHanded) {
		err = fmt.Errorf("%d descriptors for %d connections and %d locks", len(files), len(l.Inputs), len(l.Locks))
	}
	if err == nil && !isAt(files[0], p.record.path) {
		err = errors.New("another record")
	}
	if err != nil {
		return failed(err)
	}
	for i, n := range l.Inputs {
		h := Handed{Input: make([]byte, min(max(n, 0), 1<<20))}
		if _, err = io.ReadFull(in, h.Input); err == nil {
			h.Conn, err = net.FileConn(files[1+i])
		}
		if err != nil {
			return failed(err)
		}
		p.handed = append(p.handed, h)
	}
	for i, store := range l.Locks {
		p.locks = append(p.locks, HeldLock{store, files[1+len(l.Inputs)+i]})
	}
	p.record.f, files = files[0], files[1:1+len(l.Inputs)]
	return nil
}

// LetGo gives up the lock on a store that was handed over with the device, if
// there is one: its successor has one of its own.
func (p *Predecessor) LetGo(store string) {
	p.locks = slices.DeleteFunc(p.locks, func(l HeldLock) bool {
		if l.Store == store {
			l.File.Close()
		}
		return l.Store == store
	})
}

// letGoAll is LetGo for those of stores that nobody has opened.
func (p *Predecessor) letGoAll() {
	for _, l := range p.locks {
		l.File.Close()
	}
	p.locks = nil
}

// succeed takes the device from a server that lives.
func (p *Predecessor) succeed(ctx context.Context, a *Attachment) (*Attachment, error) {
	c, conns, err := a.look(ctx, a.opt.Connections)
	for _, conn := range conns {
		conn.Close()
	}
	if err != nil {
		return nil, err
	}
	if err := a.guard(); err != nil {
		return nil, err
	}
	if err := p.control.SetDeadline(time.Now().Add(handoverTime)); err != nil {
		return nil, err
	}
	if _, err = io.WriteString(p.control, "taken\n"); err == nil {
		err = expect(p.control, "go\n")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: process %d has not let go of it: %w", p.Path(), p.record.PID, err)
	}
	p.letGoAll()
	a.handed, p.handed, a.replaces = p.handed, nil, false
	// Until that is written, the record is right for an image that is closed.
	if err := a.listen(); err != nil {
		return nil, err
	}
	if err := a.note(c); err != nil {
		return nil, errors.Join(err, a.stopListening())
	}
	return a, nil
}

// Handed are the connections of a device that was handed over; nobody serves
// them yet.
func (a *Attachment) Handed() []Handed { return a.handed }

// expect reads a word.
func expect(r io.Reader, word string) error {
	b := make([]byte, len(word))
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	if string(b) != word {
		return fmt.Errorf("unexpected word %q", b)
	}
	return nil
}

// caller returns who is at the other end.
func caller(conn *net.UnixConn) (pid, uid int, err error) {
	rc, err := conn.SyscallConn()
	if err != nil {
		return 0, -1, err
	}
	uid = -1
	e := rc.Control(func(fd uintptr) { pid, uid, err = peerOf(int(fd)) })
	return pid, uid, errors.Join(err, e)
}

// sendFiles sends text, the files with its first byte.
func sendFiles(to *net.UnixConn, text []byte, files []*os.File) error {
	var fds []int
	for _, f := range files {
		rc, err := f.SyscallConn() // Fd would make the socket a blocking one, here too
		if err == nil {
			err = rc.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
		}
		if err != nil {
			return err
		}
	}
	n, _, err := to.WriteMsgUnix(text[:1], syscall.UnixRights(fds...), nil)
	if err == nil && n == 1 {
		_, err = to.Write(text[1:])
	}
	return err
}

// receiveFiles returns the files that come with the first byte, and all that is
// sent.
func receiveFiles(from *net.UnixConn) (io.Reader, []*os.File, error) {
	var first [1]byte
	rights := make([]byte, syscall.CmsgSpace(4*maxFiles))
	n, got, flags, _, err := from.ReadMsgUnix(first[:], rights)
	if err != nil {
		return nil, nil, err
	}
	if n == 0 {
		return nil, nil, io.ErrUnexpectedEOF
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:got])
	if err != nil {
		return nil, nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := syscall.ParseUnixRights(&m)
		if err != nil {
			return nil, files, err
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	if flags&syscall.MSG_CTRUNC != 0 {
		return nil, files, errors.New("not all descriptors have arrived")
	}
	return io.MultiReader(bytes.NewReader(first[:]), from), files, nil
}
