package nbd

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unicode"
)

// ErrConnection is wrapped by the error of every request that a lost
// connection left without an answer: the server may or may not have done it.
var ErrConnection = errors.New("connection lost")

var errnos = map[Errno]struct {
	sys  syscall.Errno
	text string
}{
	EPERM:     {syscall.EPERM, "operation not permitted"},
	EIO:       {syscall.EIO, "input/output error"},
	ENOMEM:    {syscall.ENOMEM, "cannot allocate memory"},
	EINVAL:    {syscall.EINVAL, "invalid argument"},
	ENOSPC:    {syscall.ENOSPC, "no space left on device"},
	EOVERFLOW: {syscall.EOVERFLOW, "value too large"},
	ENOTSUP:   {syscall.EOPNOTSUPP, "operation not supported"},
	ESHUTDOWN: {syscall.ESHUTDOWN, "server is shutting down"},
}

func (e Errno) Error() string {
	if s, ok := errnos[e]; ok {
		return s.text
	}
	return fmt.Sprintf("error %d", uint32(e))
}

// Unwrap returns the host's error of the same meaning, so that errors.Is
// finds syscall.ENOSPC or errors.ErrUnsupported. A number that the
// specification does not know means EINVAL.
func (e Errno) Unwrap() error {
	if s, ok := errnos[e]; ok {
		return s.sys
	}
	return syscall.EINVAL
}

// An Error is a server's refusal of a request. It wraps its Errno.
type Error struct {
	Command        Command
	Offset, Length int64
	Errno          Errno
	Message        string // the server's words, "" if it gave none
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s of %d bytes at %d: %v", e.Command, e.Length, e.Offset, e.Errno)
	if e.Message != "" {
		s += ": " + printable(e.Message)
	}
	return s
}

func (e *Error) Unwrap() error { return e.Errno }

// An OptionError is a server's refusal of an option of the handshake.
type OptionError struct {
	Option  Option
	Reply   OptionReply
	Message string // the server's words, "" if it gave none
}

var refusals = map[OptionReply]string{
	RepErrUnsup:         "not supported by the server",
	RepErrPolicy:        "refused by the server's policy",
	RepErrInvalid:       "called invalid by the server",
	RepErrPlatform:      "not supported on the server's platform",
	RepErrTLSReqd:       "the server requires TLS",
	RepErrUnknown:       "no such export",
	RepErrShutdown:      "the server is shutting down",
	RepErrBlockSizeReqd: "the server requires a client that honours block sizes",
	RepErrTooBig:        "too big for the server",
	RepErrExtHeaderReqd: "the server requires extended headers",
}

func (e *OptionError) Error() string {
	why, ok := refusals[e.Reply]
	if !ok {
		why = fmt.Sprintf("error reply %#x", uint32(e.Reply))
	}
	s := fmt.Sprintf("option %s: %s", e.Option, why)
	if e.Message != "" {
		s += ": " + printable(e.Message)
	}
	return s
}

// protocolError is a server's breach of the protocol; the connection is of no
// more use.
func protocolError(format string, a ...any) error {
	return fmt.Errorf("protocol error by the server: "+format, a...)
}

// printable keeps a peer's words from steering a terminal or faking log lines.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
