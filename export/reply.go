package export

import (
	"encoding/binary"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// maxReplyHead bounds what comes before the data of one chunk, in bytes: an
// extended header and an offset.
const maxReplyHead = nbd.ExtReplySize + 8

// appendSimple appends the header of a simple reply.
func appendSimple(dst []byte, r *request, errno nbd.Errno) []byte {
	dst = binary.BigEndian.AppendUint32(dst, nbd.MagicSimpleReply)
	dst = binary.BigEndian.AppendUint32(dst, uint32(errno))
	return binary.BigEndian.AppendUint64(dst, r.cookie)
}

// appendChunk appends the header of a chunk with n bytes of payload.
func (a *agreement) appendChunk(dst []byte, r *request, flags, typ uint16, n int) []byte {
	magic := uint32(nbd.MagicStructuredReply)
	if a.extended {
		magic = nbd.MagicExtReply
	}
	dst = binary.BigEndian.AppendUint32(dst, magic)
	dst = binary.BigEndian.AppendUint16(dst, flags)
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint64(dst, r.cookie)
	if a.extended {
		dst = binary.BigEndian.AppendUint64(dst, r.offset)
		return binary.BigEndian.AppendUint64(dst, uint64(n))
	}
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// chunkSize returns the length of a chunk's header.
func (a *agreement) chunkSize() int {
	if a.extended {
		return nbd.ExtReplySize
	}
	return nbd.StructuredReplySize
}

// dataHeadSize returns the length of what precedes data in a reply.
func (a *agreement) dataHeadSize() int {
	if !a.structured {
		return nbd.SimpleReplySize
	}
	return a.chunkSize() + 8
}

// appendDataHead appends what precedes n bytes of data read at off, at
// least one. In a simple reply they are all that was asked for.
func (a *agreement) appendDataHead(dst []byte, r *request, flags uint16, off int64, n int) []byte {
	if !a.structured {
		return appendSimple(dst, r, 0)
	}
	dst = a.appendChunk(dst, r, flags, nbd.ReplyOffsetData, 8+n)
	return binary.BigEndian.AppendUint64(dst, uint64(off))
}

// appendHole appends a chunk that says that n bytes at off are zeros.
func (a *agreement) appendHole(dst []byte, r *request, flags uint16, off int64, n int) []byte {
	dst = a.appendChunk(dst, r, flags, nbd.ReplyOffsetHole, 12)
	dst = binary.BigEndian.AppendUint64(dst, uint64(off))
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// appendDone appends a reply that says that r has been done, and no more.
// With structured replies that is still a simple reply but for reads, as in
// qemu-nbd.
func (a *agreement) appendDone(dst []byte, r *request) []byte {
	if a.extended || a.structured && r.cmd == nbd.CmdRead {
		return a.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyNone, 0)
	}
	return appendSimple(dst, r, 0)
}

// appendError appends the last chunk of a reply, which says what went wrong.
func (a *agreement) appendError(dst []byte, r *request, f *refusal) []byte {
	if !a.structured {
		return appendSimple(dst, r, f.errno)
	}
	text := f.text[:min(len(f.text), nbd.MaxString)]
	dst = a.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyError, 6+len(text))
	dst = binary.BigEndian.AppendUint32(dst, uint32(f.errno))
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// appendErrorAt is appendError for a read that failed at off, after some of
// it may have been sent. There is no such thing in a simple reply.
func (a *agreement) appendErrorAt(dst []byte, r *request, f *refusal, off int64) []byte {
	text := f.text[:min(len(f.text), nbd.MaxString)]
	dst = a.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyErrorOffset, 6+len(text)+8)
	dst = binary.BigEndian.AppendUint32(dst, uint32(f.errno))
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(text)))
	dst = append(dst, text...)
	return binary.BigEndian.AppendUint64(dst, uint64(off))
}
