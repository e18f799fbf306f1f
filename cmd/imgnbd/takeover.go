package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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
	name string               // of the image, for people
	pred *connect.Predecessor // that had the device before; nil: nobody

	check   checker  // nil: anything will do
	stores  []string // in the order in which they are first opened
	opened  []storage.Store
	journal string // the holder of the journal
	asked   bool   // the format has asked for one
	kept    bool   // and has got it

	mu    sync.Mutex
	spoil func() // notes at the device that lost is true; nil: there is no device yet
	lost  bool   // a sync has failed, which who opens the image next would not know
}

// syncFailed is called before anybody hears of it.
func (o *origin) syncFailed() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.lost && o.spoil != nil {
		o.spoil()
	}
	o.lost = true
}

// follow has the device know if what it was answered may be lost.
func (o *origin) follow(spoil func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.spoil = spoil; o.lost {
		spoil()
	}
}

func (o *origin) isLost() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.lost
}

// A checker refuses what a device does not wait for, see
// [connect.Predecessor.Check].
type checker func(offered string, stores []string, properties []connect.Property) error

// newOrigin returns what watches the opening of file.
func newOrigin(file string, pred *connect.Predecessor) (*origin, error) {
	o := &origin{name: file, pred: pred, journal: rand.Text()}
	if pred != nil {
		o.check = pred.Check
	}
	if o.continues() {
		o.journal = pred.Identity().Journal
	}
	if _, err := os.Stat(file); err == nil { // it may also be json: or key=value
		if o.name, err = filepath.Abs(file); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// continues reports whether the journal is one that has to be there: who lives
// and hands over has closed his.
func (o *origin) continues() bool {
	return o.pred != nil && !o.pred.Lives() && o.pred.Identity().Journal != ""
}

// watch has chain tell what it opens, and lets it open nothing but what the
// device waits for.
func (o *origin) watch(chain *image.Chain) {
	for i, p := range chain.Protocols {
		chain.Protocols[i].Open = func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
			if o.pred != nil {
				opt.Taken = func(info storage.Info) { o.pred.LetGo(identityOf(info)) }
			}
			opt.SyncFailed = o.syncFailed
			s, err := p.Open(ctx, u, opt)
			if err != nil {
				return nil, err
			}
			if err := o.saw(s.Info()); err != nil {
				return nil, errors.Join(err, s.Close())
			}
			o.opened = append(o.opened, s)
			return s, nil
		}
	}
	if files, ok := chain.Journals.(*journal.Files); ok {
		files.Holder = o.journal
		files.Continue = o.continues()
		chain.Journals = watchedJournals{files, o}
	}
}

func identityOf(info storage.Info) string { return strings.TrimSpace(info.ID + " " + info.Generation) }

// hold returns the locks of all that is open, for a successor.
func (o *origin) hold() (locks []connect.HeldLock, err error) {
	for _, s := range o.opened {
		h, ok := s.(storage.LockHolder)
		if !ok {
			continue
		}
		f, e := h.HoldLocks()
		switch {
		case errors.Is(e, fs.ErrClosed):
		case e != nil:
			err = errors.Join(err, e)
		case f != nil:
			locks = append(locks, connect.HeldLock{Store: identityOf(s.Info()), File: f})
		}
	}
	return locks, err
}

// saw notes a store that is open, unless it is not the one that has to be
// there.
func (o *origin) saw(info storage.Info) error {
	id := identityOf(info)
	for _, known := range o.stores {
		if known == id {
			return nil
		}
	}
	o.stores = append(o.stores, id)
	if o.check == nil {
		return nil
	}
	return o.check(o.name, o.stores, nil)
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

// findPredecessor looks whether the device had a server that has died, or with
// --replace one that lives, and if so, whether this may be the next one. Nothing
// is opened for writing before that is known: it may be the image of another
// device that waits.
func (s *service) findPredecessor(ctx context.Context) (_ *connect.Predecessor, err error) {
	c := &s.opt.connect
	pred, err := connect.FindPredecessor(ctx, c.device, c.replace)
	if err != nil {
		return nil, err
	}
	if c.origin, err = newOrigin(s.file, pred); err != nil || pred == nil {
		return nil, err
	}
	if !s.opt.flags.Changed("connections") {
		c.connections = pred.Connections()
	}
	err = s.recognise(pred)
	switch {
	case err != nil:
	case pred.Lives() && s.opt.temporary:
		err = errors.New("--replace and --snapshot exclude each other: a temporary overlay ends with its server")
	case pred.Lives() && pred.Identity().Volatile == syncFailed: // it would refuse, where nobody reads why
		err = hinted(fmt.Errorf("%s: %s, so no other server can have it", pred.Path(), syncFailed),
			"umount it, and give up what its server cannot write: imgnbd -d --force "+pred.Path())
	case pred.Lives():
		err = pred.Receive(ctx)
	case pred.Identity().Volatile != "":
		return nil, giveUp(pred, pred.Identity().Volatile)
	}
	if err != nil {
		return nil, errors.Join(err, pred.Close())
	}
	return pred, nil
}

// recognise returns an error unless the image is the one that pred had,
// as far as that can be told without opening it.
func (s *service) recognise(pred *connect.Predecessor) error {
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
	return differs(pred.Check(s.opt.connect.origin.name, nil, s.opt.properties(s.opt.connect.origin.name, in.Format)))
}

// notTaken says why an image that was recognised could not be opened.
func (s *service) notTaken(pred *connect.Predecessor, err error) error {
	_, passing := errors.AsType[syscall.Errno](err)
	switch {
	case pred.Lives():
	case errors.Is(err, journal.ErrGone):
		return giveUp(pred, journal.ErrGone.Error())
	case s.opt.connect.origin.isLost():
		return errors.Join(err, giveUp(pred, syncFailed))
	case errors.Is(err, image.ErrJournal) && !passing:
		return errors.Join(err, giveUp(pred, "its journal cannot be brought back"))
	}
	return differs(err)
}

// giveUp adds to [connect.Predecessor.GiveUp] what can be done.
func giveUp(pred *connect.Predecessor, why string) error {
	return hinted(pred.GiveUp(why), "umount what is on it, attach the image again, and check that")
}

// differs takes what there is to say of two images that differ out of the
// errors around it, and adds what can be done.
func differs(err error) error {
	if d, ok := errors.AsType[*connect.DifferentError](err); ok {
		if d.Lives {
			return hinted(d, "its server goes on; what replaces it has to be "+d.Image+" as it is attached")
		}
		return hinted(d, "attach "+d.Image+" as it was, or give up what waits: imgnbd -d "+d.Path)
	}
	return err
}
