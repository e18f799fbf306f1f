package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/imgnbd/imgnbd/storage"
)

// A layer is one image of a chain while it is open: the Opener that its format
// gets. It knows who named it, so that nothing names itself.
type layer struct {
	chain *Chain
	name  string // as it is shown
	id    string // identity of its store
	above *layer // who names it; nil for the first
	depth int
	alone bool        // nothing is opened below it, and what would show reads as zeros
	opt   OpenOptions // what layers below inherit: Direct, NoLock
}

// open opens what l stands for.
func (l *layer) open(ctx context.Context, src source, opt OpenOptions) (Device, error) {
	f, looked, guessed, err := l.formatOf(ctx, &src)
	if err != nil {
		return nil, err
	}
	s, err := l.openStore(ctx, src, f, opt)
	if err != nil {
		return nil, err
	}
	d, err := l.openFormat(ctx, s, f, opt, src, looked)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if guessed && !d.Info().ReadOnly {
		l.chain.warn("Image format was not specified for '%s' and probing guessed raw.\n"+
			"         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n"+
			"         Specify the 'raw' format explicitly to remove the restrictions.", src.name)
		d = ProbeGuard(d, l.chain.Formats)
	}
	return d, nil
}

// check checks what l stands for.
func (l *layer) check(ctx context.Context, src source, opt OpenOptions, what CheckOptions) (res CheckResult, format string, err error) {
	f, looked, _, err := l.formatOf(ctx, &src)
	if err != nil {
		return res, "", err
	}
	if f.Check == nil {
		return res, f.Name, l.uncheckable(ctx, src, opt)
	}
	s, err := l.openStore(ctx, src, f, opt)
	if err != nil {
		return res, f.Name, err
	}
	if err = l.same(s, f, looked); err == nil && !opt.ReadOnly {
		err = l.settled(s, f)
	}
	if err == nil {
		if opt.ReadOnly {
			l.missed(s, f)
		}
		res, err = f.Check(ctx, s, Options{Name: src.name, ReadOnly: opt.ReadOnly, Params: src.params, Warn: l.chain.Warn}, what)
	}
	return res, f.Name, errors.Join(err, s.Close())
}

// uncheckable is why an image is not checked, which is its format only if it is in
// that format, and can be read. That takes a look, without a lock.
func (l *layer) uncheckable(ctx context.Context, src source, opt OpenOptions) error {
	opt.ReadOnly, opt.NoLock = true, true
	d, err := l.open(ctx, src, opt)
	if err == nil {
		err = d.Close()
	}
	if err != nil {
		return err
	}
	return ErrNoCheck
}

// formatOf finds out the format of an image, and where that takes a look, the
// identity of the store that was looked at and whether it is a guess.
func (l *layer) formatOf(ctx context.Context, src *source) (f *Format, looked string, guessed bool, err error) {
	if src.format != "" {
		f, err = l.chain.format(src.format)
		return f, "", false, err
	}
	if l.chain.Policy.Untrusted {
		return nil, "", false, &Hint{
			Err:    errors.New("what an untrusted image says of its format is not believed"),
			Advice: "give the format: -f raw, -f qcow2",
		}
	}
	f, looked, guessed, err = l.look(ctx, *src)
	if err != nil {
		return nil, "", false, err
	}
	if guessed && len(src.params) > 0 {
		// Besides being a guess, they would show the guard another disk than
		// is recognised the next time.
		return nil, "", false, &Hint{Err: errors.New("options for a format that is a guess"), Advice: "give the format: -f raw"}
	}
	src.format = f.Name
	return f, looked, guessed, nil
}

// look recognises an image without disturbing who uses it.
func (l *layer) look(ctx context.Context, src source) (f *Format, id string, guessed bool, err error) {
	s, err := l.chain.openStore(ctx, src, storage.Options{Share: storage.ShareNoLock, Timeout: l.opt.Timeout})
	if err != nil {
		return nil, "", false, err
	}
	f, guessed, err = l.chain.recognise(s)
	return f, identity(s), guessed, errors.Join(err, s.Close())
}

// openStore opens the store of an image with the access that its format needs.
func (l *layer) openStore(ctx context.Context, src source, f *Format, opt OpenOptions) (storage.Store, error) {
	so := storage.Options{Timeout: opt.Timeout, Direct: opt.Direct}
	switch {
	case opt.ReadOnly:
		so.Access = storage.Read
	case f.Grows:
		so.Access = storage.WriteGrow
	default:
		so.Access = storage.Write
	}
	switch {
	case opt.NoLock:
		so.Share = storage.ShareNoLock
	case f.ShareWrite && !opt.ReadOnly:
		so.Share = storage.ShareWrite
	}
	return l.chain.openStore(ctx, src, so)
}

// openFormat gives s its meaning. looked is the identity of the store in which
// the format was recognised, "" if nobody looked.
func (l *layer) openFormat(ctx context.Context, s storage.Store, f *Format, opt OpenOptions, src source, looked string) (Device, error) {
	l.id, l.alone = identity(s), src.alone
	l.opt = OpenOptions{Direct: opt.Direct, NoLock: opt.NoLock, Timeout: opt.Timeout}
	if err := l.same(s, f, looked); err != nil {
		return nil, err
	}
	o := Options{
		Name:     src.name,
		ReadOnly: opt.ReadOnly,
		Refs:     l,
		Params:   src.params,
		Unmap:    opt.Unmap,
		Warn:     l.chain.Warn,
		Notice:   l.chain.Notice,

		Untrusted: l.chain.Policy.Untrusted,
	}
	if opt.ReadOnly {
		l.missed(s, f)
		return f.Open(ctx, s, o)
	}
	j, err := l.openJournal(s, f)
	if err != nil {
		return nil, err
	}
	if j == nil {
		return f.Open(ctx, s, o)
	}
	o.Journal, o.GrowJournal = j.Memory(), j.Grow
	d, err := f.Open(ctx, &journaled{s, j}, o)
	if err != nil {
		return nil, errors.Join(journalError(err, j), j.Close())
	}
	return d, nil
}

// same returns an error unless s is what was looked at and of the same format.
func (l *layer) same(s storage.Store, f *Format, looked string) error {
	if looked == "" {
		return nil
	}
	now, _, err := l.chain.recognise(s)
	if err != nil {
		return err
	}
	if looked != identity(s) || now.Name != f.Name {
		return errors.New("it changed while it was being opened")
	}
	return nil
}

// OpenImage opens a backing image of l, read-only.
func (l *layer) OpenImage(ctx context.Context, ref Reference) (Device, error) {
	if l.alone {
		return hole{}, nil
	}
	below, src, f, err := l.admit(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	opt := l.opt
	opt.ReadOnly = true
	opt.NoLock = opt.NoLock || src.noLock
	opt.Direct = opt.Direct || src.direct
	s, err := l.chain.openStore(ctx, src, storage.Options{Share: share(opt.NoLock), Direct: opt.Direct, Timeout: opt.Timeout})
	if err != nil {
		return nil, Wrap("open", src.name, err)
	}
	looked := ""
	if ref.Format == "" && src.format == "" {
		looked = below.id
	}
	admitted := below.id
	if identity(s) != admitted {
		err = errors.New("it changed while it was being opened")
	}
	if err == nil {
		var d Device
		if d, err = below.openFormat(ctx, s, f, opt, src, looked); err == nil {
			return d, nil
		}
	}
	return nil, Wrap("open", src.name, errors.Join(err, s.Close()))
}

func share(noLock bool) storage.Sharing {
	if noLock {
		return storage.ShareNoLock
	}
	return storage.ShareRead
}

// OpenStore opens a data file of l.
func (l *layer) OpenStore(ctx context.Context, ref Reference, write bool) (storage.Store, error) {
	below, src, _, err := l.admit(ctx, ref, false)
	if err != nil {
		return nil, err
	}
	if err := src.plain(); err != nil {
		return nil, Wrap("open", src.name, err)
	}
	switch {
	case write && src.readOnly:
		return nil, Wrap("open", src.name, ErrReadOnly)
	case write && src.noLock:
		return nil, Wrap("open", src.name, errUnlocked)
	}
	so := storage.Options{Share: share(l.opt.NoLock || src.noLock), Direct: l.opt.Direct || src.direct, Timeout: l.opt.Timeout}
	if write {
		so.Access = storage.WriteGrow
	}
	s, err := l.chain.openStore(ctx, src, so)
	if err != nil {
		return nil, Wrap("open", src.name, err)
	}
	if identity(s) != below.id {
		err := errors.New("it changed while it was being opened")
		return nil, Wrap("open", src.name, errors.Join(err, s.Close()))
	}
	return s, nil
}

// admit decides whether l may name ref. It looks at the file without a lock,
// since an image that names itself could not be locked again, and returns
// what it saw: what is opened afterwards has to have the same identity.
func (l *layer) admit(ctx context.Context, ref Reference, isImage bool) (*layer, source, *Format, error) {
	maxDepth := l.chain.MaxDepth
	if maxDepth == 0 {
		maxDepth = defaultMaxDepth
	}
	if l.depth >= maxDepth {
		return nil, source{}, nil, refused(ref.Name, fmt.Sprintf("the chain has more than %d images", maxDepth))
	}
	src, dirs, err := l.resolve(ref)
	if err != nil {
		return nil, src, nil, err
	}
	if isImage {
		if err := l.chain.settle(&src, ref.Format); err != nil {
			return nil, src, nil, Wrap("open", src.name, fmt.Errorf("%w: %w", ErrReference, err))
		}
	}
	s, err := l.chain.openFile(ctx, src, storage.Options{Share: storage.ShareNoLock, Timeout: l.opt.Timeout})
	if err != nil {
		return nil, src, nil, Wrap("open", src.name, err)
	}
	for _, dir := range dirs {
		if err := checkFile(s, src.url.Path, dir); err != nil {
			return nil, src, nil, errors.Join(err, s.Close())
		}
	}
	if s, err = src.within(s); err != nil {
		return nil, src, nil, Wrap("open", src.name, err)
	}
	below := &layer{chain: l.chain, name: src.name, id: identity(s), above: l, depth: l.depth + 1}
	f, err := below.examine(s, src, isImage)
	if err = errors.Join(err, s.Close()); err != nil {
		return nil, src, nil, err
	}
	return below, src, f, nil
}

// resolve finds out what ref means and whether the policy lets it be looked
// at, and if so, which directories it has to lie below.
func (l *layer) resolve(ref Reference) (src source, dirs []string, err error) {
	if ref.From == nil {
		// A parameter of the format. Below the first image parameters come
		// from json: names in images, which are not the user's.
		if l.depth > 0 {
			return src, nil, refused(ref.Name, "only the user may name it that way")
		}
		src, err = parseName(ref.Name)
		return src, nil, err
	}
	if src, err = resolve(ref.From, l.name, ref.Name); err != nil {
		return src, nil, fmt.Errorf("%q: %w: %w", ref.Name, ErrReference, err)
	}
	dirs, err = l.chain.Policy.checkName(ref.From, ref.Name, src)
	return src, dirs, err
}

// examine finds out whether s may be below what is above l, and the format that it
// is in.
func (l *layer) examine(s storage.Store, src source, isImage bool) (*Format, error) {
	for a := l.above; a != nil && l.id != ""; a = a.above {
		if a.id == l.id {
			return nil, refused(l.name, fmt.Sprintf("%s names it, and lies below it: a loop", l.above.name))
		}
	}
	if !isImage {
		return nil, nil
	}
	if src.format != "" {
		return l.chain.format(src.format)
	}
	f, guessed, err := l.chain.recognise(s)
	if err != nil {
		return nil, Wrap("open", src.name, err)
	}
	if guessed {
		return nil, &Hint{
			Err:    refused(l.name, fmt.Sprintf("%s does not say its format, and raw would be a guess", l.above.name)),
			Advice: fmt.Sprintf("if it is raw, say so: qemu-img rebase -u -F raw -b %s %s", l.name, l.above.name),
		}
	}
	l.chain.warn("%s does not say the format of its backing image %s, which was recognised as %s.", l.above.name, l.name, f.Name)
	return f, nil
}
