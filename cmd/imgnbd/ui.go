package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf16"

	"github.com/imgnbd/imgnbd/image"
)

// The rules of output:
//
//   - results go to stdout, everything else to stderr;
//   - a message is one line that begins with the name of the program as it was
//     called; "hint:" lines say what to do about the message above them;
//   - text that scripts know from qemu-nbd or qemu-img is theirs to the byte;
//   - what an image or a server chose is printable when people see it.

// A ui is how the program talks to who called it.
type ui struct {
	called         string // argv[0]
	marked         bool   // it began with "@", by which systemd knows what to spare when it leaves an initrd
	name           string // its last element
	command        string // the sub-command that runs, "" for the bare one
	stdin          io.Reader
	stdout, stderr io.Writer
	alone          bool  // the process is this program's, and may be confined
	lost           error // why a result did not get to stdout
}

func newUI(called string, stdin io.Reader, stdout, stderr io.Writer) *ui {
	called, marked := strings.CutPrefix(called, "@")
	return &ui{called: called, marked: marked, name: filepath.Base(called), stdin: stdin, stdout: stdout, stderr: stderr}
}

// compat reports whether the program was called by qemu-nbd's name.
func (u *ui) compat() bool { return u.name == "qemu-nbd" }

// printf prints a result. That it is lost is told at the end, see finish.
func (u *ui) printf(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if text == "" {
		return // even to write nothing may fail
	}
	if _, err := io.WriteString(u.stdout, text); err != nil {
		u.lost = err
	}
}

// json prints v as QEMU does: in ASCII.
func (u *ui) json(v any) error {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "    ")
	if err := enc.Encode(v); err != nil {
		return err
	}
	emptyList := regexp.MustCompile(`(?m)^( *)(.*)\[\](,?)$`)
	u.printf("%s", escaped(emptyList.ReplaceAllString(b.String(), "$1$2[\n$1]$3")))
	return nil
}

// escaped writes what is not ASCII in JSON as \uXXXX, with capitals.
func escaped(text string) string {
	text = regexp.MustCompile(`\\(?:\\|u[0-9a-f]{4})`).ReplaceAllStringFunc(text, func(s string) string {
		return `\` + strings.Replace(strings.ToUpper(s[1:]), "U", "u", 1)
	})
	return regexp.MustCompile(`[^\x00-\x7e]`).ReplaceAllStringFunc(text, func(s string) string {
		var b strings.Builder
		for _, unit := range utf16.Encode([]rune(s)) {
			fmt.Fprintf(&b, `\u%04X`, unit)
		}
		return b.String()
	})
}

// message prints one line, or several that belong together, at once: messages
// of several goroutines do not mix.
func (u *ui) message(text string) { u.bare(u.name + ": " + text) }

// bare prints a line of QEMU's that does not begin with the program's name.
func (u *ui) bare(text string) { io.WriteString(u.stderr, printableBut("\n\t", text)+"\n") }

// printable keeps the words of others from steering a terminal or faking lines.
func printable(s string) string { return printableBut("", s) }

func printableBut(keep, s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && !strings.ContainsRune(keep, r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

func (u *ui) warning(text string) { u.message("warning: " + text) }

// An exit ends the program with a status other than 1.
type exit struct {
	code int
	err  error // nil: what there was to say has been said
}

func (e *exit) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exit) Unwrap() error { return e.err }

// A signalled ends the program by a signal that it has caught, for its parent to
// see: a shell leaves its loop then.
type signalled struct {
	signal os.Signal
	err    error
}

func (e *signalled) Error() string { return e.err.Error() }

func (e *signalled) Unwrap() error { return e.err }

// A usage is a mistake in the command line.
type usage struct {
	text   string
	getopt bool // found while scanning; printed as getopt_long and its callers do
}

func (e *usage) Error() string { return e.text }

// finish is fail at the end of a command, whose results may be lost.
func (u *ui) finish(err error) int {
	code := u.fail(err)
	if u.lost != nil {
		code = max(code, u.fail(u.lost))
	}
	return code
}

// fail prints err and returns the exit status that it stands for.
func (u *ui) fail(err error) int {
	if err == nil {
		return 0
	}
	code := 1
	if s, ok := err.(*signalled); ok {
		err = s.err
	}
	if list, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range list.Unwrap() {
			code = max(code, u.fail(err))
		}
		return code
	}
	if e, ok := errors.AsType[*exit](err); ok {
		if code = e.code; e.err == nil {
			return code
		}
	}
	if e, ok := errors.AsType[*usage](err); ok {
		help := strings.TrimSuffix(u.called+" "+u.command, " ")
		try := "Try `" + help + " --help' for more information.\n"
		if e.getopt {
			io.WriteString(u.stderr, u.called+": "+e.text+"\n"+u.name+": "+try)
		} else {
			io.WriteString(u.stderr, u.name+": "+e.text+"\n"+try)
		}
		return code
	}
	text := err.Error()
	for e := err; ; {
		hint, ok := errors.AsType[*image.Hint](e)
		if !ok {
			break
		}
		text += "\n" + u.name + ": hint: " + hint.Advice
		e = hint.Err
	}
	u.message(text)
	return code
}

// strerror is what C's strerror says of the errno in err; other errors speak
// for themselves.
func strerror(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		s := []rune(errno.Error())
		s[0] = unicode.ToUpper(s[0])
		return string(s)
	}
	return err.Error()
}

// says returns an error in the words of qemu-nbd or qemu-img.
func says(format string, args ...any) error { return qemuError(fmt.Sprintf(format, args...)) }

type qemuError string

func (e qemuError) Error() string { return string(e) }

// hinted adds advice to an error.
func hinted(err error, advice ...string) error {
	return &image.Hint{Err: err, Advice: strings.Join(advice, " ")}
}
