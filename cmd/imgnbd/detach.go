package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/imgnbd/imgnbd/connect"
)

// detachTime bounds a detachment, which waits until the server has written
// everything to its image.
const detachTime = 10 * time.Minute

// inUse is the exit status of --disconnect when the device is.
const inUse = 2

// disconnectDevice is the bare command with --disconnect.
func (o *serveOptions) disconnectDevice(u *ui, device string) error {
	if strings.HasPrefix(device, "nbd") && !u.compat() { // as nbdtab and --connect without an image name it
		device = "/dev/" + device
	}
	if _, err := os.Stat(device); err != nil {
		return says("Cannot open %s: %s", device, strerror(err))
	}
	err := detachDevice(device, o.connect.force)
	if isBusy(err) && !o.connect.force && u.compat() {
		// Qemu-nbd does not look. What can be saved is.
		u.warning(err.Error() + ": what is written to it from now on is lost")
		if err = detachDevice(device, true); isBusy(err) {
			u.warning(err.Error())
			err = nil
		}
	}
	switch {
	case errors.Is(err, connect.ErrNotAttached) && u.compat():
		u.warning(err.Error()) // to qemu-nbd it is no failure
	case isBusy(err) && !o.connect.force:
		return &exit{inUse, hinted(err, "umount it, or lose what is written to it from now on with --force")}
	case err != nil:
		return err
	}
	u.printf("%s disconnected\n", device)
	return nil
}

// detachDevice detaches a device of this machine, unless a signal ends the
// waiting.
func detachDevice(device string, force bool) error {
	return cancelledBySignals(func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, detachTime)
		defer cancel()
		return connect.Detach(ctx, device, force)
	})
}

func isBusy(err error) bool {
	_, ok := errors.AsType[*connect.BusyError](err)
	return ok
}

// detach takes the device from the kernel. While it is mounted or held
// otherwise it goes on being served, whatever signals come: who stops services,
// systemd for one, sends more of them when it has waited for a while. A successor
// still gets it. What cannot be flushed is told, and lost.
func (s *service) detach(a *connect.Attachment) error {
	var failed error
	for force, told := false, false; ; {
		err := errors.New("nothing of it is to be seen in /sys, nor who uses it")
		if a.Seen() {
			err = s.runDetacher(a, force)
		}
		pause := 200 * time.Millisecond
		e, ok := errors.AsType[*exit](err)
		_, left := errors.AsType[*departed](err)
		switch {
		case err == nil || left:
			return errors.Join(failed, err)
		case ok && e.code < 0: // it was killed, which says nothing of the device
		case ok && e.code != inUse && !force && len(a.Holders()) == 0:
			failed, force = e.err, true
			continue
		case ok && (e.code == inUse || len(a.Holders()) > 0):
			if !told {
				told = true
				s.u.message(e.err.Error() + ": it is detached as soon as it is free, or by imgnbd --disconnect --force " + a.Path())
			}
		default: // it may be in use
			pause = 5 * time.Second
			if !told {
				told = true
				s.u.message(fmt.Sprintf("%s is not detached: %v: it is served on, and that is tried again", a.Path(), err))
			}
		}
		force = false
		for used := true; used; used = !a.Seen() || len(a.Holders()) > 0 {
			select {
			case <-s.over: // somebody has detached it
				return failed
			case successor := <-a.Successors(): // who may know better
				if err := s.handOver(a, successor); err != nil {
					return err
				}
			case <-s.signals:
			case <-time.After(pause):
			}
		}
	}
}

// runDetacher detaches the device in another process. To flush it waits for
// this one: a thread that did so here would keep its sockets open after the
// death of all others, and neither would the wait have an end nor could the
// device be taken over. What fails is an *exit, of -1 if it was killed. A signal,
// or a server that does not answer, leaves the device attached, with a *departed.
func (s *service) runDetacher(a *connect.Attachment, force bool) error {
	if !a.Ours() {
		return nil
	}
	self, err := selfPath()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "--disconnect", a.Path())
	cmd.Args[0] = "imgnbd"
	if force {
		cmd.Args = append(cmd.Args, "--force")
	}
	cmd.SysProcAttr = dependent() // without this process the device is to wait
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	s.detacher = ended
	go func() {
		err := cmd.Wait()
		if status, failed := errors.AsType[*exec.ExitError](err); failed {
			text, _, _ := strings.Cut(strings.TrimPrefix(said.String(), "imgnbd: "), "\n")
			err = &exit{status.ExitCode(), errors.New(text)}
		}
		ended <- err
	}()
	var late <-chan time.Time
	var answered string // when late was set
	for {
		select {
		case err := <-ended:
			s.detacher = nil
			return err
		case <-s.over: // it waits for the image to be closed now
			return nil
		case <-s.signals:
			s.hurried.Store(true)
			late, answered = time.After(closeTime), a.Answered()
		case <-late:
			if now := a.Answered(); now != answered { // it takes long, that is all
				late, answered = time.After(closeTime), now
				continue
			}
			cmd.Process.Kill() // it may have to wait for whoever serves the device next
			err := fmt.Errorf("%s does not answer: %s stays attached", s.file, a.Path())
			advice := "what is not flushed is given up with imgnbd --disconnect --force " + a.Path()
			if s.device != nil {
				advice = "attached again in the same way it goes on; " + advice
			}
			return &departed{hinted(err, advice)}
		}
	}
}

// awaitDetacher waits until the process that has detached the device is done
// with what it leaves of it.
func (s *service) awaitDetacher() error {
	if s.detacher == nil {
		return nil
	}
	return <-s.detacher
}
