package main

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"
)

// stdioConn returns the connection that standard input is, as inetd gives it,
// or that standard input and output are together, as ssh does.
func stdioConn(u *ui) (net.Conn, error) {
	in, ok := u.stdin.(*os.File)
	if !ok {
		return nil, errors.New("standard input is no file")
	}
	fi, err := in.Stat()
	if err != nil {
		return nil, err
	}
	switch fi.Mode().Type() {
	case fs.ModeSocket:
		return net.FileConn(in)
	case fs.ModeNamedPipe:
		// Reading has to end when the server is told to stop.
		if in.SetReadDeadline(time.Time{}) != nil {
			if err := syscall.SetNonblock(int(in.Fd()), true); err != nil {
				return nil, err
			}
			in = os.NewFile(in.Fd(), "standard input")
		} // else it is one that does not block, and the poller of the runtime has it
		return &pipeConn{in: in, out: u.stdout}, nil
	}
	return nil, errors.New("standard input is neither a socket nor a pipe")
}

// A pipeConn is a connection over two streams.
type pipeConn struct {
	in  io.Reader
	out io.Writer
}

func (c *pipeConn) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *pipeConn) Write(p []byte) (int, error) { return c.out.Write(p) }

func (c *pipeConn) Close() error {
	var errs []error
	for _, end := range []any{c.in, c.out} {
		if f, ok := end.(io.Closer); ok {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

func (c *pipeConn) LocalAddr() net.Addr  { return pipeAddr{} }
func (c *pipeConn) RemoteAddr() net.Addr { return pipeAddr{} }

func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// A pipe has deadlines; a terminal or a file has none, and says so.
func (c *pipeConn) SetReadDeadline(t time.Time) error {
	if f, ok := c.in.(interface{ SetReadDeadline(time.Time) error }); ok {
		return f.SetReadDeadline(t)
	}
	return os.ErrNoDeadline
}

func (c *pipeConn) SetWriteDeadline(t time.Time) error {
	if f, ok := c.out.(interface{ SetWriteDeadline(time.Time) error }); ok {
		return f.SetWriteDeadline(t)
	}
	return os.ErrNoDeadline
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "stdio" }
func (pipeAddr) String() string  { return "standard input" }
