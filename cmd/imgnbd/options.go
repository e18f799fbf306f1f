package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/sandbox"
)

// serveOptions are what the bare command was asked for.
type serveOptions struct {
	flags *pflag.FlagSet

	// Where clients connect.
	port, bind   string
	socket       string
	socketMode   *uint64 // of its file; nil: as the umask has it, but nothing for others
	vsock, stdio bool
	selinuxLabel string

	// Who may connect, and for how long.
	shared     int // clients at once; 0: no limit
	persistent bool
	objects    objects
	tls        tlsOptions
	access     accessList
	handshake  time.Duration // negative: no limit
	memory     int64         // bytes for requests of all clients; 0: the default

	// What is shown to them.
	exportName, description string
	offset                  int64
	partition               int // that is all that is shown; 0: the whole image
	depth                   bool
	bitmaps                 []string
	snapshot                *image.SnapshotSelector

	// How the image is opened.
	images       imageOptions
	readOnly     bool
	temporary    bool // what is written is gone at the end
	journal      journalMode
	cache        cacheMode
	nativeAIO    bool
	discard      bool
	detectZeroes bool
	unmapZeroes  bool
	contexts     []export.MetaContext // of the bitmaps, once the image is open

	connect connectOptions

	confinement confinement

	// What else the process does.
	list       bool
	fork       bool
	pidFile    string
	verbose    bool
	runCommand string
}

// A cacheMode says how far writes have to be when they are answered, and
// whether the host's page cache is in between.
type cacheMode struct {
	direct       bool // bypass the page cache
	writeThrough bool // each write is made durable
	noFlush      bool // no flush is passed on
}

// parseCache knows QEMU's names.
func parseCache(s string) (cacheMode, error) {
	switch s {
	case "none", "off":
		return cacheMode{direct: true}, nil
	case "directsync":
		return cacheMode{direct: true, writeThrough: true}, nil
	case "writeback":
		return cacheMode{}, nil
	case "writethrough":
		return cacheMode{writeThrough: true}, nil
	case "unsafe":
		return cacheMode{noFlush: true}, nil
	}
	return cacheMode{}, says("Invalid cache mode `%s'", s)
}

var (
	errHelp    = errors.New("help is asked for")
	errVersion = errors.New("the version is asked for")
)

// newServeOptions returns the table of the bare command: first qemu-nbd's
// options, in its order, which is the one that messages list them in; then our
// own, which the name qemu-nbd does without unless they are written out.
func newServeOptions() *serveOptions {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.SortFlags = false
	o := &serveOptions{flags: fs, shared: 1, handshake: 10 * time.Second,
		connect: connectOptions{connections: 1, maxPart: -1, deadTimeout: time.Minute}}

	flag(fs, "help", "h", func() error { return errHelp })
	flag(fs, "version", "V", func() error { return errVersion })
	fs.StringVarP(&o.bind, "bind", "b", "0.0.0.0", "")
	fs.StringVarP(&o.port, "port", "p", strconv.Itoa(nbd.DefaultPort), "")
	value(fs, "socket", "k", func(s string) error {
		if !strings.HasPrefix(s, "/") {
			return errors.New("socket path must be absolute")
		}
		o.socket = s
		return nil
	})
	value(fs, "offset", "o", func(s string) (err error) {
		if o.offset, err = cInt(s, 64); err != nil || o.offset < 0 {
			return says("Invalid offset '%s'", s)
		}
		return nil
	})
	fs.BoolVarP(&o.readOnly, "read-only", "r", false, "")
	fs.BoolVarP(&o.depth, "allocation-depth", "A", false, "")
	value(fs, "bitmap", "B", func(s string) error {
		o.bitmaps = append(o.bitmaps, s)
		return nil
	})
	fs.StringVarP(&o.connect.device, "connect", "c", "", "")
	fs.BoolVarP(&o.connect.disconnect, "disconnect", "d", false, "")
	fs.BoolVarP(&o.list, "list", "L", false, "")
	fs.BoolVarP(&o.temporary, "snapshot", "s", false, "")
	value(fs, "load-snapshot", "l", func(s string) (err error) {
		o.snapshot, err = parseSnapshot(s)
		return err
	})
	setCache := func(s string) (err error) {
		if fs.Changed("cache") || fs.Changed("nocache") {
			return errors.New("-n and --cache can only be specified once")
		}
		o.cache, err = parseCache(s)
		return err
	}
	flag(fs, "nocache", "n", func() error { return setCache("none") })
	value(fs, "cache", "", setCache)
	value(fs, "aio", "", o.setAIO)
	value(fs, "discard", "", func(s string) error {
		if fs.Changed("discard") {
			return errors.New("--discard can only be specified once")
		}
		switch s {
		case "ignore", "off":
		case "unmap", "on":
			o.discard = true
		default:
			return says("Invalid discard mode `%s'", s)
		}
		return nil
	})
	value(fs, "detect-zeroes", "", o.setDetectZeroes)
	value(fs, "shared", "e", func(s string) error {
		n, err := cInt(s, 32)
		if err != nil || n < 0 {
			return says("Invalid shared device number '%s'", s)
		}
		o.shared = int(n)
		return nil
	})
	o.images.addFormat(fs)
	fs.BoolVarP(&o.persistent, "persistent", "t", false, "")
	fs.BoolVarP(&o.verbose, "verbose", "v", false, "")
	o.objects = objects{}
	value(fs, "object", "", o.objects.add)
	value(fs, "export-name", "x", o.bounded(&o.exportName, "export name"))
	value(fs, "description", "D", o.bounded(&o.description, "export description"))
	fs.StringVar(&o.tls.creds, "tls-creds", "", "")
	fs.StringVar(&o.tls.hostname, "tls-hostname", "", "")
	fs.StringVar(&o.tls.authz, "tls-authz", "", "")
	o.images.addImageOpts(fs)
	refuseValue(fs, "trace", "T", "--verbose tells what clients do")
	fs.BoolVar(&o.fork, "fork", false, "")
	fs.StringVar(&o.pidFile, "pid-file", "", "")
	fs.StringVar(&o.selinuxLabel, "selinux-label", "", "")
	value(fs, "handshake-limit", "", func(s string) error {
		n, err := cInt(s, 32)
		if err != nil || n < 0 {
			return says("Invalid handshake limit '%s'", s)
		}
		if o.handshake = time.Duration(n) * time.Second; n == 0 {
			o.handshake = -1
		}
		return nil
	})

	fs.BoolVar(&o.stdio, "stdio", false, "")
	fs.StringVar(&o.runCommand, "run", "", "")
	fs.BoolVar(&o.vsock, "vsock", false, "")
	value(fs, "tls-mode", "", func(s string) error {
		if _, ok := tlsModes[s]; !ok {
			return fmt.Errorf("--tls-mode is require, allow or direct, not '%s'", s)
		}
		o.tls.mode = s
		return nil
	})
	value(fs, "allow", "", func(s string) error { return addAccess(&o.access.allow, s) })
	value(fs, "deny", "", func(s string) error { return addAccess(&o.access.deny, s) })
	value(fs, "allow-file", "", o.access.setFile)
	value(fs, "socket-mode", "", func(s string) error {
		n, err := strconv.ParseUint(s, 8, 32)
		if err != nil || n > 0o777 {
			return fmt.Errorf("--socket-mode is an octal number up to 777, not '%s'", s)
		}
		o.socketMode = &n
		return nil
	})
	addPartition(fs, &o.partition)
	value(fs, "memory", "", func(s string) error {
		n, err := image.ParseSize(s)
		if err != nil || n < 1<<20 || n > 1<<50 {
			return fmt.Errorf("--memory=%s is not a size of at least 1M", s)
		}
		o.memory = int64(n)
		return nil
	})
	o.images.addBacking(fs)
	value(fs, "connections", "", func(s string) error {
		n, err := cInt(s, 16)
		if err != nil || n < 1 {
			return fmt.Errorf("--connections=%s is not a number of connections", s)
		}
		o.connect.connections = int(n)
		return nil
	})
	value(fs, "block-size", "", func(s string) error {
		n, err := cInt(s, 32)
		if err != nil || n < 512 || n > 4096 || n&(n-1) != 0 {
			return fmt.Errorf("--block-size=%s is none of 512, 1024, 2048, 4096", s)
		}
		o.connect.blockSize = int(n)
		return nil
	})
	value(fs, "timeout", "", func(s string) error {
		n, err := cInt(s, 32)
		if err != nil || n < 0 {
			return fmt.Errorf("--timeout=%s is not a number of seconds", s)
		}
		o.connect.timeout = time.Duration(n) * time.Second
		return nil
	})
	fs.BoolVar(&o.connect.swap, "swap", false, "")
	value(fs, "max-part", "", func(s string) error {
		n, err := cInt(s, 16)
		if err != nil || n < 0 || n > 255 {
			return fmt.Errorf("--max-part=%s is not between 0 and 255", s)
		}
		o.connect.maxPart = int(n)
		return nil
	})
	value(fs, "dead-timeout", "", func(s string) error {
		n, err := cInt(s, 32)
		if err != nil || n < 0 {
			return fmt.Errorf("--dead-timeout=%s is not a number of seconds", s)
		}
		o.connect.deadTimeout = time.Duration(n) * time.Second
		return nil
	})
	fs.BoolVar(&o.connect.replace, "replace", false, "")
	fs.BoolVar(&o.connect.force, "force", false, "")
	value(fs, "user", "", func(s string) (err error) {
		o.confinement.user, err = sandbox.LookupUser(s)
		return err
	})
	value(fs, "sandbox", "", func(s string) error {
		if !slices.Contains(sandboxModes, s) {
			return fmt.Errorf("--sandbox=%s is none of %s", s, strings.Join(sandboxModes, ", "))
		}
		o.confinement.sandbox = s
		return nil
	})
	fs.BoolVar(&o.confinement.untrusted, "untrusted", false, "")
	value(fs, "journal", "", o.journal.set)
	for _, name := range []string{"journal", "stdio", "run", "vsock", "partition", "backing", "backing-dir", "tls-mode", "allow", "deny", "allow-file", "socket-mode", "connections", "block-size", "timeout", "swap", "max-part", "dead-timeout", "replace", "force",
		"user", "sandbox", "untrusted", "memory"} {
		fs.SetAnnotation(name, own, nil)
	}
	return o
}

func (o *serveOptions) setAIO(s string) error {
	if o.flags.Changed("aio") {
		return errors.New("--aio can only be specified once")
	}
	switch s {
	case "threads":
	case "native":
		o.nativeAIO = true
	case "io_uring":
		return hinted(errors.New("aio mode 'io_uring' is not supported"), "use --aio=threads")
	default:
		return says("Invalid aio mode '%s'", s)
	}
	return nil
}

// setDetectZeroes looks at --discard as far as it has been read: qemu-nbd's
// options depend on their order here.
func (o *serveOptions) setDetectZeroes(s string) error {
	o.detectZeroes, o.unmapZeroes = s != "off", s == "unmap"
	switch {
	case s != "off" && s != "on" && s != "unmap":
		return says("Failed to parse detect_zeroes mode: invalid parameter value: %s", s)
	case o.unmapZeroes && !o.discard:
		return errors.New("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
	}
	return nil
}

// bounded sets a string that clients are told.
func (o *serveOptions) bounded(p *string, what string) func(string) error {
	return func(s string) error {
		if len(s) > nbd.MaxString {
			return fmt.Errorf("%s '%s' too long", what, s)
		}
		*p = s
		return nil
	}
}

// parseSnapshot reads what --load-snapshot names.
func parseSnapshot(s string) (*image.SnapshotSelector, error) {
	if !strings.HasPrefix(s, "snapshot.") {
		return &image.SnapshotSelector{Any: s}, nil
	}
	sel := new(image.SnapshotSelector)
	for _, p := range keyValues(s, "") {
		switch p.Key {
		case "snapshot.id":
			sel.ID = p.Value
		case "snapshot.name":
			sel.Name = p.Value
		default:
			return nil, errors.Join(says("Invalid parameter '%s'", p.Key),
				says("Failed in parsing snapshot param `%s'", s))
		}
	}
	return sel, nil
}

// keyValues splits QEMU's key=value,key=value. A comma in a value is written
// twice; a first element without "=" is the value of implied; a key elsewhere
// without "=" is switched on, or off if it begins with "no".
func keyValues(s, implied string) []image.Param {
	var params []image.Param
	for s != "" {
		var p image.Param
		end := strings.IndexAny(s, "=,")
		switch {
		case end >= 0 && s[end] == '=':
			p.Key, s = s[:end], s[end+1:]
			p.Value, s = cutValue(s)
		case implied != "" && params == nil:
			p.Key = implied
			p.Value, s = cutValue(s)
		default:
			p.Value = "on"
			p.Key, s, _ = strings.Cut(s, ",")
			if key, off := strings.CutPrefix(p.Key, "no"); off {
				p.Key, p.Value = key, "off"
			}
		}
		params = append(params, p)
	}
	return params
}

// cutValue takes a value up to a comma that is not doubled.
func cutValue(s string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				return b.String(), s[i+1:]
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// cInt reads an integer as C's strtol of base 0 does: decimal, 0x and 0.
func cInt(s string, bits int) (int64, error) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	digits := strings.TrimLeft(s, "+-")
	if strings.ContainsAny(digits, "_") || len(digits) > 1 && digits[0] == '0' && strings.ContainsAny(digits[1:2], "bBoO") {
		return 0, strconv.ErrSyntax // Go's notations, not C's
	}
	return strconv.ParseInt(s, 0, bits)
}

// flag adds an option without a value.
func flag(fs *pflag.FlagSet, name, short string, set func() error) {
	fs.BoolFuncP(name, short, "", func(string) error { return set() })
}

// value adds an option that has one.
func value(fs *pflag.FlagSet, name, short string, set func(string) error) {
	fs.FuncP(name, short, "", set)
}

// refuseValue adds an option of qemu-nbd's that this version has no use for. To
// ignore it would be to lie.
func refuseValue(fs *pflag.FlagSet, name, short, instead string) {
	value(fs, name, short, func(string) error { return refusal(name, instead) })
}

func refusal(name, instead string) error {
	return hinted(fmt.Errorf("--%s is not supported by this version", name), instead)
}
