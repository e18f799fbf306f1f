package export

import (
	"crypto/tls"
	"net"

	"github.com/imgnbd/imgnbd/image"
)

// An Export shows a Device, or a part of it, to clients. Its fields do not
// change once it was returned by Server.Open. The same Export may be returned
// for many connections; several Exports may show parts of one Device.
type Export struct {
	Name        string // as LIST and info tell it; at most 4096 bytes
	Description string // at most 4096 bytes; "" if it has none

	// Device must be a comparable value, as a pointer is: connections to the
	// same Device share its workers and its flushes. The server never closes it.
	Device image.Device

	// Offset and Length choose the part of the device that is shown, in
	// bytes; Length 0 is all that follows Offset. They apply to requests and
	// to contexts alike.
	Offset, Length int64

	ReadOnly   bool
	MultiConn  bool // tells clients that a flush on one connection covers all
	Rotational bool

	MaxClients int // connections to this export at once; 0: no limit

	// AllocationDepth offers the context qemu:allocation-depth.
	AllocationDepth bool
	// Contexts are offered besides base:allocation and qemu:allocation-depth.
	Contexts []MetaContext

	// Release, if set, is called once for each time that Open returned the
	// Export, when the connection no longer uses it.
	Release func()
}

// size returns the number of bytes that clients see.
func (e *Export) size() int64 {
	rest := max(e.Device.Info().Size-e.Offset, 0)
	if e.Length == 0 {
		return rest
	}
	return min(e.Length, rest)
}

func (e *Export) readOnly() bool { return e.ReadOnly || e.Device.Info().ReadOnly }

// Info is what LIST tells of an export.
type Info struct {
	Name, Description string
}

// A MetaContext answers block status queries under one name.
type MetaContext interface {
	// Name is the full name, with its namespace.
	Name() string

	// AppendStatus appends a prefix of the description of [off, off+n) of the
	// Device, n > 0: at least one Status, the first beginning at off, each
	// following the one before, none past off+n. It may be called concurrently.
	AppendStatus(dst []Status, off, n int64) ([]Status, error)
}

// A Status describes a run of bytes in a MetaContext.
type Status struct {
	Length int64
	Flags  uint64 // of which clients without extended headers see the low 32 bits
}

// A Client is one connection.
type Client struct {
	Addr net.Addr             // of the peer; nil if it has none
	TLS  *tls.ConnectionState // nil in the clear
	Cred *Credentials         // of the peer of a Unix socket, nil if not known
}

// Credentials are those of the process that connected to a Unix socket, when
// it did.
type Credentials struct {
	PID      int
	UID, GID uint32 // effective; other groups are not told
}

// A State of a connection, as in net/http.
type State int

const (
	// StateNew is a connection that was accepted.
	StateNew State = iota
	// StateActive is a connection that has agreed on an export.
	StateActive
	// StateClosed is the end. It comes once for each StateNew, after all that
	// the connection asked for has been done.
	StateClosed
)

func (s State) String() string {
	switch s {
	case StateNew:
		return "new"
	case StateActive:
		return "active"
	case StateClosed:
		return "closed"
	}
	return "unknown"
}
