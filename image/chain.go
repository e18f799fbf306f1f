package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/imgnbd/imgnbd/storage"
)

// defaultMaxDepth is more layers than any tool makes, and few enough for a
// stack and a table of open files.
const defaultMaxDepth = 200

// A Chain opens images by name, and what those images name, by a policy.
// Fill it in and do not change it afterwards; its methods may be called
// concurrently.
type Chain struct {
	Formats   []Format // in the order of probing; "raw" is the last guess
	Protocols []storage.Protocol
	Policy    Policy
	MaxDepth  int          // images below the first; 0 is 200
	Journals  Journals     // of images that are opened for writing; nil: none are kept
	Warn      func(string) // told of what the user should know; may be nil
	Notice    func(string) // see Options
}

// OpenOptions say how an image is opened.
type OpenOptions struct {
	Format   string // "" to recognise it
	ReadOnly bool
	Direct   bool          // bypass the host's page cache
	NoLock   bool          // look at an image that somebody else may be writing
	Timeout  time.Duration // bound of one operation of a remote store; 0: its default
	Params   []Param       // the format's own options
	Unmap    bool          // see Options
}

// Open opens an image, by a name as QEMU takes it: a path, PROTOCOL:..., or
// json:{...}.
//
// Where the format has to be recognised, the image is looked at without a lock
// and then again under the lock that the format asks for, so that what is
// opened is what was recognised. A writable image that is taken for raw only
// because it is nothing else is guarded against becoming something else; see
// [ProbeGuard].
func (c *Chain) Open(ctx context.Context, name string, opt OpenOptions) (Device, error) {
	src, err := c.parse(name)
	if err != nil {
		return nil, &Error{"open", name, err}
	}
	l, err := c.top(&src, &opt)
	if err == nil {
		var d Device
		if d, err = l.open(ctx, src, opt); err == nil {
			return d, nil
		}
	}
	return nil, Wrap("open", src.name, err)
}

var errUnlocked = errors.New("force-share=on can only be used with read-only images, and so can locking=off")

// top prepares for opening what the user named.
func (c *Chain) top(src *source, opt *OpenOptions) (*layer, error) {
	if err := c.settle(src, opt.Format); err != nil {
		return nil, err
	}
	src.params = append(src.params, opt.Params...)
	opt.ReadOnly = opt.ReadOnly || src.readOnly
	opt.Direct = opt.Direct || src.direct
	opt.NoLock = opt.NoLock || src.noLock
	if opt.NoLock && !opt.ReadOnly {
		return nil, errUnlocked
	}
	return &layer{chain: c, name: src.name}, nil
}

// parse is parseName for formats that there are. Of a name that asks for another
// one nothing else that is wrong with it matters.
func (c *Chain) parse(name string) (source, error) {
	src, err := parseName(name)
	if src.format != "" && !isStoreDriver(src.format) {
		if _, unknown := c.format(src.format); unknown != nil {
			err = unknown
		}
	}
	return src, err
}

// settle brings together the format that the name says and the one that
// somebody else says.
func (c *Chain) settle(src *source, format string) error {
	switch {
	case format == "":
	case src.format == "":
		src.format = format
	case src.format != format:
		return fmt.Errorf("the name says that it is %s, but %s is asked for", src.format, format)
	}
	return nil
}

// Check verifies the structure of an image, and repairs it if it is told to.
// format is what the image was taken for, also with an error where that is
// known. A format without structure is ErrNoCheck. opt.ReadOnly is of no
// account: the image is opened for writing if it is repaired.
func (c *Chain) Check(ctx context.Context, name string, opt OpenOptions, what CheckOptions) (res CheckResult, format string, err error) {
	src, err := c.parse(name)
	if err != nil {
		return res, "", &Error{"open", name, err}
	}
	opt.ReadOnly = what.Repair == RepairNothing
	l, err := c.top(&src, &opt)
	if err != nil {
		return res, "", Wrap("open", src.name, err)
	}
	res, format, err = l.check(ctx, src, opt, what)
	return res, format, Wrap("open", src.name, err)
}

// OpenImage opens a backing image for who has only the store that names it.
// Images that Open returns have their own Opener, which knows all ancestors.
func (c *Chain) OpenImage(ctx context.Context, ref Reference) (Device, error) {
	return c.layerOf(ref).OpenImage(ctx, ref)
}

// OpenStore opens a data file, as OpenImage does an image.
func (c *Chain) OpenStore(ctx context.Context, ref Reference, write bool) (storage.Store, error) {
	return c.layerOf(ref).OpenStore(ctx, ref, write)
}

func (c *Chain) layerOf(ref Reference) *layer {
	l := &layer{chain: c}
	if ref.From != nil {
		l.id = identity(ref.From)
		if u := ref.From.Info().URL; u != nil && u.Scheme == "file" {
			l.name = u.Path
		} else if u != nil {
			l.name = u.Redacted()
		}
	}
	return l
}

func (c *Chain) format(name string) (*Format, error) {
	for i := range c.Formats {
		if c.Formats[i].Name == name {
			return &c.Formats[i], nil
		}
	}
	var known []string
	for _, f := range c.Formats {
		if !f.NameOnly {
			known = append(known, f.Name)
		}
	}
	return nil, &Hint{
		Err:    fmt.Errorf("Unknown driver '%s'", name), // QEMU's words
		Advice: "formats: " + strings.Join(known, ", "),
	}
}

// recognise returns the format that s is in; guessed is set if that is raw,
// for want of anything else.
func (c *Chain) recognise(s storage.Store) (f *Format, guessed bool, err error) {
	size, err := s.Size()
	if err != nil {
		return nil, false, err
	}
	if f, err := probe(c.Formats, s, size); f != nil || err != nil {
		return f, false, err
	}
	f, err = c.format("raw")
	if err != nil {
		return nil, false, ErrWrongFormat
	}
	return f, true, nil
}

// openStore opens what src means.
func (c *Chain) openStore(ctx context.Context, src source, opt storage.Options) (storage.Store, error) {
	s, err := c.openFile(ctx, src, opt)
	if err != nil {
		return nil, err
	}
	return src.within(s)
}

// openFile opens the whole file in which src lies.
func (c *Chain) openFile(ctx context.Context, src source, opt storage.Options) (storage.Store, error) {
	i := slices.IndexFunc(c.Protocols, func(p storage.Protocol) bool { return p.Name == src.url.Scheme })
	if i < 0 {
		return nil, fmt.Errorf("Unknown protocol '%s'", src.url.Scheme) // QEMU's words
	}
	if src.noLock {
		opt.Share = storage.ShareNoLock
	}
	return c.Protocols[i].Open(ctx, src.url, opt)
}

func (c *Chain) warn(format string, args ...any) {
	if c.Warn != nil {
		c.Warn(fmt.Sprintf(format, args...))
	}
}

// identity names the bytes behind a store, whatever path led there.
func identity(s storage.Store) string {
	info := s.Info()
	if info.ID != "" {
		return info.ID
	}
	if info.URL != nil {
		return info.URL.String()
	}
	return ""
}
