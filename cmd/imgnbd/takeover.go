package main

import (
	"context"
	"crypto/rand"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/journal"
	"github.com/imgnbd/imgnbd/storage"
)

// An origin is where the bytes of a device come from, as seen while its image
// is opened: a server that takes the device over must find the same.
type origin struct {
	name   string          // of the image, for people
	orphan *connect.Orphan // that the image is for; nil: it is for a new device

	stores  []string // in the order in which they are first opened
	journal string   // the holder of the journal
	asked   bool     // the format has asked for one
	kept    bool     // and has got it
}

// newOrigin returns what watches the opening of file.
func newOrigin(file string, orphan *connect.Orphan) (*origin, error) {
	o := &origin{name: file, orphan: orphan, journal: rand.Text()}
	if orphan != nil && orphan.Identity().Journal != "" {
		o.journal = orphan.Identity().Journal
	}
	if _, err := os.Stat(file); err == nil { // it may also be json: or key=value
		if o.name, err = filepath.Abs(file); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// watch has chain tell what it opens, and lets it open nothing but what the
// orphan waits for.
func (o *origin) watch(chain *image.Chain) {
	for i, p := range chain.Protocols {
		chain.Protocols[i].Open = func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
			s, err := p.Open(ctx, u, opt)
			if err != nil {
				return nil, err
			}
			if err := o.saw(s.Info()); err != nil {
				return nil, errors.Join(err, s.Close())
			}
			return s, nil
		}
	}
	if files, ok := chain.Journals.(*journal.Files); ok {
		files.Holder = o.journal
		files.Continue = o.orphan != nil && o.orphan.Identity().Journal != ""
		chain.Journals = watchedJournals{files, o}
	}
}

// saw notes a store that is open, unless it is not the one that has to be
// there.
func (o *origin) saw(info storage.Info) error {
	id := strings.TrimSpace(info.ID + " " + info.Generation)
	for _, known := range o.stores {
		if known == id {
			return nil
		}
	}
	o.stores = append(o.stores, id)
	if o.orphan == nil {
		return nil
	}
	return o.orphan.Check(o.name, o.stores, nil)
}

type watchedJournals struct {
	*journal.Files
	o *origin
}

func (w watchedJournals) Open(info storage.Info) (image.Journal, error) {
	j, err := w.Files.Open(info)
	w.o.asked, w.o.kept = true, j != nil
	return j, err
}

// identity is what the device's server notes once the image is open.
func (o *origin) identity(opt *serveOptions, e *export.Export) connect.Identity {
	i := connect.Identity{Stores: o.stores, Properties: append(opt.properties(o.name, e.Device.Info().Format),
		connect.Property{Name: "first byte", Value: strconv.FormatInt(e.Offset, 10)})} // of a partition, which may have moved
	switch {
	case opt.temporary && !opt.readOnly:
		i.Volatile = "its overlay was temporary (-s)"
	case o.kept:
		i.Journal = o.journal
	case o.asked && !opt.cache.writeThrough:
		i.Volatile = "its server kept no journal"
	}
	return i
}

// properties are what the command line says of the bytes that are shown.
func (o *serveOptions) properties(name, format string) []connect.Property {
	p := []connect.Property{
		{Name: "format", Value: format},
		{Name: "offset", Value: strconv.FormatInt(o.offset, 10)},
		{Name: "partition", Value: strconv.Itoa(o.partition)},
		{Name: "read-only", Value: strconv.FormatBool(o.readOnly)},
		{Name: "temporary overlay", Value: strconv.FormatBool(o.temporary)},
	}
	if o.snapshot != nil {
		s := *o.snapshot
		p = append(p, connect.Property{Name: "snapshot", Value: strings.Join([]string{s.Any, s.ID, s.Name}, "/")})
	} else {
		p = append(p, connect.Property{Name: "snapshot"})
	}
	options := ""
	if o.images.imageOpts || strings.HasPrefix(name, "json:") {
		options = name
	}
	return append(p, connect.Property{Name: "options", Value: options})
}

// findOrphan looks whether the device waits for a server, and if so, whether
// this may be it. Nothing is opened for writing before that is known: it may
// be the image of another device that waits.
func (s *service) findOrphan() (_ *connect.Orphan, err error) {
	c := &s.opt.connect
	orphan, err := connect.FindOrphan(context.Background(), c.device)
	if err != nil {
		return nil, err
	}
	if c.origin, err = newOrigin(s.file, orphan); err != nil || orphan == nil {
		return nil, err
	}
	if !s.opt.flags.Changed("connections") {
		c.connections = orphan.Connections()
	}
	if err := s.recognise(orphan); err != nil {
		return nil, errors.Join(err, orphan.Close())
	}
	if why := orphan.Identity().Volatile; why != "" {
		return nil, orphan.GiveUp(why)
	}
	return orphan, nil
}

// recognise returns an error unless the image is the one that orphan waits
// for, as far as that can be told without opening it.
func (s *service) recognise(orphan *connect.Orphan) error {
	t, err := s.opt.images.target(s.file, s.opt.flags.Changed("format"), nbdWords)
	if err != nil {
		return err
	}
	chain := s.opt.images.chain(s.u)
	chain.Journals, chain.Warn = nil, nil // it is only looked at
	s.opt.connect.origin.watch(chain)
	opt := t.opt
	opt.NoLock = true
	in, err := chain.Inspect(context.Background(), t.name, opt)
	if err != nil {
		if d := differs(err); d != err {
			return d
		}
		return t.failed(err)
	}
	return differs(orphan.Check(s.opt.connect.origin.name, nil, s.opt.properties(s.opt.connect.origin.name, in.Format)))
}

// notTaken says why an image that was recognised could not be opened.
func (s *service) notTaken(orphan *connect.Orphan, err error) error {
	_, passing := errors.AsType[syscall.Errno](err)
	switch {
	case errors.Is(err, journal.ErrGone):
		return orphan.GiveUp(journal.ErrGone.Error())
	case errors.Is(err, image.ErrJournal) && !passing:
		return errors.Join(err, orphan.GiveUp("its journal cannot be brought back"))
	}
	return differs(err)
}

// differs takes what there is to say of two images that differ out of the
// errors around it, and adds what can be done.
func differs(err error) error {
	if d, ok := errors.AsType[*connect.DifferentError](err); ok {
		return hinted(d, "attach "+d.Image+" as it was, or give up what waits: imgnbd -d "+d.Path)
	}
	return err
}
