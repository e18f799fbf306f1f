package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/connect"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// clientVersion is the version of nbd-client whose command line and messages
// these are.
const clientVersion = "3.24"

var defaultPort = strconv.Itoa(nbd.DefaultPort)

// clientOptions are what nbd-client can be told of a device, by its command
// line or by nbdtab.
type clientOptions struct {
	device        string // "": any free one
	host, port    string // host is the path of a socket with unix
	export        string
	unix, sdp     bool
	noGo, preinit bool
	connections   int
	blockSize     int   // bytes; 0: the least that is possible
	size          int64 // bytes; 0: as the server says
	timeout       time.Duration
	readOnly      bool
	persist, swap bool
	tls           bool
	ca, cert, key string // files
	tlsHost       string
}

// remote returns what is attached, and adds to o how, where the command line of
// o does not say.
func (c *clientOptions) remote(u *ui, o *serveOptions) (*remote, error) {
	switch {
	case c.sdp:
		return nil, errors.New("the Sockets Direct Protocol is not supported, as it is not by Linux")
	case c.preinit:
		return nil, errors.New("servers that do not negotiate are not supported")
	}
	r := &remote{noGo: c.noGo, size: c.size}
	r.uri = nbd.URI{Network: "tcp", Address: net.JoinHostPort(c.host, c.port), Export: c.export}
	if c.unix {
		r.uri.Network, r.uri.Address = "unix", c.host
	}
	for option, set := range map[string]func(){
		"connections": func() { o.connect.connections = max(c.connections, 1) },
		"block-size":  func() { o.connect.blockSize = c.blockSize },
		"timeout":     func() { o.connect.timeout = c.timeout },
		"swap":        func() { o.connect.swap = c.swap },
		"read-only":   func() { o.readOnly = c.readOnly },
	} {
		if !o.flags.Changed(option) {
			set()
		}
	}
	if o.connect.device = c.device; c.device == "" {
		o.connect.device = connect.Auto
	}
	if !c.tls && c.ca == "" && c.cert == "" && c.key == "" && c.tlsHost == "" {
		return r, nil
	}
	// As with nbd-client, there is something to verify only if both are known.
	creds := &tlsCreds{verifyPeer: c.ca != "" && (c.tlsHost != "" || !c.unix)}
	if !creds.verifyPeer {
		u.warning("anybody could be the server: its certificate is verified only with a file of CAs, and for a socket the name in it")
	}
	cert := c.cert
	if cert == "" {
		cert = c.key
	}
	if err := creds.loadClient(c.ca, cert, c.key); err != nil {
		return nil, err
	}
	r.tls = &tlsOptions{found: creds, hostname: c.tlsHost}
	return r, nil
}

// A client is the program by the name of nbd-client.
type client struct {
	clientOptions
	u          *ui
	operands   int
	list       bool
	disconnect string // the device; "": none
	foreground bool
	marked     bool // as a process that systemd leaves alone at the end of an initrd
}

func (c *client) options() *pflag.FlagSet {
	fs := pflag.NewFlagSet("nbd-client", pflag.ContinueOnError)
	fs.SortFlags = false
	number := func(name, short string, n *int) {
		value(fs, name, short, func(s string) error {
			v, err := cInt(s, 32)
			if err != nil || v < 0 {
				return c.failed("E: %s is not a number: %s", name, s)
			}
			*n = int(v)
			return nil
		})
	}
	fs.StringVarP(&c.ca, "cacertfile", "A", "", "")
	value(fs, "block-size", "b", c.setBlockSize)
	value(fs, "size", "B", func(s string) (err error) {
		if c.size, err = cInt(s, 64); err != nil || c.size <= 0 {
			return c.failed("E: Invalid size")
		}
		return nil
	})
	value(fs, "check", "c", c.check)
	number("connections", "C", &c.connections)
	fs.StringVarP(&c.disconnect, "disconnect", "d", "", "")
	fs.StringVarP(&c.cert, "certfile", "F", "", "")
	fs.BoolVarP(&c.noGo, "no-optgo", "g", false, "")
	flag(fs, "help", "h", func() error { return errHelp })
	fs.StringVarP(&c.tlsHost, "tlshostname", "H", "", "")
	fs.StringVarP(&c.key, "keyfile", "K", "", "")
	fs.BoolVarP(&c.list, "list", "l", false, "")
	flag(fs, "nonetlink", "L", func() error {
		return hinted(errors.New("--nonetlink is not supported"), "leave it out: -persist and -timeout do without")
	})
	fs.BoolVarP(&c.marked, "systemd-mark", "m", false, "")
	fs.BoolVarP(&c.foreground, "nofork", "n", false, "")
	fs.StringVarP(&c.export, "name", "N", "", "")
	fs.BoolVarP(&c.persist, "persist", "p", false, "")
	fs.BoolVarP(&c.preinit, "preinit", "P", false, "")
	fs.BoolVarP(&c.readOnly, "readonly", "R", false, "")
	fs.BoolVarP(&c.sdp, "sdp", "S", false, "")
	fs.BoolVarP(&c.swap, "swap", "s", false, "")
	value(fs, "timeout", "t", c.setTimeout)
	fs.BoolVarP(&c.unix, "unix", "u", false, "")
	flag(fs, "version", "V", func() error { return errVersion })
	fs.BoolVarP(&c.tls, "enable-tls", "x", false, "")
	return fs
}

func (c *client) setBlockSize(s string) error {
	n, err := cInt(s, 32)
	if err != nil || n <= 0 || n%512 != 0 {
		return c.failed("E: blocksize is not a multiple of 512! This is not allowed")
	}
	c.blockSize = int(n)
	return nil
}

func (c *client) setTimeout(s string) error {
	n, err := cInt(s, 32)
	if err != nil || n < 0 {
		return c.failed("E: timeout is not a number: %s", s)
	}
	c.timeout = time.Duration(n) * time.Second
	return nil
}

// failed prints what nbd-client says, which does not begin with its name, and
// returns an error that there is nothing more to say about.
func (c *client) failed(format string, args ...any) error {
	c.u.bare(fmt.Sprintf(format, args...))
	return &exit{code: 1}
}

// misused is failed, and then the usage.
func (c *client) misused(format string, args ...any) error {
	return c.failed("ERROR: %s\n\n%s", fmt.Sprintf(format, args...), strings.TrimSuffix(c.usage(), "\n"))
}

func (c *client) usage() string {
	return strings.ReplaceAll(synopsis("nbd-client"), "PROGRAM", c.u.called)
}

// operand takes a host, a port that may be left out, and a device.
func (c *client) operand(s string) error {
	if key, value, ok := strings.Cut(s, "="); ok {
		c.u.bare("WARNING: old-style command-line argument encountered. This is deprecated.")
		switch key {
		case "bs":
			return c.setBlockSize(value)
		case "timeout":
			return c.setTimeout(value)
		}
		return c.misused("unknown option %s encountered", s)
	}
	c.operands++
	if n, err := cInt(s, 32); c.operands == 2 && (err != nil || n == 0) {
		c.operands++
	}
	switch c.operands {
	case 1:
		c.host = s
	case 2:
		c.port = s
	case 3:
		c.device = s
	default:
		return c.misused("too many non-option arguments specified")
	}
	return nil
}

// nbdClient is the program by the name of nbd-client.
func nbdClient(u *ui, args []string) error {
	d := asDaemon()
	if d != nil {
		setProcessName(u.name)
	}
	c := &client{u: u, clientOptions: clientOptions{port: defaultPort, connections: 1}}
	err := scanLongOnly(c.options(), args, c.operand)
	var misuse *usage
	switch {
	case errors.Is(err, errHelp):
		u.bare(strings.TrimSuffix(c.usage(), "\n"))
		return nil
	case errors.Is(err, errVersion):
		u.printf("This is %s, from nbd %s (imgnbd %s)\n", u.name, clientVersion, programVersion())
		return nil
	case errors.As(err, &misuse):
		return c.failed("%s: %s\nE: option eaten by 42 mice", u.called, misuse.text)
	case err != nil:
		return err
	}
	if c.marked && u.alone && !u.marked {
		return u.restartMarked(args)
	}
	if c.disconnect != "" {
		return c.detach()
	}
	if err := c.complete(); err != nil {
		return err
	}
	o := newServeOptions()
	r, err := c.remote(u, o)
	if err != nil {
		return err
	}
	if c.list {
		return c.describe(c.listExports(r))
	}
	if c.export == "" {
		u.printf("Warning: the oldstyle protocol is no longer supported.\nThis method now uses the newstyle protocol with a default export\n")
	}
	if d == nil && !c.foreground {
		if err := startDaemon(context.Background(), u, args, nil, false); err != errTalkative {
			return err
		}
		return nil // the device is there
	}
	if o.connect.deadTimeout = 0; c.persist {
		o.connect.deadTimeout = time.Minute
	}
	s := &service{opt: o, u: u, daemon: d, report: func(a *connect.Attachment) string {
		negotiated := fmt.Sprintf("Negotiation: ..size = %dMB\n", a.Size()>>20)
		return strings.Repeat(negotiated, o.connect.connections) + "Connected " + a.Path() + "\n"
	}}
	return c.describe(s.runRemote(r))
}

// complete looks up what only nbdtab says, and refuses what is not enough.
func (c *client) complete() error {
	switch {
	case c.host == "":
		return c.misused("no information specified")
	case c.device == "" && !c.list && (strings.HasPrefix(c.host, "nbd") || strings.HasPrefix(c.host, "/dev/nbd")):
		entry, err := readNBDTab(c.u, c.host)
		if err != nil {
			c.u.message(err.Error())
			return c.misused("no valid configuration for specified device found")
		}
		entry.readOnly, entry.size = c.readOnly, c.size
		c.clientOptions = *entry
	}
	if c.blockSize > 0 && c.size%int64(c.blockSize) != 0 {
		return c.failed("E: size (%d bytes) is not a multiple of blocksize (%d)!", c.size, c.blockSize)
	}
	if c.device != "" && !strings.HasPrefix(c.device, "/dev/nbd") {
		return c.failed("Error: Invalid nbd device target\n\nExiting.")
	}
	return nil
}

// describe puts an error into nbd-client's words, where it has some.
func (c *client) describe(err error) error {
	var unreachable *unreachableError
	var refused *nbd.OptionError
	switch {
	case errors.As(err, &unreachable) && c.unix:
		return c.failed("Error: CONNECT failed")
	case errors.As(err, &unreachable):
		return c.failed("Error: Socket failed: %s", strerror(unreachable.err))
	case errors.As(err, &refused):
		why := "Unknown error returned by server."
		if refused.Reply == nbd.RepErrPolicy {
			why = "Connection not allowed by server policy."
		}
		if refused.Message != "" {
			why += " Server said: " + printable(refused.Message)
		}
		return c.failed("Error: %s\nExiting.", why)
	case errors.Is(err, connect.ErrUnavailable):
		return c.failed("Error: Couldn't resolve the nbd netlink family, make sure the nbd module is loaded and your nbd driver supports the netlink interface.\n\nExiting.")
	}
	return err
}

// check prints who has attached a device, and ends the program: 0 if it is
// attached, 1 if not, 2 if that cannot be known.
func (c *client) check(device string) error {
	devices, err := connect.Devices()
	if err != nil {
		return &exit{code: 2, err: err}
	}
	name, _, _ := strings.Cut(filepath.Base(device), "p") // a partition stands for its disk
	for _, d := range devices {
		if filepath.Base(d.Path) == name {
			c.u.printf("%d\n\n", d.PID)
			return &exit{code: 0}
		}
	}
	return &exit{code: 1}
}

func (c *client) detach() error {
	if !strings.HasPrefix(c.disconnect, "/dev/nbd") {
		return c.failed("Error: Invalid nbd device target\n\nExiting.")
	}
	if _, err := os.Stat(c.disconnect); err != nil {
		return c.failed("Error: Cannot open NBD: %s\nPlease ensure the 'nbd' module is loaded.\nExiting.", strerror(err))
	}
	err := detachDevice(c.disconnect, false)
	switch {
	case errors.Is(err, connect.ErrNotAttached):
		c.u.warning(err.Error()) // to nbd-client it is no failure
		return nil
	case isBusy(err):
		return hinted(err, "umount it, or lose what is written to it from now on with imgnbd -d --force")
	}
	return err
}

func (c *client) listExports(r *remote) error {
	ctx, cancel := context.WithTimeout(context.Background(), listTime)
	defer cancel()
	conn, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	l, err := nbd.List(ctx, conn)
	var refused *nbd.OptionError
	switch {
	case errors.Is(err, nbd.ErrNoList):
		return c.failed("\nE: Server does not support listing exports")
	case errors.As(err, &refused):
		why := "unexpected error from server."
		if refused.Reply == nbd.RepErrPolicy {
			why = "listing not allowed by server."
		}
		if refused.Message != "" {
			why += "\nServer said: " + printable(refused.Message)
		}
		return c.failed("\nE: %s", why)
	case err != nil:
		return err
	}
	c.u.printf("Negotiation: ..\n")
	for _, e := range l.Exports {
		if line := printable(e.Name); e.Description != "" {
			c.u.printf("%s: %s\n", line, printable(e.Description))
		} else {
			c.u.printf("%s\n", line)
		}
	}
	return nil
}

// restartMarked starts the program again with an argv[0] that begins with "@".
func (u *ui) restartMarked(args []string) error {
	self, err := selfPath()
	if err != nil {
		return err
	}
	return os.NewSyscallError("execve", syscall.Exec(self, append([]string{"@" + u.called}, args...), os.Environ()))
}
