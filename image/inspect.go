package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/imgnbd/imgnbd/storage"
)

// An Inspection is what `info` shows of an image: what its header says, and
// nothing that would have to be opened.
type Inspection struct {
	Format        string
	VirtualSize   int64 // bytes; -1 if unknown
	ClusterSize   int64 // bytes; 0 if the format has none
	Encrypted     bool
	Dirty         bool
	BackingName   string // as written in the image; "" if it has no backing
	BackingFormat string // as declared; "" if it is not
	DataFile      string // as written in the image; "" if it has none
	Snapshots     []Snapshot

	// Specific is encoded as the object "data" of "format-specific" by
	// encoding/json, with qemu-img's names and order; nil if there is nothing.
	Specific any

	// Problem is why Open refuses the image; nil if it does not.
	Problem error
}

// Inspected is an Inspection together with where it was made.
type Inspected struct {
	*Inspection
	Name     string // the image, as it is shown to people
	Backing  string // what BackingName means, seen from Name; "" if there is none
	DiskSize int64  // bytes that its file takes on its host, also if it is a part; -1 if unknown
}

// Inspect tells what an image says about itself. It opens nothing that the
// image names. Unless told otherwise it takes the lock of a reader, so an image
// that somebody is writing is refused rather than read half-way; but not a raw
// one, of which nothing is told that a writer could change under way.
func (c *Chain) Inspect(ctx context.Context, name string, opt OpenOptions) (*Inspected, error) {
	src, err := c.parse(name)
	if err != nil {
		return nil, &Error{"open", name, err}
	}
	opt.ReadOnly = true
	l, err := c.top(&src, &opt)
	if err != nil {
		return nil, Wrap("open", src.name, err)
	}
	in, err := l.inspect(ctx, src, opt, nil)
	return in, Wrap("open", src.name, err)
}

// InspectChain inspects an image and all images below it, the first first. On
// an error it returns what it has.
func (c *Chain) InspectChain(ctx context.Context, name string, opt OpenOptions) ([]*Inspected, error) {
	var all []*Inspected
	err := c.walk(ctx, name, opt, func(_ *layer, _ source, in *Inspected, _ storage.Store) error {
		all = append(all, in)
		return nil
	})
	return all, err
}

// Uses looks for files among an image, those below it and the data files of all of
// these, and those of which any is a part. It returns the first that it finds and
// its name there, which may be another; "" if it finds none. On an error it has not
// looked at everything. A file that cannot be opened for reading is not found.
func (c *Chain) Uses(ctx context.Context, name string, opt OpenOptions, files ...string) (file, as string, err error) {
	ids := make(map[string]string)
	for _, f := range files {
		if src, err := parseName(f); err == nil {
			ids[c.identify(ctx, src)] = f
		}
	}
	delete(ids, "")
	look := func(src source, name string) {
		if f := ids[c.identify(ctx, src)]; f != "" && file == "" {
			file, as = f, name
		}
	}
	if src, err := parseName(name); err == nil {
		look(src, name) // be it an image or not
	}
	if file != "" {
		return file, as, nil
	}
	err = c.walk(ctx, name, opt, func(l *layer, src source, in *Inspected, s storage.Store) error {
		look(src, in.Name)
		if in.DataFile == "" {
			return nil
		}
		_, data, _, err := l.admit(ctx, Reference{Name: in.DataFile, From: s}, false)
		if err == nil {
			look(data, data.name)
		}
		return err
	})
	return file, as, err
}

// identify returns the identity of the file in which src lies, "" if it cannot be
// opened.
func (c *Chain) identify(ctx context.Context, src source) string {
	s, err := c.openFile(ctx, src, storage.Options{Share: storage.ShareNoLock})
	if err != nil {
		return ""
	}
	defer s.Close()
	return identity(s)
}

// walk inspects an image and all images below it, the first first, and visits
// each while it is open.
func (c *Chain) walk(ctx context.Context, name string, opt OpenOptions, visit func(*layer, source, *Inspected, storage.Store) error) error {
	src, err := c.parse(name)
	if err != nil {
		return &Error{"open", name, err}
	}
	opt.ReadOnly = true
	l, err := c.top(&src, &opt)
	if err != nil {
		return Wrap("open", src.name, err)
	}
	for {
		below, belowSrc := (*layer)(nil), source{}
		_, err := l.inspect(ctx, src, opt, func(in *Inspected, s storage.Store) error {
			l.id = identity(s)
			if err := visit(l, src, in, s); err != nil || in.BackingName == "" {
				return err
			}
			var f *Format
			var err error
			below, belowSrc, f, err = l.admit(ctx, Reference{Name: in.BackingName, Format: in.BackingFormat, From: s}, true)
			if err == nil {
				belowSrc.format = f.Name
			}
			return err
		})
		if err != nil {
			return Wrap("open", src.name, err)
		}
		if below == nil {
			return nil
		}
		l, src = below, belowSrc
		opt = OpenOptions{ReadOnly: true, NoLock: opt.NoLock || src.noLock, Direct: opt.Direct, Timeout: opt.Timeout}
	}
}

// inspect inspects one image and, while it is open, calls with. It returns what
// it found even if with fails.
func (l *layer) inspect(ctx context.Context, src source, opt OpenOptions, with func(*Inspected, storage.Store) error) (in *Inspected, err error) {
	if src.format == "" {
		f, _, _, err := l.look(ctx, src)
		if err != nil {
			return nil, err
		}
		src.format = f.Name
	}
	f, err := l.chain.format(src.format)
	if err != nil {
		return nil, err
	}
	if f.Inspect == nil {
		return nil, fmt.Errorf("images of format %s cannot be inspected", f.Name)
	}
	so := storage.Options{Share: share(opt.NoLock), Direct: opt.Direct, Timeout: opt.Timeout}
	if f.ShareWrite && !opt.NoLock {
		so.Share = storage.ShareWrite // a writer changes nothing that is told here
	}
	s, err := l.chain.openFile(ctx, src, so)
	if err != nil {
		return nil, err
	}
	size := diskSize(s)
	if s, err = src.within(s); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	found, err := f.Inspect(ctx, s, src.params)
	if err != nil {
		return nil, err
	}
	l.name = src.name
	l.missed(s, f)
	in = &Inspected{Inspection: found, Name: src.name, DiskSize: size}
	if found.BackingName != "" {
		in.Backing = combine(src.name, found.BackingName)
	}
	if with != nil {
		err = with(in, s)
	}
	return in, err
}
