package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imgnbd/imgnbd/connect"
)

// mountOptions are what the command mount was asked for.
type mountOptions struct {
	images    imageOptions
	format    bool // is given
	partition int
	chosen    bool // the partition, 0 included
	writable  bool
	fsType    string
	options   string
}

// mountCommand attaches an image, or a partition of it, and mounts it.
func mountCommand() *command {
	c := newCommand("mount")
	var o mountOptions
	addPartition(c.flags, &o.partition)
	c.flags.BoolVar(&o.writable, "rw", false, "")
	c.flags.StringVarP(&o.fsType, "types", "t", "", "")
	value(c.flags, "options", "o", func(s string) error {
		o.options = strings.Trim(o.options+","+s, ",")
		return nil
	})
	o.images.addFormat(c.flags)
	o.images.addImageOpts(c.flags)
	o.images.addBacking(c.flags)
	c.run = func(u *ui, operands []string) error {
		if len(operands) != 2 {
			return usageError("an image and a directory are expected")
		}
		o.format, o.chosen = c.flags.Changed("format"), c.flags.Changed("partition")
		return o.run(u, operands[0], operands[1])
	}
	return c
}

func (o *mountOptions) run(u *ui, file, dir string) error {
	if !o.writable && slices.Contains(strings.Split(o.options, ","), "rw") {
		return hinted(errors.New("-o rw would write to nothing that stays"), "use --rw")
	}
	if info, err := os.Stat(dir); err != nil {
		return err
	} else if !info.IsDir() {
		return fmt.Errorf("%s: %w", dir, syscall.ENOTDIR)
	}
	l, err := o.images.layout(u, file, o.format)
	if err != nil {
		return err
	}
	number, err := o.choose(file, l)
	if err != nil {
		return err
	}
	return cancelledBySignals(func(ctx context.Context) error { return o.mount(ctx, u, file, dir, number) })
}

// mount attaches and mounts. If ctx ends before it is done, all that is undone.
func (o *mountOptions) mount(ctx context.Context, u *ui, file, dir string, number int) error {
	device, err := o.attach(ctx, u, file, number)
	if err != nil {
		return err
	}
	// From here on the device goes when this process does, unless it is mounted.
	hold, err := connect.DetachWhenClosed(device)
	if err != nil {
		ctx, cancel := undoing(ctx)
		defer cancel()
		return errors.Join(err, connect.Detach(ctx, device, false))
	}
	err = runTool(ctx, "mount", o.arguments(device, dir)...)
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		return hold.Close()
	}
	ctx, cancel := undoing(ctx)
	defer cancel()
	if mounted := func(x connect.Holder) bool { return x.Use == connect.Mounted }; slices.ContainsFunc(hold.Holders(), mounted) {
		err = errors.Join(err, runTool(ctx, "umount", "--", device))
	}
	return errors.Join(err, hold.Wait(ctx))
}

// undoing returns a context to undo in what was begun under ctx: once that has ended,
// nobody waits for long, and what is left goes by itself.
func undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachTime)
	undo, end := context.WithCancelCause(limited)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(closeTime):
			end(errors.New("it takes longer"))
		case <-undo.Done():
		}
	})
	return undo, func() {
		stop()
		cancel()
		end(nil)
	}
}

// choose returns the number of the partition that is to be mounted, 0 for the
// whole image.
func (o *mountOptions) choose(file string, l *layout) (int, error) {
	if o.chosen {
		return o.partition, nil // the server says if there is none
	}
	if l.table == nil {
		if l.whole.FileSystem || o.fsType != "" {
			return 0, nil
		}
		if l.whole.Name != "" {
			return 0, hinted(fmt.Errorf("%s is %s, not a file system", file, l.whole.Name), "attach it with -c, and then as without imgnbd")
		}
		return 0, hinted(fmt.Errorf("%s has no partition table and no file system that is known here", file), "-t tells which it is")
	}
	var usable, mountable []int
	for i, p := range l.table.Partitions {
		if p.Problem != nil || p.Extended {
			continue
		}
		usable = append(usable, p.Number)
		if l.contents[i].FileSystem {
			mountable = append(mountable, p.Number)
		}
	}
	switch {
	case len(mountable) == 1:
		return mountable[0], nil
	case len(mountable) == 0 && len(usable) == 1 && o.fsType != "":
		return usable[0], nil
	}
	which := "several partitions with a file system"
	if len(mountable) == 0 {
		which = "no partition with a file system that is known here"
	}
	err := fmt.Errorf("%s has %s: %s", file, which, l.usable())
	if len(usable) == 0 {
		return 0, err
	}
	return 0, hinted(err, "choose with --partition=NUM")
}

// usable lists the partitions that can be used, for who has to choose one.
func (l *layout) usable() string {
	var list []string
	for i, p := range l.table.Partitions {
		if p.Problem != nil || p.Extended {
			continue
		}
		text := fmt.Sprintf("%d (%s", p.Number, sectorsText(p.Sectors, l.table.SectorSize))
		if c := l.contents[i].Name; c != "" {
			text += ", " + c
		}
		list = append(list, text+")")
	}
	const most = 16
	switch {
	case len(list) == 0:
		return "none can be used"
	case len(list) > most:
		list = append(list[:most], "...")
	}
	return strings.Join(list, ", ")
}

// attach starts a server, by the command line that a person would use, and
// returns its device.
func (o *mountOptions) attach(ctx context.Context, u *ui, file string, number int) (string, error) {
	args := []string{"--connect=auto", "--partition=" + strconv.Itoa(number)}
	if o.writable {
		args = append(args, "--discard=unmap") // to trim is the file system's choice
	} else {
		// A file system that was not unmounted has to be brought in order
		// before it can be read, which is written to an overlay. What is there
		// is lost with the server, so nobody is waited for.
		args = append(args, "--snapshot", "--dead-timeout=0")
	}
	if o.format {
		args = append(args, "--format="+o.images.format)
	}
	if o.images.imageOpts {
		args = append(args, "--image-opts")
	}
	if o.images.backing != "" {
		args = append(args, "--backing="+o.images.backing)
	}
	if o.images.backingDir != "" {
		args = append(args, "--backing-dir="+o.images.backingDir)
	}
	var device strings.Builder
	sub := *u
	sub.stdout = &device
	if err := startDaemon(ctx, &sub, append(args, "--", file), nil, false); err != nil && err != errTalkative {
		return "", err
	}
	return strings.TrimSpace(device.String()), nil
}

// arguments are those of mount(8). What an image holds is not trusted further
// than -o says.
func (o *mountOptions) arguments(device, dir string) []string {
	options := "ro,nosuid,nodev"
	if o.writable {
		options = "rw,nosuid,nodev"
	}
	if o.options != "" {
		options += "," + o.options
	}
	args := []string{"-o", options}
	if o.fsType != "" {
		args = append(args, "-t", o.fsType)
	}
	return append(args, "--", device, dir)
}

// runTool runs a program of the system; its error is what that said. If ctx ends
// before, the program is told to, and has closeTime until nobody waits for it any more.
func runTool(ctx context.Context, name string, args ...string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err = <-ended:
		case <-time.After(closeTime):
			return fmt.Errorf("%w; %s, process %d, has yet to end", context.Cause(ctx), name, cmd.Process.Pid)
		}
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s: %w", name, context.Cause(ctx))
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	if err != nil && lines != nil {
		return errors.New(strings.Join(lines, "; "))
	}
	return err
}

// umountCommand undoes what mount did.
func umountCommand() *command {
	c := newCommand("umount")
	var force bool
	c.flags.BoolVar(&force, "force", false, "")
	c.run = func(_ *ui, operands []string) error {
		dir, err := one(operands, "directory")
		if err != nil {
			return err
		}
		err = cancelledBySignals(func(ctx context.Context) error {
			limited, cancel := context.WithTimeout(ctx, detachTime)
			defer cancel()
			// To unmount takes as long as it takes.
			return connect.Unmount(limited, dir, force, func(dir string) error { return runTool(ctx, "umount", "--", dir) })
		})
		if a, ok := errors.AsType[*connect.AbandonedError](err); ok {
			err = abandoned(a)
		} else if isBusy(err) {
			err = hinted(fmt.Errorf("%s is unmounted, but %w", filepath.Clean(dir), err), "the device is detached when that has ended")
		}
		return err
	}
	return c
}

// abandoned adds what can be done: another server takes the device over, unless
// what the dead one had answered went with it.
func abandoned(a *connect.AbandonedError) error {
	why := a.Record.Volatile
	if a.Record.Backend == "" {
		why = "it has left no record"
	}
	if why != "" {
		return hinted(a, "no other server can go on with it, since "+why+"; to give that up: imgnbd umount --force "+word(a.Point))
	}
	return hinted(hinted(a, "to give that up: imgnbd umount --force "+word(a.Point)),
		"to lose nothing, start a server again: "+takeoverCommand(a.Path, &a.Record))
}

// takeoverCommand is the command line of a server that takes a device over.
func takeoverCommand(path string, r *connect.Record) string {
	line := "imgnbd -c " + path
	if r.Server != "" {
		return line + " " + word(r.Server)
	}
	if r.Property("options") != "" && !strings.HasPrefix(r.Image, "json:") {
		return line + " --image-opts " + word(r.Image)
	}
	for _, o := range []struct{ property, option, usual string }{
		{"format", "-f ", ""}, {"partition", "-P ", "0"}, {"offset", "-o ", "0"}, {"block size", "--block-size=", "512"},
	} {
		said := o.property == "format" && strings.HasPrefix(r.Image, "json:")
		if v := r.Property(o.property); v != o.usual && !said {
			line += " " + o.option + v
		}
	}
	return line + " " + word(r.Image)
}

// word makes one word of s for a shell.
func word(s string) string {
	if plainWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(printable(s), "'", `'\''`) + "'"
}

var plainWord = regexp.MustCompile(`^[\w./:@%+=,-]+$`)
