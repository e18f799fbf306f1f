package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// A command is one verb of the program. The bare command, which serves, has no
// name.
type command struct {
	name  string
	flags *pflag.FlagSet
	run   func(u *ui, operands []string) error
}

// commands returns the table of sub-commands, in the order that help lists.
func commands() []*command {
	return []*command{infoCommand(), checkCommand(), createCommand(), partitionsCommand(), mountCommand(), umountCommand(), devicesCommand(), completionCommand(), helpCommand(), versionCommand()}
}

func newCommand(name string) *command {
	fs := pflag.NewFlagSet(name, pflag.ContinueOnError)
	fs.SortFlags = false
	flag(fs, "help", "h", func() error { return errHelp })
	return &command{name: name, flags: fs}
}

func findCommand(name string) *command {
	i := slices.IndexFunc(commands(), func(c *command) bool { return c.name == name })
	if i < 0 {
		return nil
	}
	return commands()[i]
}

// process is the program as a process of its own.
func process() int {
	if pipe := asGuardian(); pipe != nil {
		return report(guard(pipe))
	}
	args := os.Args
	if len(args) == 0 {
		args = []string{"imgnbd"}
	}
	u := newUI(args[0], os.Stdin, os.Stdout, os.Stderr)
	u.alone = true
	err := dispatch(u, args[1:])
	code := u.finish(err)
	if e, ok := errors.AsType[*signalled](err); ok {
		endBy(e.signal)
	}
	return code
}

// endBy ends the process by a signal, which nobody catches any more. It returns
// only if that does not work.
func endBy(s os.Signal) {
	self, err := os.FindProcess(os.Getpid())
	if err == nil && self.Signal(s) == nil {
		time.Sleep(time.Second) // another thread may be the one that gets it
	}
}

// run is the program within another. It returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	u := newUI(args[0], stdin, stdout, stderr)
	return u.finish(dispatch(u, args[1:]))
}

// dispatch runs the sub-command that the first argument names, or serves. A
// file with the name of a sub-command is served as ./NAME or after "--".
func dispatch(u *ui, args []string) error {
	if u.name == "nbd-client" {
		return nbdClient(u, args)
	}
	var c *command
	if len(args) > 0 && !u.compat() {
		c = findCommand(args[0])
	}
	if c == nil {
		c = serveCommand(args)
	} else {
		args = args[1:]
	}
	u.command = c.name
	operands, err := scan(c.flags, args)
	switch {
	case errors.Is(err, errHelp):
		return u.help(c.name)
	case errors.Is(err, errVersion):
		u.version()
		return nil
	case err != nil:
		return err
	case c.name == "" && !u.compat() && len(operands) > 1 && operands[0] == args[0] && likeCommand(args[0]):
		return usageError("there is no command '%s'", args[0])
	}
	return c.run(u, operands)
}

// likeCommand reports whether a word was perhaps meant for a command: there is no
// such file.
func likeCommand(word string) bool {
	if !commandWord.MatchString(word) {
		return false
	}
	_, err := os.Lstat(word)
	return errors.Is(err, fs.ErrNotExist)
}

var commandWord = regexp.MustCompile(`^[a-z]+$`)

// usageError is a mistake in a sub-command's operands.
func usageError(format string, args ...any) error {
	return &usage{text: fmt.Sprintf(format, args...)}
}

// one returns the only operand.
func one(operands []string, what string) (string, error) {
	switch len(operands) {
	case 0:
		return "", usageError("%s is missing", what)
	case 1:
		return operands[0], nil
	}
	return "", usageError("one %s is expected, not %s", what, strings.Join(operands, " "))
}
