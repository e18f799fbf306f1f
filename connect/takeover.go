package connect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

// A DifferentError says that what a device waits for is not what it was
// offered.
type DifferentError struct {
	Path           string
	Image, Offered string
	Property       string // "": they are different images
	Was, Is        string // its values
}

func (e *DifferentError) Error() string {
	if e.Property == "" {
		return fmt.Sprintf("%s waits for %s (%s), which %s (%s) is not", e.Path, e.Image, e.Was, e.Offered, e.Is)
	}
	return fmt.Sprintf("%s waits for %s with %s %s; %s has %s", e.Path, e.Image, e.Property, e.Was, e.Offered, e.Is)
}

// ErrGivenUp is wrapped by the errors of a device that no server can take over
// any more: writes that were answered are lost. The device fails from now on.
var ErrGivenUp = errors.New("is given up, and fails from now on")

// An Orphan is a device whose server, one of this module's, has died. While it
// is held no other process can take the device over, and the old server is
// gone for good: the kernel keeps the lock of a process until its last write
// has ended, also of one that was stopped.
type Orphan struct {
	host   *host
	index  int
	record *record
}

// FindOrphan returns the orphan that a device is; nil if it is not one. A
// device whose server lives, be it stopped, is none.
func FindOrphan(ctx context.Context, device string) (*Orphan, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.findOrphan(ctx, device)
}

func (h *host) findOrphan(ctx context.Context, device string) (*Orphan, error) {
	if device == Auto {
		return nil, nil
	}
	index, err := h.index(device)
	if err != nil || !h.connected(index) {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		s := h.server(index)
		s.close()
		if !s.known() || s.Server != "" {
			return nil, nil
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
				return &Orphan{h, index, &record{r, s.path, f}}, nil
			}
		}
		live := errors.Is(err, syscall.EWOULDBLOCK) && alive(f)
		f.Close()
		if live {
			return nil, nil
		}
		// Somebody has only looked at it, or has just detached it.
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// Path returns the name of the device.
func (o *Orphan) Path() string { return o.host.path(o.index) }

// Image returns the name of what it waits for.
func (o *Orphan) Image() string { return o.record.Image }

// Identity returns what the dead server has noted.
func (o *Orphan) Identity() Identity { return o.record.Identity }

// Connections returns how many the dead server had.
func (o *Orphan) Connections() int { return o.record.Connections }

// Close leaves the device to wait for somebody else.
func (o *Orphan) Close() error { return o.record.f.Close() }

// Check returns a *DifferentError if one of these stores, in their order, or
// of these properties is not as it was.
func (o *Orphan) Check(offered string, stores []string, properties []Property) error {
	for i, is := range stores {
		was := "nothing more"
		if i < len(o.record.Stores) {
			was = o.record.Stores[i]
		}
		if was != is {
			return &DifferentError{Path: o.Path(), Image: o.record.Image, Offered: offered, Was: was, Is: is}
		}
	}
	for _, p := range properties {
		if was := o.record.property(p.Name); was != p.Value {
			return &DifferentError{o.Path(), o.record.Image, offered, p.Name, orNone(was), orNone(p.Value)}
		}
	}
	return nil
}

func (i *Identity) property(name string) string {
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

// GiveUp has the device fail, since nobody can have what its server had
// answered. It returns why, which is an ErrGivenUp.
func (o *Orphan) GiveUp(why string) error {
	err := fmt.Errorf("%s %w: %s, so writes that its server had answered may be lost", o.Path(), ErrGivenUp, why)
	return errors.Join(err, o.host.disconnect(o.index), o.record.close())
}

// TakeOver gives the device new connections, as many as it had. It returns
// when the device answers by them: what waits in the kernel goes on. The
// Orphan is the Attachment's then; on an error it is still held, and the
// device goes on waiting.
func (o *Orphan) TakeOver(ctx context.Context, opt Options) (*Attachment, error) {
	if opt.Connections != o.record.Connections {
		return nil, fmt.Errorf("%s had %d connections, not %d", o.Path(), o.record.Connections, opt.Connections)
	}
	if err := o.Check(opt.Image, opt.Identity.Stores, opt.Identity.Properties); err != nil {
		return nil, err
	}
	if was, is := len(o.record.Stores), len(opt.Identity.Stores); was != is {
		return nil, &DifferentError{o.Path(), o.record.Image, opt.Image, "files", fmt.Sprint(was), fmt.Sprint(is)}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s does not answer, after %v", o.Path(), patience))
	defer cancel()
	var asking bool
	answers := make(chan error, 1)
	a := &Attachment{host: o.host, opt: opt, index: o.index, backend: o.record.Backend, record: o.record}
	for {
		c, err := a.connectAnew(ctx)
		if err != nil {
			return nil, err
		}
		// A socket for which the kernel has no place yet, because it has not
		// seen the end of the old one, is ignored in silence. Only an answer
		// says that one was taken. To have sent too many does no harm.
		if !asking {
			asking = true
			go func() { answers <- o.host.readBlock(o.Path(), int(c.blockSize)) }()
		}
		select {
		case err = <-answers:
			if err == nil {
				o.record.PID, o.record.Image = os.Getpid(), opt.Image
				return a, o.record.write()
			}
			asking = false
			if sleep(ctx, 20*time.Millisecond) != nil {
				return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// connectAnew negotiates and hands the connections to the kernel, if what is
// at their other ends is what was there before.
func (a *Attachment) connectAnew(ctx context.Context) (*config, error) {
	a.session = nil
	conns, err := a.negotiate(ctx)
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	c, err := a.opt.config(a.session)
	if err != nil {
		return nil, err
	}
	o := Orphan{a.host, a.index, a.record}
	if err := o.Check(a.opt.Image, nil, c.properties()); err != nil {
		return nil, err
	}
	if size := a.host.size(a.index); size != c.size { // the kernel's word counts
		return nil, &DifferentError{a.Path(), o.Image(), a.opt.Image, "size", fmt.Sprint(size), fmt.Sprint(c.size)}
	}
	err = a.attached(conns...)
	if errors.Is(err, ErrNotAttached) {
		return nil, fmt.Errorf("%s was detached, and stays only until all have closed it: %w", a.Path(),
			&BusyError{a.Path(), append(a.host.holders(a.index), a.host.openers(a.index)...)})
	}
	return c, err
}

// properties are those that negotiation tells.
func (c *config) properties() []Property {
	return []Property{
		{"size", fmt.Sprint(c.size)},
		{"block size", fmt.Sprint(c.blockSize)},
		{"flags", fmt.Sprintf("%#x", c.flags)},
	}
}
