package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/drivers"
	"github.com/imgnbd/imgnbd/internal/journal"
)

// imageOptions say what the name of an image means and what the image may name
// in turn. All commands that open images have them.
type imageOptions struct {
	format     string
	imageOpts  bool
	forceShare bool
	canShare   bool // forceShare is an option of the command
	backing    string
	backingDir string
	untrusted  bool // of serving: the image names nothing, says no format, and is held to strict limits
}

var backingPolicies = []string{"any", "same-dir", "none"}

func (o *imageOptions) addFormat(fs *pflag.FlagSet) { fs.StringVarP(&o.format, "format", "f", "", "") }

func (o *imageOptions) addImageOpts(fs *pflag.FlagSet) {
	fs.BoolVar(&o.imageOpts, "image-opts", false, "")
}

func (o *imageOptions) addForceShare(fs *pflag.FlagSet) {
	o.canShare = true
	fs.BoolVarP(&o.forceShare, "force-share", "U", false, "")
}

func (o *imageOptions) addBacking(fs *pflag.FlagSet) {
	value(fs, "backing", "", func(s string) error {
		if !slices.Contains(backingPolicies, s) {
			return fmt.Errorf("--backing=%s is none of %s", s, strings.Join(backingPolicies, ", "))
		}
		o.backing = s
		return nil
	})
	value(fs, "backing-dir", "", func(s string) (err error) {
		o.backingDir, err = filepath.Abs(s) // names are opened later, from elsewhere
		return err
	})
}

// chain returns what opens images by these options. Its warnings go to u.
func (o *imageOptions) chain(u *ui) *image.Chain {
	policy := image.Policy{Dir: o.backingDir, Untrusted: o.untrusted}
	switch {
	case o.backing == "same-dir":
		policy.Allow = image.AllowSameDir
	case o.backing == "none" || o.untrusted:
		policy.Allow = image.AllowNothing
	}
	return &image.Chain{
		Formats:   drivers.Formats(),
		Protocols: drivers.Protocols(),
		Policy:    policy,
		Journals:  &journal.Files{Dirs: journal.Dirs(), Off: true},
		Warn: func(s string) {
			if strings.HasPrefix(s, "Image format was not specified") {
				u.bare("WARNING: " + s) // as QEMU prints it
				return
			}
			u.warning(printable(s)) // one line, and names that images chose
		},
	}
}

// A target is the image that the user named.
type target struct {
	given string // as it was typed
	name  string // as the chain takes it
	shown string // as messages show its file
	words string // what an error of opening it begins with
	share bool   // --force-share would do
	opt   image.OpenOptions
}

// target makes sense of the operand that names the image.
func (o *imageOptions) target(operand string, changed bool, words string) (*target, error) {
	t := &target{given: operand, name: operand, shown: operand, words: words, share: o.canShare}
	t.opt.Format = o.format
	t.opt.NoLock = o.forceShare
	driver, given := o.format, changed
	if o.imageOpts {
		if changed {
			return nil, says("--image-opts and -f are mutually exclusive")
		}
		params := keyValues(operand, "file")
		var err error
		if t.name, err = image.NodeName(params); err != nil {
			return nil, t.failed(err)
		}
		for _, p := range params {
			switch p.Key {
			case "driver":
				driver, given = p.Value, true
			case "filename", "file.filename":
				t.shown = p.Value
			case "discard", "detect-zeroes":
				return nil, t.failed(hinted(fmt.Errorf("the option '%s' is not supported", p.Key), fmt.Sprintf("--%s=%s does it", p.Key, p.Value)))
			case "cache.no-flush":
				return nil, t.failed(hinted(fmt.Errorf("the option '%s' is not supported", p.Key), "--cache=unsafe does it"))
			}
		}
	} else if driver == "file" || driver == "host_device" {
		t.opt.Format = "raw" // the bytes as they are
	}
	if given && driver != "file" && driver != "host_device" {
		known := drivers.Formats()
		if !slices.ContainsFunc(known, func(f image.Format) bool { return f.Name == driver }) {
			return nil, t.failed(hinted(says("Unknown driver '%s'", driver), "formats: "+formatNames(known)))
		}
	}
	return t, nil
}

// formatNames lists those that can be read.
func formatNames(formats []image.Format) string {
	var names []string
	for _, f := range formats {
		if !f.NameOnly {
			names = append(names, f.Name)
		}
	}
	return strings.Join(names, ", ")
}

// What qemu-nbd and qemu-img say when they cannot open an image.
const (
	nbdWords = "Failed to blk_new_open"
	imgWords = "Could not open"
)

// open opens the image.
func (t *target) open(ctx context.Context, c *image.Chain) (image.Device, error) {
	d, err := c.Open(ctx, t.name, t.opt)
	if err != nil {
		return nil, t.failed(err)
	}
	return d, nil
}

// failed is the error of opening the image.
func (t *target) failed(err error) error {
	failed := error(&worded{fmt.Sprintf("%s '%s': %s", t.words, t.given, t.why(err)), err})
	if t.share && errors.Is(err, image.ErrInUse) {
		failed = hinted(failed, "-U looks all the same; what another process is writing may be seen half-way")
	}
	return failed
}

// wordsOfFormats are errors that formats tell in QEMU's words, which name no
// file.
var wordsOfFormats = []error{image.ErrCorrupt, image.ErrWrongFormat, errors.ErrUnsupported}

// why puts the causes that people and scripts know into QEMU's words; others
// speak for themselves.
func (t *target) why(err error) string {
	place, ok := errors.AsType[*image.Error](err)
	if !ok {
		return err.Error()
	}
	name := t.shown
	if place.Name != t.name && place.Name != name {
		name = printable(place.Name)
	}
	before := strings.TrimSuffix(err.Error(), place.Error())
	switch _, isErrno := errors.AsType[syscall.Errno](place.Err); {
	case errors.Is(place.Err, image.ErrInUse):
		return before + place.Err.Error() + fmt.Sprintf("\nIs another process using the image [%s]?", name)
	case isErrno:
		return before + fmt.Sprintf("Could not open '%s': %s", name, strerror(place.Err))
	case errors.Is(place.Err, image.ErrWrongFormat) && t.opt.Format != "":
		return before + fmt.Sprintf("Image is not in %s format", t.opt.Format)
	case name != t.shown && !slices.ContainsFunc(wordsOfFormats, func(e error) bool { return errors.Is(place.Err, e) }):
		return before + fmt.Sprintf("'%s': %s", name, place.Err)
	}
	return before + place.Err.Error()
}

// worded is an error in other words; what it wraps still counts.
type worded struct {
	text string
	err  error
}

func (e *worded) Error() string { return e.text }

func (e *worded) Unwrap() error { return e.err }
