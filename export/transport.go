package export

import (
	"errors"
	"math"
	"net"
	"os"
)

// A transport moves the bytes of a connection that transmits. One goroutine
// reads; writing is serialised by the caller. Closing is done through the
// net.Conn, and ends both.
type transport interface {
	// read waits for at least one byte and reads into a, then b. It fails only
	// if it has read nothing.
	read(a, b []byte) (int, error)

	// ready waits until read would not wait, or the end of the stream. It
	// returns false at once if the transport cannot tell.
	ready() (bool, error)

	// linger waits until read would not wait, for a moment at most, where to
	// ask again and again is faster than to be woken: in the midst of a large
	// write, or after a single request, whose client probably waits for the reply.
	linger(midst bool)

	// arrived reports whether read would not wait, if the transport can tell.
	arrived() (arrived, known bool)

	// hurry says whether many requests arrive at a time.
	hurry(many bool)

	// write sends iov, which it may change. With wait it returns when all is
	// sent; without, as soon as it would have to wait. It returns what is left.
	write(iov [][]byte, wait bool) (rest [][]byte, err error)

	// writable waits until write would not wait for the first byte.
	writable() error

	// sendFile sends some of the n bytes at off of f, without waiting and
	// without bringing them here: 0 with errAgain if it would have to wait, 0
	// and another error or none if f does not give them.
	sendFile(f *os.File, off int64, n int) (int, error)

	// sent is how many bytes were ever sent, and unread how many of them, or
	// more, the other side has not received, where sendFile works.
	sent() int64
	unread() int64

	// fileMin is from how many bytes on sendFile pays.
	fileMin() int64

	// forwardMin is from how many bytes on it pays that somebody else sends
	// what the line has read, while the line reads on.
	forwardMin() int64
}

var errAgain = errors.New("would wait")

// A stream is a transport over any net.Conn. It always waits: what must not
// wait is left to the writer of the connection.
type stream struct{ net.Conn }

func (s stream) read(a, _ []byte) (int, error) {
	n, err := s.Read(a)
	if n > 0 {
		err = nil // crypto/tls may tell the end with the last bytes, and tells it again
	}
	return n, err
}

func (s stream) ready() (bool, error) { return false, nil }

func (s stream) linger(bool) {}

func (s stream) arrived() (bool, bool) { return false, false }

func (s stream) hurry(bool) {}

func (s stream) write(iov [][]byte, wait bool) ([][]byte, error) {
	if !wait {
		return iov, nil
	}
	for ; len(iov) > 0; iov = iov[1:] {
		if _, err := s.Write(iov[0]); err != nil {
			return iov, err
		}
	}
	return nil, nil
}

func (s stream) writable() error { return nil }

func (s stream) sendFile(*os.File, int64, int) (int, error) { return 0, errors.ErrUnsupported }

func (s stream) sent() int64 { return 0 }

func (s stream) unread() int64 { return 0 }

func (s stream) fileMin() int64 { return math.MaxInt64 }

func (s stream) forwardMin() int64 { return math.MaxInt64 }
