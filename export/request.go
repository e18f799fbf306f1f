package export

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A request as it came.
type request struct {
	flags  nbd.CommandFlags
	cmd    nbd.Command
	cookie uint64
	offset uint64
	length uint64
}

func (r *request) off() int64 { return int64(r.offset) } // of a request that was validated
func (r *request) n() int64   { return int64(r.length) }

func (r *request) has(f nbd.CommandFlags) bool { return r.flags&f != 0 }

// requestSize is the length of a request's header.
func (a *agreement) requestSize() int {
	if a.extended {
		return nbd.ExtRequestSize
	}
	return nbd.RequestSize
}

// errLost says that the requests of a client cannot be told apart any more.
var errLost = errors.New("bad request magic")

// decode reads the header of a request from the beginning of b.
func (a *agreement) decode(b []byte) (r request, err error) {
	magic := uint32(nbd.MagicRequest)
	if a.extended {
		magic = nbd.MagicExtRequest
	}
	if got := binary.BigEndian.Uint32(b); got != magic {
		return r, fmt.Errorf("%w %#x", errLost, got)
	}
	r.flags = nbd.CommandFlags(binary.BigEndian.Uint16(b[4:]))
	r.cmd = nbd.Command(binary.BigEndian.Uint16(b[6:]))
	r.cookie = binary.BigEndian.Uint64(b[8:])
	r.offset = binary.BigEndian.Uint64(b[16:])
	if a.extended {
		r.length = binary.BigEndian.Uint64(b[24:])
	} else {
		r.length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	return r, nil
}

// payload returns how many bytes follow the header.
func (a *agreement) payload(r *request) uint64 {
	if r.cmd == nbd.CmdWrite || a.extended && r.has(nbd.CmdFlagPayloadLen) {
		return r.length
	}
	return 0
}

// maxSkip is the longest payload of a refused request that is read and thrown
// away. A longer one ends the connection.
const maxSkip = 2 * nbd.MaxPayload

// maxStatusQuery bounds the payload of BLOCK_STATUS, in bytes.
const maxStatusQuery = 8 + 4*1024

// A refusal is an error that the client is told.
type refusal struct {
	errno nbd.Errno
	text  string
}

// validate returns why r must not be done, or nil. After it the range lies
// within the export, and a READ or WRITE is at most nbd.MaxPayload long. (The
// range of a BLOCK_STATUS with a payload is in the payload.)
func (a *agreement) validate(r *request) *refusal {
	allowed := nbd.CmdFlagFUA
	switch r.cmd {
	case nbd.CmdRead:
		if a.structured {
			allowed |= nbd.CmdFlagDF
		}
	case nbd.CmdWrite:
		if a.extended {
			allowed |= nbd.CmdFlagPayloadLen
		}
	case nbd.CmdWriteZeroes:
		allowed |= nbd.CmdFlagNoHole | nbd.CmdFlagFastZero
	case nbd.CmdBlockStatus:
		allowed |= nbd.CmdFlagReqOne
		if a.flags&nbd.FlagBlockStatusPayload != 0 {
			allowed |= nbd.CmdFlagPayloadLen
		}
	case nbd.CmdFlush, nbd.CmdTrim, nbd.CmdCache:
	default:
		return refuse(nbd.EINVAL, "invalid request type (%d) received", uint16(r.cmd))
	}
	if r.flags&^allowed != 0 {
		return refuse(nbd.EINVAL, "unsupported flags for command %v (got %#x)", r.cmd, uint16(r.flags))
	}

	outside := nbd.EINVAL
	switch r.cmd {
	case nbd.CmdFlush:
		return nil // offset and length are reserved
	case nbd.CmdWrite, nbd.CmdWriteZeroes, nbd.CmdTrim:
		if a.flags&nbd.FlagReadOnly != 0 {
			return refuse(nbd.EPERM, "Export is read-only")
		}
		if r.cmd != nbd.CmdTrim {
			outside = nbd.ENOSPC
		}
	case nbd.CmdBlockStatus:
		if len(a.contexts) == 0 {
			return refuse(nbd.EINVAL, "CMD_BLOCK_STATUS not negotiated")
		}
		if r.has(nbd.CmdFlagPayloadLen) {
			return nil
		}
		if r.length == 0 {
			return refuse(nbd.EINVAL, "need non-zero length")
		}
	}
	if (r.cmd == nbd.CmdRead || r.cmd == nbd.CmdWrite) && r.length > nbd.MaxPayload {
		return refuse(nbd.EINVAL, "len (%d) is larger than max len (%d)", r.length, nbd.MaxPayload)
	}
	return a.inside(r, outside)
}

// inside refuses a range that does not lie in the export.
func (a *agreement) inside(r *request, errno nbd.Errno) *refusal {
	if size := uint64(a.size); r.offset > size || r.length > size-r.offset {
		return refuse(errno, "operation past EOF; From: %d, Len: %d, Size: %d", r.offset, r.length, size)
	}
	return nil
}

func refuse(errno nbd.Errno, format string, args ...any) *refusal {
	return &refusal{errno, fmt.Sprintf(format, args...)}
}

// statusQuery decodes the payload of a BLOCK_STATUS: the length that is asked
// about and the contexts that are wanted, each one of those agreed on.
func (a *agreement) statusQuery(r *request, payload []byte) (length uint64, wanted []metaContext, _ *refusal) {
	bad := refuse(nbd.EINVAL, "CMD_BLOCK_STATUS payload not valid")
	if len(payload) < 8 || len(payload)%4 != 0 {
		return 0, nil, bad
	}
	length = binary.BigEndian.Uint64(payload)
	seen := make(map[uint32]bool)
	for ids := payload[8:]; len(ids) > 0; ids = ids[4:] {
		id := binary.BigEndian.Uint32(ids)
		c, ok := a.context(id)
		if !ok || seen[id] {
			return 0, nil, bad
		}
		seen[id] = true
		wanted = append(wanted, c)
	}
	if length == 0 {
		return 0, nil, refuse(nbd.EINVAL, "need non-zero length")
	}
	return length, wanted, a.inside(&request{offset: r.offset, length: length}, nbd.EINVAL)
}

func (a *agreement) context(id uint32) (metaContext, bool) {
	for _, c := range a.contexts {
		if c.id == id {
			return c, true
		}
	}
	return metaContext{}, false
}
