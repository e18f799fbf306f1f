package image

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"
)

// A CreateParam is a parameter that a format takes when it makes an image, by
// QEMU's name.
type CreateParam struct {
	Name    string
	Kind    ParamKind
	Default string // "" if there is none
	Help    string
	Refused string // why it is known and not taken; "" if it is
}

// What to do in place of the parameters of the host's file, of every format.
const (
	NoCOWAdvice      = "turn off copy-on-write for the directory: chattr +C"
	ExtentSizeAdvice = "set the hint of the directory: xfs_io -c 'extsize SIZE'"
)

// A ParamKind is the syntax of a parameter's value.
type ParamKind uint8

const (
	TextParam ParamKind = iota
	BoolParam
	NumberParam
	SizeParam // bytes
)

// Size returns the value of a parameter that is a number of bytes. Errors are in
// QEMU's words.
func (p Param) Size() (uint64, error) {
	n, err := ParseSize(p.Value)
	switch {
	case errors.Is(err, syscall.ERANGE):
		return 0, fmt.Errorf("Value '%s' is out of range for parameter '%s'", p.Value, p.Key)
	case err != nil:
		return 0, fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64\n"+
			"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.", p.Key)
	}
	return n, nil
}

// Bool returns the value of a parameter that is a switch. Errors are in QEMU's
// words.
func (p Param) Bool() (bool, error) {
	v, err := ParseBool(p.Value)
	if err != nil {
		return false, fmt.Errorf("Parameter '%s' expects 'on' or 'off'", p.Key)
	}
	return v, nil
}

// Unknown is the error of a format that does not have the parameter, in QEMU's
// words.
func (p Param) Unknown(format string) error {
	return fmt.Errorf("Block format '%s' does not support the option '%s'", format, p.Key)
}

// errSyntax is the error of a value that is not of its kind.
var errSyntax = errors.New("invalid syntax")

// ParseBool reads a switch as QEMU does.
func ParseBool(s string) (bool, error) {
	switch s {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, errSyntax
}

// ParseNumber reads an integer as QEMU does: decimal, 0x or 0, negative ones
// modulo 2^64. One that is too large is syscall.ERANGE.
func ParseNumber(s string) (uint64, error) {
	s = strings.TrimLeft(s, " \t\n\v\f\r")
	digits, negative := strings.CutPrefix(s, "-")
	if !negative {
		digits = strings.TrimPrefix(s, "+")
	}
	base := 10
	switch {
	case len(digits) > 2 && (digits[:2] == "0x" || digits[:2] == "0X"):
		digits, base = digits[2:], 16
	case len(digits) > 1 && digits[0] == '0':
		base = 8
	}
	n, err := strconv.ParseUint(digits, base, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, syscall.ERANGE
	case err != nil:
		return 0, errSyntax
	case negative:
		n = -n
	}
	return n, nil
}

// ParseSize reads a number of bytes as QEMU does: decimal, perhaps with a
// fraction and one of the letters b k M G T P E, or hexadecimal without. One
// that is too large is syscall.ERANGE.
func ParseSize(s string) (uint64, error) {
	s = strings.TrimPrefix(strings.TrimLeft(s, " \t\n\v\f\r"), "+")
	if len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") {
		n, err := strconv.ParseUint(s[2:], 16, 64)
		return n, sizeError(err)
	}
	unit := float64(1)
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", s[len(s)-1]|0x20); i >= 0 && s[len(s)-1] > '9' {
			s, unit = s[:len(s)-1], math.Ldexp(1, 10*i)
		}
	}
	whole, fraction, _ := strings.Cut(s, ".")
	n, err := strconv.ParseUint(whole, 10, 64)
	if err != nil {
		return 0, sizeError(err)
	}
	part := 0.0
	if fraction != "" {
		if strings.Trim(fraction, "0123456789") != "" {
			return 0, errSyntax
		}
		part, _ = strconv.ParseFloat("0."+fraction, 64)
		if part != 0 && unit == 1 {
			return 0, errSyntax
		}
	}
	if n > math.MaxUint64/uint64(unit) {
		return 0, syscall.ERANGE
	}
	n *= uint64(unit)
	if add := uint64(part * unit); n+add >= n {
		return n + add, nil
	}
	return 0, syscall.ERANGE
}

func sizeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, strconv.ErrRange):
		return syscall.ERANGE
	}
	return errSyntax
}
