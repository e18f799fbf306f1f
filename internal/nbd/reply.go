package nbd

import (
	"bufio"
	"encoding/binary"
	"io"
	"slices"
)

// Bounds on what a server may send as the reply to one request.
const (
	maxErrorChunk   = 6 + MaxString + 8 // bytes: code, text, offset
	maxErrorChunks  = 1000
	maxStatusExtent = 1 << 20 // extents of one context
	maxGaps         = 1000    // pieces of a read that arrive out of order
)

// readReply reads a simple reply, or one chunk of another. Its error means
// that the stream is of no more use.
func (c *Client) readReply(r *bufio.Reader) error {
	var h [ExtReplySize]byte
	if _, err := io.ReadFull(r, h[:SimpleReplySize]); err != nil {
		return err
	}
	magic := binary.BigEndian.Uint32(h[:])
	switch {
	case magic == MagicSimpleReply && c.session.Protocol != Extended:
		return c.simpleReply(r, h[:SimpleReplySize])
	case magic == MagicStructuredReply && c.session.Protocol == Structured:
		if _, err := io.ReadFull(r, h[SimpleReplySize:StructuredReplySize]); err != nil {
			return err
		}
		return c.chunk(r, h[:], uint64(binary.BigEndian.Uint32(h[16:])))
	case magic == MagicExtReply && c.session.Protocol == Extended:
		if _, err := io.ReadFull(r, h[SimpleReplySize:]); err != nil {
			return err
		}
		return c.chunk(r, h[:], binary.BigEndian.Uint64(h[24:]))
	}
	return protocolError("reply magic %#x among %s replies", magic, c.session.Protocol)
}

// lookup finds the call that awaits the reply with this cookie.
func (c *Client) lookup(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slot := cookie & (1<<slotBits - 1); slot < uint64(len(c.calls)) {
		if k := c.calls[slot]; k.active && k.cookie() == cookie {
			return k, nil
		}
	}
	return nil, protocolError("reply to request %#x, which awaits none", cookie)
}

// finish ends a call whose reply is complete.
func (c *Client) finish(k *call, err error) {
	c.mu.Lock()
	k.active = false
	c.mu.Unlock()
	k.done <- err
}

func (c *Client) simpleReply(r *bufio.Reader, h []byte) error {
	k, err := c.lookup(binary.BigEndian.Uint64(h[8:]))
	if err != nil {
		return err
	}
	if e := Errno(binary.BigEndian.Uint32(h[4:])); e != 0 {
		// Not allowed for a structured read, but nbd-server does it, and there
		// is no doubt what it means.
		c.finish(k, k.refusal(e, ""))
		return nil
	}
	if c.session.Protocol != Simple && (k.command == CmdRead || k.command == CmdBlockStatus) {
		return protocolError("simple reply to a %s", k.command)
	}
	if _, err := io.ReadFull(r, k.data); err != nil {
		return err
	}
	c.finish(k, nil)
	return nil
}

func (k *call) refusal(e Errno, message string) error {
	return &Error{Command: k.command, Offset: k.offset, Length: k.len, Errno: e, Message: message}
}

// chunk reads the payload of one chunk, which has n bytes, and ends its call
// if it is the last.
func (c *Client) chunk(r *bufio.Reader, h []byte, n uint64) error {
	flags, kind := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
	k, err := c.lookup(binary.BigEndian.Uint64(h[8:]))
	if err != nil {
		return err
	}
	if c.session.Protocol == Extended && binary.BigEndian.Uint64(h[16:]) != uint64(k.offset) {
		return protocolError("reply to a %s at %d says it is at %d", k.command, k.offset, binary.BigEndian.Uint64(h[16:]))
	}
	last := flags&ReplyFlagDone != 0
	switch {
	case kind == ReplyNone && last && n == 0:
	case kind == ReplyOffsetData && k.command == CmdRead && n > 8:
		err = k.readData(r, n-8)
	case kind == ReplyOffsetHole && k.command == CmdRead && n == 12:
		err = k.readHole(r)
	case kind == ReplyBlockStatus && k.command == CmdBlockStatus:
		err = c.readStatus(k, r, n, 4, 4)
	case kind == ReplyBlockStatusExt && k.command == CmdBlockStatus && c.session.Protocol == Extended:
		err = c.readStatus(k, r, n, 8, 8)
	case kind&(1<<15) != 0 && n >= 6 && n <= maxErrorChunk && k.errors < maxErrorChunks:
		err = k.readError(r, kind, n)
	default:
		err = protocolError("chunk of type %d, flags %#x and %d bytes in the reply to a %s", kind, flags, n, k.command)
	}
	if err == nil && last {
		c.finish(k, c.outcome(k))
	}
	return err
}

// outcome judges a complete reply.
func (c *Client) outcome(k *call) error {
	if k.err != nil {
		return k.err
	}
	if k.command == CmdRead && k.got.n != k.len {
		return protocolError("%s of %d bytes at %d: %d bytes are missing in the reply", k.command, k.len, k.offset, k.len-k.got.n)
	}
	if k.command == CmdBlockStatus && len(k.status) != len(c.session.Contexts) {
		return protocolError("%s of %d bytes at %d: %d of %d contexts in the reply", k.command, k.len, k.offset, len(k.status), len(c.session.Contexts))
	}
	return nil
}

// piece reads the offset that begins a chunk of a read, and notes that n bytes
// from there are answered. It returns where they belong.
func (k *call) piece(offset uint64, n uint64) ([]byte, error) {
	at := offset - uint64(k.offset) // huge if below
	if at >= uint64(k.len) || n == 0 || n > uint64(k.len)-at {
		return nil, protocolError("%d bytes at %d in the reply to a read of %d at %d", n, offset, k.len, k.offset)
	}
	if !k.got.add(int64(at), int64(n)) {
		return nil, protocolError("pieces of a read of %d at %d overlap, or are too many", k.len, k.offset)
	}
	return k.data[at : at+n], nil
}

func (k *call) readData(r *bufio.Reader, n uint64) error {
	var b [8]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	p, err := k.piece(binary.BigEndian.Uint64(b[:]), n)
	if err == nil {
		_, err = io.ReadFull(r, p)
	}
	return err
}

func (k *call) readHole(r *bufio.Reader) error {
	var b [12]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	p, err := k.piece(binary.BigEndian.Uint64(b[:]), uint64(binary.BigEndian.Uint32(b[8:])))
	if err == nil {
		clear(p)
	}
	return err
}

func (k *call) readError(r *bufio.Reader, kind uint16, n uint64) error {
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	e, text := Errno(binary.BigEndian.Uint32(b)), int(binary.BigEndian.Uint16(b[4:]))
	b = b[6:]
	if e == 0 || text > len(b) || text > MaxString || kind == ReplyErrorOffset && len(b)-text != 8 {
		return protocolError("error chunk of type %d with code %d, %d bytes of text in %d", kind, e, text, n)
	}
	k.errors++
	if k.err == nil {
		k.err = k.refusal(e, string(b[:text]))
	}
	return nil
}

// readStatus reads a chunk of block status: its context's id, then after what
// else the header has the extents, two numbers of a width in bytes each.
func (c *Client) readStatus(k *call, r *bufio.Reader, n uint64, header, width int) error {
	size := uint64(2 * width)
	if n < uint64(header)+size || (n-uint64(header))%size != 0 {
		return protocolError("block status of %d bytes", n)
	}
	count := (n - uint64(header)) / size
	var b [16]byte
	if _, err := io.ReadFull(r, b[:header]); err != nil {
		return err
	}
	id := binary.BigEndian.Uint32(b[:])
	if header == 8 && uint64(binary.BigEndian.Uint32(b[4:])) != count || count > maxStatusExtent {
		return protocolError("block status of %d extents in %d bytes", binary.BigEndian.Uint32(b[4:]), n)
	}
	i := slices.IndexFunc(c.session.Contexts, func(x Context) bool { return x.ID == id })
	if i < 0 {
		return protocolError("block status of context %d, which was not selected", id)
	}
	s := ContextStatus{Context: c.session.Contexts[i].Name}
	if slices.ContainsFunc(k.status, func(x ContextStatus) bool { return x.Context == s.Context }) {
		return protocolError("second block status of context %q", s.Context)
	}
	left := k.len
	for range count {
		if _, err := io.ReadFull(r, b[:size]); err != nil {
			return err
		}
		var length, flags uint64
		if width == 8 {
			length, flags = binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])
		} else {
			length, flags = uint64(binary.BigEndian.Uint32(b[:])), uint64(binary.BigEndian.Uint32(b[4:]))
		}
		if length == 0 || left == 0 {
			return protocolError("block status of context %q: extent of %d bytes with %d to describe", s.Context, length, left)
		}
		// The last extent may reach beyond the request.
		e := StatusExtent{int64(min(length, uint64(left))), flags}
		s.Extents = append(s.Extents, e)
		left -= e.Length
	}
	k.status = append(k.status, s)
	return nil
}

// A coverage is the set of bytes of a read that have been answered: disjoint,
// ordered, non-adjacent spans. Servers mostly answer in order, which is one.
type coverage struct {
	spans []span
	n     int64 // bytes in all
}

type span struct{ start, end int64 }

func (c *coverage) reset() { c.spans, c.n = c.spans[:0], 0 }

// add takes in n bytes at off, unless some are there already or the spans
// become too many.
func (c *coverage) add(off, n int64) bool {
	end := off + n
	// i is the first span that ends at off or after it.
	i, _ := slices.BinarySearchFunc(c.spans, off, func(s span, off int64) int {
		if s.end < off {
			return -1
		}
		return 1
	})
	touches := i < len(c.spans) && c.spans[i].end == off
	next := i
	if touches {
		next = i + 1
	}
	if next < len(c.spans) && c.spans[next].start < end {
		return false
	}
	joins := next < len(c.spans) && c.spans[next].start == end
	switch {
	case touches && joins:
		c.spans[i].end = c.spans[next].end
		c.spans = slices.Delete(c.spans, next, next+1)
	case touches:
		c.spans[i].end = end
	case joins:
		c.spans[next].start = off
	case len(c.spans) == maxGaps:
		return false
	default:
		c.spans = slices.Insert(c.spans, i, span{off, end})
	}
	c.n += n
	return true
}
