package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/drivers"
)

// createCommand makes an empty image, as qemu-img create does.
func createCommand() *command {
	c := newCommand("create")
	o := &createOptions{}
	c.flags.StringVarP(&o.format, "format", "f", "raw", "")
	value(c.flags, "options", "o", o.addList)
	c.flags.StringVarP(&o.backing, "backing-file", "b", "", "")
	c.flags.StringVarP(&o.backingFormat, "backing-format", "F", "", "")
	c.flags.BoolVarP(&o.unsafe, "backing-unsafe", "u", false, "")
	c.flags.BoolVarP(&o.quiet, "quiet", "q", false, "")
	o.images.addBacking(c.flags)
	c.run = func(u *ui, operands []string) error {
		o.hasBacking, o.hasBackingFormat = c.flags.Changed("backing-file"), c.flags.Changed("backing-format")
		return o.run(u, operands)
	}
	return c
}

// createOptions are what create was asked for.
type createOptions struct {
	format                       string
	list                         string // of -o, which may be repeated
	hasBacking, hasBackingFormat bool
	backing, backingFormat       string
	unsafe                       bool // do not look at the backing image
	quiet                        bool
	images                       imageOptions
}

// addList takes the key=value list of one -o.
func (o *createOptions) addList(s string) error {
	commas := len(s) - len(strings.TrimRight(s, ","))
	if s == "" || s[0] == ',' || commas%2 != 0 {
		return says("Invalid option list: %s", s)
	}
	if o.list != "" {
		o.list += ","
	}
	o.list += s
	return nil
}

func (o *createOptions) run(u *ui, operands []string) error {
	params := keyValues(o.list, "")
	if slices.ContainsFunc(params, func(p image.Param) bool { return p.Key == "help" || p.Key == "?" }) {
		f, err := creatable(o.format)
		if err == nil {
			u.createHelp(f)
		}
		return err
	}
	file, size, err := createOperands(operands)
	if err != nil {
		return err
	}
	if err := o.create(u, file, size, params); err != nil {
		// In QEMU's words, which begin with the file.
		return &worded{file + ": " + err.Error(), err}
	}
	return nil
}

// createOperands returns the name of the image and its size, nil if there is
// none.
func createOperands(operands []string) (file string, size *uint64, err error) {
	if len(operands) == 0 {
		return "", nil, &usage{text: "Expecting image file name"}
	}
	if len(operands) > 1 {
		n, err := image.ParseSize(operands[1])
		switch {
		case errors.Is(err, syscall.ERANGE) || n > math.MaxInt64:
			return "", nil, says("Invalid image size specified. Must be between 0 and %d.", math.MaxInt64)
		case err != nil:
			return "", nil, errors.Join(says("Invalid image size specified. You may use k, M, G, T, P or E suffixes for"),
				says("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."))
		}
		size = &n
	}
	if len(operands) > 2 {
		return "", nil, &usage{text: "Unexpected argument: " + operands[2]}
	}
	return operands[0], size, nil
}

// creatable returns a format of which images can be made.
func creatable(name string) (*image.Format, error) {
	known := drivers.Formats()
	i := slices.IndexFunc(known, func(f image.Format) bool { return f.Name == name })
	switch {
	case i < 0:
		known = slices.DeleteFunc(known, func(f image.Format) bool { return f.Create == nil })
		return nil, hinted(says("Unknown file format '%s'", name), "formats: "+formatNames(known))
	case known[i].Create == nil:
		return nil, says("Format driver '%s' does not support image creation", name)
	}
	return &known[i], nil
}

func (o *createOptions) create(u *ui, file string, size *uint64, params []image.Param) error {
	if strings.HasPrefix(file, "json:") {
		return says("Unknown protocol 'json'")
	}
	f, err := creatable(o.format)
	if err != nil {
		return err
	}
	p := newImageParams{table: f.CreateParams, values: map[string]string{}}
	for _, param := range params {
		if err := p.set(param.Key, param.Value); err != nil {
			return err
		}
	}
	if _, ok := p.values["size"]; ok && size != nil {
		return says("The image size must be specified only once")
	} else if size != nil {
		p.values["size"] = fmt.Sprint(*size)
	}
	if o.hasBacking && p.set("backing_file", o.backing) != nil {
		return says("Backing file not supported for file format '%s'", f.Name)
	}
	if o.hasBackingFormat && p.set("backing_fmt", o.backingFormat) != nil {
		return says("Backing file format not supported for file format '%s'", f.Name)
	}
	images := o.images.chain(u)
	if _, ok := p.values["backing_file"]; ok {
		if err := o.lookBelow(images, file, &p); err != nil {
			return err
		}
	}
	if _, ok := p.values["size"]; !ok {
		return says("Image creation needs a size parameter")
	}
	if format, ok := p.values["backing_fmt"]; ok && !isFormat(format) {
		return hinted(says("Parameter 'backing-fmt' does not accept value '%s'", format), "formats: "+formatNames(drivers.Formats()))
	}
	opt, err := p.options()
	if err != nil {
		return err
	}
	if !o.quiet {
		u.printf("Formatting '%s', fmt=%s %s\n", file, f.Name, p.text())
	}
	return cancelledBySignals(func(ctx context.Context) error {
		return createWords(f, images.Create(ctx, file, f.Name, opt))
	})
}

// cancelledBySignals calls work, and cancels it when a signal asks for the end. More
// of them change nothing: what was begun is cleared away before the process ends.
func cancelledBySignals(work func(context.Context) error) error {
	signals := make(chan os.Signal, 1)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) { // as with nohup
			signal.Notify(signals, s)
		}
	}
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- work(ctx) }()
	select {
	case err := <-done:
		return err
	case s := <-signals:
		cancel(fmt.Errorf("ended by a signal: %v", s))
		if err := <-done; err != nil {
			return &signalled{s, err}
		}
		return nil // it came too late
	}
}

func isFormat(name string) bool {
	return slices.ContainsFunc(drivers.Formats(), func(f image.Format) bool { return f.Name == name })
}

// lookBelow opens the backing image, unless that is not wanted, and takes the
// size from it if nobody gave one.
func (o *createOptions) lookBelow(images *image.Chain, file string, p *newImageParams) error {
	backing, format := p.values["backing_file"], p.values["backing_fmt"]
	switch {
	case backing == file:
		return says("Error: Trying to create an image with the same filename as the backing file")
	case backing == "":
		return says("Expected backing file name, got empty string")
	case format == "" && o.unsafe:
		return says("Backing file specified without backing format")
	}
	// Without a lock, as QEMU: an overlay of an image in use is how a machine
	// that runs gets a snapshot.
	t := &target{opt: image.OpenOptions{Format: format, ReadOnly: true, NoLock: true}}
	t.name = image.Beside(file, backing)
	t.shown = t.name
	made, as, unseen := images.Uses(context.Background(), t.name, t.opt, file, image.Beside(file, p.values["data_file"]))
	if made != "" {
		return says("'%s' is the same file as '%s', which the image would need", made, as)
	}
	if o.unsafe {
		return nil // the backing image need not be there
	}
	if format != "" && !isFormat(format) {
		return hinted(says("Unknown driver '%s'\nCould not open backing image.", format), "formats: "+formatNames(drivers.Formats()))
	}
	unreadable := func(err error) error { return &worded{t.why(err) + "\nCould not open backing image.", err} }
	d, err := images.Open(context.Background(), t.name, t.opt)
	if err != nil {
		return unreadable(err)
	}
	info := d.Info()
	if err := d.Close(); err != nil {
		return unreadable(err)
	}
	if format == "" {
		return says("Backing file specified without backing format\nDetected format of %s.", info.Format)
	}
	if unseen != nil {
		return unreadable(unseen)
	}
	if _, ok := p.values["size"]; !ok {
		p.values["size"] = fmt.Sprint(info.Size)
	}
	return nil
}

// createWords puts the causes that scripts know into QEMU's words.
func createWords(f *image.Format, err error) error {
	place, ok := errors.AsType[*image.Error](err)
	if !ok {
		return err
	}
	_, isErrno := errors.AsType[syscall.Errno](place.Err)
	text := place.Err.Error()
	switch {
	case errors.Is(err, syscall.EFBIG):
		text = fmt.Sprintf("The image size is too large for file format '%s'", f.Name)
		if slices.ContainsFunc(f.CreateParams, func(p image.CreateParam) bool { return p.Name == "cluster_size" }) {
			text += " (try using a larger cluster size)"
		}
	case errors.Is(err, image.ErrInUse):
		text += fmt.Sprintf("\nIs another process using the image [%s]?", place.Name)
	case isErrno:
		text = fmt.Sprintf("Could not create '%s': %s", place.Name, strerror(place.Err))
	}
	return &worded{text, err}
}

// newImageParams are the parameters of a format as the user gave them.
type newImageParams struct {
	table  []image.CreateParam
	values map[string]string
}

func (p *newImageParams) find(name string) *image.CreateParam {
	i := slices.IndexFunc(p.table, func(c image.CreateParam) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	return &p.table[i]
}

// set sets a parameter; the last one counts.
func (p *newImageParams) set(name, v string) error {
	c := p.find(name)
	switch {
	case c == nil:
		return says("Invalid parameter '%s'", name)
	case c.Refused != "":
		return hinted(fmt.Errorf("the option '%s' is not supported", c.Name), c.Refused)
	}
	switch c.Kind {
	case image.BoolParam:
		if _, err := (image.Param{Key: c.Name, Value: v}).Bool(); err != nil {
			return says("%v", err)
		}
	case image.NumberParam:
		if _, err := image.ParseNumber(v); errors.Is(err, syscall.ERANGE) {
			return says("Value '%s' is too large for parameter '%s'", v, c.Name)
		} else if err != nil {
			return says("Parameter '%s' expects a number", c.Name)
		}
	case image.SizeParam:
		if _, err := (image.Param{Key: c.Name, Value: v}).Size(); err != nil {
			return says("%v", err)
		}
	}
	p.values[c.Name] = v
	return nil
}

// options returns what Create takes.
func (p *newImageParams) options() (image.CreateOptions, error) {
	var opt image.CreateOptions
	size, err := image.ParseSize(p.values["size"])
	if err != nil {
		return opt, err
	}
	opt.Size = int64(min(size, math.MaxInt64)) // which is too large for anything
	for _, c := range p.table {
		if v, ok := p.values[c.Name]; ok && c.Name != "size" {
			opt.Params = append(opt.Params, image.Param{Key: c.Name, Value: v})
		}
	}
	return opt, nil
}

// text is how qemu-img prints the parameters: with their defaults, numbers in
// decimal, a comma in a text doubled, switches as they were written.
func (p *newImageParams) text() string {
	var words []string
	for _, c := range p.table {
		v, given := p.values[c.Name]
		switch {
		case !given && c.Default == "":
			continue
		case !given:
			v = c.Default
		case c.Kind == image.TextParam:
			v = strings.ReplaceAll(v, ",", ",,")
		case c.Kind == image.NumberParam:
			n, _ := image.ParseNumber(v)
			v = fmt.Sprint(int64(n))
		case c.Kind == image.SizeParam:
			n, _ := image.ParseSize(v)
			v = fmt.Sprint(int64(n))
		}
		words = append(words, c.Name+"="+v)
	}
	return strings.Join(words, " ")
}

// createHelp lists the parameters of a format.
func (u *ui) createHelp(f *image.Format) {
	var lines []string
	for _, c := range f.CreateParams {
		if c.Refused == "" {
			kind := [...]string{image.TextParam: "str", image.BoolParam: "bool (on/off)", image.NumberParam: "num", image.SizeParam: "size"}[c.Kind]
			lines = append(lines, fmt.Sprintf("  %-22s - %s\n", c.Name+"=<"+kind+">", c.Help))
		}
	}
	slices.Sort(lines)
	u.printf("Supported %s options:\n%s", f.Name, strings.Join(lines, ""))
}
