package connect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// An Identity is what the server of a device notes of its image, for
// another that takes the device over when it has died.
type Identity struct {
	Stores     []string   `json:"stores,omitempty"`     // the files and devices that it consists of
	Properties []Property `json:"properties,omitempty"` // that a successor must agree in

	// Journal is what outlives the server of the writes that it has answered:
	// whoever takes over needs just this one. "": the image has them all.
	Journal string `json:"journal,omitempty"`

	// Volatile says why answered writes may end with the server. "": they do
	// not, and the device can be taken over.
	Volatile string `json:"volatile,omitempty"`
}

// A Property is one thing that a server and its successor must agree in.
type Property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// A DifferentError says that what a device waits for, or is, is not what it was
// offered.
type DifferentError struct {
	Path           string
	Image, Offered string
	Property       string // "": they are different images
	Was, Is        string // its values
	Lives          bool   // the server of Image, which goes on: nothing waits
}

func (e *DifferentError) Error() string {
	device := e.Path + " waits for " + e.Image
	if e.Lives {
		device = e.Path + " is " + e.Image
	}
	if e.Property == "" {
		return fmt.Sprintf("%s (%s), which %s (%s) is not", device, e.Was, e.Offered, e.Is)
	}
	return fmt.Sprintf("%s with %s %s; %s has %s", device, e.Property, e.Was, e.Offered, e.Is)
}

// ErrGivenUp is wrapped by the errors of a device that no server can take over
// any more: writes that were answered are lost. The device fails from now on.
var ErrGivenUp = errors.New("is given up, and fails from now on")

// A Predecessor is a server of this module's whose device another one is to
// serve.
//
// One that has died is gone for good: the kernel keeps the lock of a process
// until its last write has ended, also of one that was stopped. Who has the
// Predecessor has that lock, and nobody else can take the device over. One that
// lives has to hand the device over itself, see Receive.
type Predecessor struct {
	host    *host
	index   int
	record  *record
	lives   bool
	control *net.UnixConn // to one that lives, once it was asked
	handed  []Handed
	locks   []HeldLock
}

// FindPredecessor returns the server of a device that has died; with live also
// one that lives, if it can be asked to hand the device over. nil: there is
// none.
func FindPredecessor(ctx context.Context, device string, live bool) (*Predecessor, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.findPredecessor(ctx, device, "", live)
}

// findPredecessor looks for a server of an image, or for the process between the
// kernel and a server.
func (h *host) findPredecessor(ctx context.Context, device, server string, live bool) (*Predecessor, error) {
	if device == Auto {
		return nil, nil
	}
	index, err := h.index(device)
	if err != nil || !h.connected(index) {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s: %s cannot be used, after %v", h.path(index), h.recordPath(index), patience))
	defer cancel()
	for {
		s := h.server(index)
		s.close()
		if !s.known() || s.Server != server || s.Direct {
			return nil, nil
		}
		if err := h.makeRun(); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(s.path, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && isAt(f, s.path) && h.connected(index) {
			// Nobody else writes to it now.
			var r Record
			if r, err = readRecord(f); err == nil && r.Backend == s.Backend {
				return &Predecessor{host: h, index: index, record: &record{Record: r, path: s.path, f: f}}, nil
			}
		}
		lives := errors.Is(err, syscall.EWOULDBLOCK) && alive(f)
		f.Close()
		switch {
		case lives && live:
			return h.livePredecessor(index, s.Record)
		case lives:
			return nil, nil
		}
		// Somebody has only looked at it, or has just detached it.
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// Path returns the name of the device.
func (p *Predecessor) Path() string { return p.host.path(p.index) }

// Image returns the name of what it waits for.
func (p *Predecessor) Image() string { return p.record.Image + p.record.Server }

// Identity returns what the dead server has noted.
func (p *Predecessor) Identity() Identity { return p.record.identity() }

// Connections returns how many the dead server had.
func (p *Predecessor) Connections() int { return p.record.Connections }

// Close leaves the device to wait for somebody else, or to a server that lives.
func (p *Predecessor) Close() error {
	p.letGoAll()
	for _, h := range p.handed {
		h.Conn.Close()
	}
	var err error
	if p.record.f != nil {
		err = p.record.f.Close()
	}
	if p.control != nil {
		err = errors.Join(err, p.control.Close())
	}
	return err
}

// Check returns a *DifferentError if one of these stores, in their order, or
// of these properties is not as it was.
func (p *Predecessor) Check(offered string, stores []string, properties []Property) error {
	for i, is := range stores {
		was := "nothing more"
		if i < len(p.record.Stores) {
			was = p.record.Stores[i]
		}
		if was != is {
			return p.different(offered, "", was, is)
		}
	}
	for _, is := range properties {
		if was := p.record.Property(is.Name); was != is.Value {
			return p.different(offered, is.Name, orNone(was), orNone(is.Value))
		}
	}
	return nil
}

// checkConnections is Check for the number of them.
func (p *Predecessor) checkConnections(opt *Options) error {
	if was, is := p.record.Connections, opt.Connections; was != is {
		return p.different(opt.Image+opt.Server, "connections", fmt.Sprint(was), fmt.Sprint(is))
	}
	return nil
}

func (p *Predecessor) different(offered, property, was, is string) error {
	return &DifferentError{Path: p.Path(), Image: p.Image(), Offered: offered, Property: property, Was: was, Is: is, Lives: p.lives}
}

// Check is that of a Predecessor, for the server of the device itself.
func (a *Attachment) Check(offered string, stores []string, properties []Property) error {
	return a.predecessor().Check(offered, stores, properties)
}

// predecessor returns what had the device before, this process itself unless it
// takes it over.
func (a *Attachment) predecessor() *Predecessor {
	return &Predecessor{host: a.host, index: a.index, record: a.record, lives: a.replaces}
}

// unchanged is Check for an image of which all is known.
func (a *Attachment) unchanged(offered string, i Identity) error {
	if err := a.Check(offered, i.Stores, i.Properties); err != nil {
		return err
	}
	if was, is := len(a.record.Stores), len(i.Stores); was != is {
		return a.predecessor().different(offered, "files", fmt.Sprint(was), fmt.Sprint(is))
	}
	return nil
}

// Property returns the value of a property, "" if it is not there.
func (i *Identity) Property(name string) string {
	for _, p := range i.Properties {
		if p.Name == name {
			return p.Value
		}
	}
	return ""
}

// with returns i with more properties.
func (i Identity) with(p []Property) Identity {
	i.Properties = slices.Concat(i.Properties, p)
	return i
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// Spoil is that of an Attachment, for the device of a server that has died.
func (p *Predecessor) Spoil(why string) error { return p.record.spoil(why) }

// GiveUp has the device fail, since nobody can have what its server had
// answered. It returns why, which is an ErrGivenUp.
func (p *Predecessor) GiveUp(why string) error {
	err := fmt.Errorf("%s %w: %s, so writes that its server had answered may be lost", p.Path(), ErrGivenUp, why)
	return errors.Join(err, p.host.giveBack(p.index, p.record.Backend), p.record.close())
}

// TakeOver gives the device new connections, as many as it had. It returns
// when the kernel has taken them: what waits there goes on. opt.Dial returns ends
// of a SocketPair. The Predecessor is the Attachment's then; on an error it is
// still held, and the device goes on waiting.
func (p *Predecessor) TakeOver(ctx context.Context, opt Options) (*Attachment, error) {
	if err := p.checkConnections(&opt); err != nil {
		return nil, err
	}
	a := p.attachment(opt)
	if err := a.unchanged(opt.Image, opt.Identity); err != nil {
		return nil, err
	}
	if p.lives {
		return p.succeed(ctx, a)
	}
	if _, err := a.succeedDead(ctx); err != nil {
		return nil, err
	}
	return a, a.listen()
}

// succeedDead makes this process the server of a device whose own has died, if
// what it offers is what was there before, and returns the ends of the
// connections that the kernel has taken.
func (a *Attachment) succeedDead(ctx context.Context) (taken []net.Conn, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s still has connections of the server before, after %v", a.Path(), patience))
	defer cancel()
	// A socket for which the kernel has no place yet, because it has not seen
	// the end of the old one, is ignored in silence. Nothing is read from the
	// device to find out: if this process died while that waits for it, its
	// sockets would stay.
	for first := true; ; first = false {
		if taken, err = a.connectAnew(ctx, taken, first); err != nil {
			return nil, err
		}
		if len(taken) == a.opt.Connections {
			return taken, nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

func (p *Predecessor) attachment(opt Options) *Attachment {
	a := p.host.attachment(opt)
	a.index, a.backend, a.record, a.replaces = p.index, p.record.Backend, p.record, p.lives
	return a
}

// become makes this process the one whose device it is, from which on its own
// guardian looks after what it may leave under way. What it will answer may
// depend on another journal than before, or on none: that is noted first.
func (a *Attachment) become(c *config) error {
	if err := a.guard(); err != nil {
		return err
	}
	if err := a.note(c); err != nil {
		return err
	}
	return a.bePatient()
}

// note makes the record that of this process, and of what it offers.
func (a *Attachment) note(c *config) error {
	if a.opt.Follow != nil {
		a.opt.Follow(a.Spoil)
	}
	return a.record.update(func(r *Record) {
		r.PID, r.Image, r.Partition = os.Getpid(), a.opt.Image, a.opt.Partition
		r.Identity = a.opt.Identity.with(c.properties())
	})
}

// connectAnew negotiates and hands the kernel the connections that it lacks. The
// first time, the device is this process's from when there are any. It returns all
// that the kernel has.
func (a *Attachment) connectAnew(ctx context.Context, taken []net.Conn, first bool) ([]net.Conn, error) {
	c, conns, err := a.look(ctx, a.opt.Connections-len(taken))
	if err == nil && first {
		err = a.refused(a.become(c))
	}
	if err == nil {
		err = a.refused(a.attached(conns...))
	}
	for _, conn := range conns {
		conn.Close()
	}
	if err != nil {
		return nil, err
	}
	return a.host.kept(append(taken, conns...)) // one may have ended since
}

// refused says why a device cannot be taken over.
func (a *Attachment) refused(err error) error {
	if errors.Is(err, ErrNotAttached) {
		return fmt.Errorf("%s was detached, and stays only until all have closed it: %w", a.Path(),
			&BusyError{a.Path(), append(a.host.holders(a.index), a.host.openers(a.index)...)})
	}
	return err
}

// look negotiates with what there is now, and compares. The connections are
// the caller's to close, also on an error.
func (a *Attachment) look(ctx context.Context, connections int) (*config, []net.Conn, error) {
	a.session = nil
	conns, err := a.negotiate(ctx, connections)
	if err != nil {
		return nil, conns, err
	}
	c, err := a.compare()
	return c, conns, err
}

// compare returns what was negotiated, if that is what the device has.
func (a *Attachment) compare() (*config, error) {
	c, err := a.opt.config(a.session)
	if err != nil {
		return nil, err
	}
	if err := a.Check(a.opt.Image+a.opt.Server, nil, c.properties()); err != nil {
		return nil, err
	}
	if size := a.host.size(a.index); size != c.size { // the kernel's word counts
		return nil, a.predecessor().different(a.opt.Image+a.opt.Server, "size", fmt.Sprint(size), fmt.Sprint(c.size))
	}
	return c, nil
}

// properties are those that negotiation tells.
func (c *config) properties() []Property {
	return []Property{
		{"size", fmt.Sprint(c.size)},
		{"block size", fmt.Sprint(c.blockSize)},
		{"flags", fmt.Sprintf("%#x", c.flags)},
	}
}
