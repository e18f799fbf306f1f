package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/imgnbd/imgnbd/internal/journal"
	"github.com/imgnbd/imgnbd/internal/sandbox"
)

// A confinement is what the process gives up before it serves anybody.
type confinement struct {
	user      *sandbox.User // that it becomes; nil: it stays who it is
	sandbox   string        // of sandboxModes; "" is auto
	untrusted bool          // the image is of somebody whom nobody vouches for
}

// auto does what it can. on fails if system calls cannot be filtered.
var sandboxModes = []string{"auto", "on", "off"}

// check refuses what contradicts these options, and fills in what --untrusted
// stands for.
func (c *confinement) check(o *serveOptions) error {
	for _, name := range []string{"user", "sandbox", "untrusted"} {
		if !o.flags.Changed(name) || name == "sandbox" && c.sandbox != "on" {
			continue
		}
		switch {
		case o.connect.device != "":
			return hinted(fmt.Errorf("--%s and --connect exclude each other: a device of this machine is served with its privileges, and the kernel reads what is on it", name),
				"serve it with --socket=PATH, and use it in a virtual machine")
		case o.connect.disconnect || o.list:
			return fmt.Errorf("--%s is for serving an image", name)
		}
	}
	if c.user != nil && o.runCommand != "" {
		return hinted(errors.New("--user and --run exclude each other: the command would run as who started this program"), "run the program as that user")
	}
	if !c.untrusted {
		return nil
	}
	for _, name := range []string{"backing", "backing-dir"} {
		if o.flags.Changed(name) {
			return fmt.Errorf("--untrusted and --%s exclude each other: an untrusted image may name no other", name)
		}
	}
	o.images.untrusted = true
	if c.sandbox == "" {
		c.sandbox = "on"
	}
	return nil
}

// confine gives up what is not needed any more, now that everything is open
// and nobody has been served yet. It is for good, and for all of the process.
func (s *service) confine() error {
	if !s.u.alone {
		return nil
	}
	c := &s.opt.confinement
	log := s.u.logger(s.opt.verbose)
	read := s.opt.readAgain()
	if c.user != nil {
		if err := sandbox.Become(c.user); err != nil {
			if errors.Is(err, syscall.EPERM) {
				err = hinted(err, "only root can become another user")
			}
			return err
		}
		for _, path := range read {
			f, err := os.Open(path)
			if err != nil {
				return fmt.Errorf("as %s: %w", c.user.Name, err)
			}
			f.Close()
		}
		if err := letIn(); err != nil {
			return hinted(fmt.Errorf("as %s: %w", c.user.Name, err), "a file system of FUSE is for who mounted it alone, unless it is mounted with allow_other")
		}
	}
	if c.sandbox == "off" {
		return nil
	}
	p := sandbox.Policy{Read: read, RemoveIn: s.place.dirs, Signal: s.command != nil}
	if s.opt.access.file != "" {
		p.Read = append(p.Read, "/etc/passwd", "/etc/group") // for uid:NAME and gid:NAME
	}
	if !s.device.Info().ReadOnly {
		p.RemoveIn = append(p.RemoveIn, s.opt.journal.dirs()...)
	}
	r := sandbox.Enter(p)
	switch {
	case r.Calls == nil:
	case c.sandbox == "on":
		return hinted(fmt.Errorf("no sandbox: %w", r.Calls), "--sandbox=off does without")
	default:
		log.Debug("no sandbox", "err", r.Calls)
	}
	if r.Files != nil {
		log.Debug("the sandbox does not confine paths", "err", r.Files)
	}
	return nil
}

// letIn returns an error if a file system does not let this user do all with a file
// of its that is open already: to ask for its size, for one.
func letIn() error {
	const open = "/proc/self/fd"
	files, err := os.ReadDir(open)
	if err != nil {
		return nil // no Linux, or no /proc
	}
	for _, f := range files {
		fd, err := strconv.Atoi(f.Name())
		if err != nil || fd <= int(os.Stderr.Fd()) {
			continue // who only prints there need not know more
		}
		var st syscall.Stat_t
		if err := syscall.Fstat(fd, &st); errors.Is(err, fs.ErrPermission) {
			name, _ := os.Readlink(filepath.Join(open, f.Name()))
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// readAgain are the files that are read for each client.
func (o *serveOptions) readAgain() []string {
	var files []string
	if o.access.file != "" {
		files = append(files, o.access.file)
	}
	if f, ok := o.tls.authority.(*authzListFile); ok && f.list == nil {
		files = append(files, f.path)
	}
	return files
}

// dirs are where journals may be.
func (m *journalMode) dirs() []string {
	dirs := journal.Dirs()
	if m.dir != "" {
		dirs = append(dirs, filepath.Clean(m.dir))
	}
	return dirs
}
