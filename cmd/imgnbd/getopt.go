package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// own marks the flags that qemu-nbd does not have. An abbreviation means one
// of them only if it could not mean one of qemu-nbd's.
const own = "own"

// scan sets the flags of fs from args by the rules of getopt_long, which are
// not those of pflag: an unambiguous prefix of a long name will do, options
// and operands mix, and the messages are glibc's. It returns the operands.
// The error of a flag's value ends the scan and is returned as it is, so what
// comes first on the command line is complained of first.
func scan(fs *pflag.FlagSet, args []string) (operands []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			return append(operands, args...), nil
		case strings.HasPrefix(arg, "--"):
			args, err = scanLong(fs, arg[2:], args)
		case strings.HasPrefix(arg, "-") && arg != "-":
			args, err = scanShort(fs, arg[1:], args)
		default:
			operands = append(operands, arg)
		}
		if err != nil {
			return nil, err
		}
	}
	return operands, nil
}

// scanLongOnly scans by the rules of getopt_long_only: long names may have one
// dash, and operands are taken where they stand.
func scanLongOnly(fs *pflag.FlagSet, args []string, operand func(string) error) (err error) {
	for len(args) > 0 && err == nil {
		arg := args[0]
		args = args[1:]
		name, dashed := strings.CutPrefix(arg, "-")
		switch {
		case arg == "--":
			for ; len(args) > 0 && err == nil; args = args[1:] {
				err = operand(args[0])
			}
		case !dashed || name == "":
			err = operand(arg)
		case strings.HasPrefix(name, "-"):
			args, err = scanLong(fs, name[1:], args)
		case len(name) == 1 && shorthand(fs, name[0]) != nil || !isLong(fs, name) && shorthand(fs, name[0]) != nil:
			args, err = scanShort(fs, name, args)
		default:
			args, err = scanLong(fs, name, args)
			if e, ok := errors.AsType[*usage](err); ok {
				e.text = strings.ReplaceAll(e.text, "'--", "'-")
			}
		}
	}
	return err
}

// isLong reports whether arg, perhaps with a value, begins a long name.
func isLong(fs *pflag.FlagSet, arg string) (found bool) {
	name, _, _ := strings.Cut(arg, "=")
	fs.VisitAll(func(f *pflag.Flag) { found = found || strings.HasPrefix(f.Name, name) })
	return found
}

func scanLong(fs *pflag.FlagSet, arg string, rest []string) ([]string, error) {
	name, value, hasValue := strings.Cut(arg, "=")
	f, err := lookup(fs, name, arg)
	if err != nil {
		return nil, err
	}
	switch {
	case takesValue(f) && !hasValue && len(rest) == 0:
		return nil, scanError("option '--%s' requires an argument", f.Name)
	case takesValue(f) && !hasValue:
		return rest[1:], set(f, rest[0])
	case takesValue(f):
		return rest, set(f, value)
	case hasValue:
		return nil, scanError("option '--%s' doesn't allow an argument", f.Name)
	}
	return rest, set(f, f.NoOptDefVal)
}

func scanShort(fs *pflag.FlagSet, letters string, rest []string) ([]string, error) {
	for i := range len(letters) {
		f := shorthand(fs, letters[i])
		switch tail := letters[i+1:]; {
		case f == nil:
			return nil, scanError("invalid option -- '%s'", letters[i:i+1])
		case !takesValue(f):
			if err := set(f, f.NoOptDefVal); err != nil {
				return nil, err
			}
		case tail != "":
			return rest, set(f, tail)
		case len(rest) == 0:
			return nil, scanError("option requires an argument -- '%c'", letters[i])
		default:
			return rest[1:], set(f, rest[0])
		}
	}
	return rest, nil
}

// lookup finds the flag that name, perhaps abbreviated, means; messages show
// arg, of which it is a part.
func lookup(fs *pflag.FlagSet, name, arg string) (*pflag.Flag, error) {
	if f := fs.Lookup(name); f != nil {
		return f, nil
	}
	var theirs, ours []*pflag.Flag
	fs.VisitAll(func(f *pflag.Flag) {
		if !strings.HasPrefix(f.Name, name) {
			return
		}
		if _, ok := f.Annotations[own]; ok {
			ours = append(ours, f)
		} else {
			theirs = append(theirs, f)
		}
	})
	matches := theirs
	if len(theirs) == 0 {
		matches = ours
	}
	switch len(matches) {
	case 0:
		return nil, scanError("unrecognized option '--%s'", arg)
	case 1:
		return matches[0], nil
	}
	var list strings.Builder
	for _, f := range matches {
		fmt.Fprintf(&list, " '--%s'", f.Name)
	}
	return nil, scanError("option '--%s' is ambiguous; possibilities:%s", arg, list.String())
}

// shorthand is fs.ShorthandLookup for a byte that need not be ASCII.
func shorthand(fs *pflag.FlagSet, c byte) *pflag.Flag {
	if c >= 0x80 {
		return nil
	}
	return fs.ShorthandLookup(string(rune(c)))
}

func takesValue(f *pflag.Flag) bool { return f.NoOptDefVal == "" }

func set(f *pflag.Flag, value string) error {
	if err := f.Value.Set(value); err != nil {
		return err
	}
	f.Changed = true
	return nil
}

func scanError(format string, args ...any) error {
	return &usage{fmt.Sprintf(format, args...), true}
}
