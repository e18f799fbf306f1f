package export

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math/bits"
	"strings"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// exportName handles the oldest option, which has no way to refuse but to
// close the connection.
func (n *negotiation) exportName(data []byte) ([]byte, step) {
	name := string(data)
	if n.extended || len(name) > nbd.MaxString || strings.ContainsRune(name, 0) {
		return nil, hangup
	}
	if _, err := n.find(name); err != nil {
		return nil, hangup
	}
	if err := n.agree(); err != nil {
		return nil, hangup
	}
	out := binary.BigEndian.AppendUint64(nil, uint64(n.agreed.size))
	out = binary.BigEndian.AppendUint16(out, uint16(n.agreed.flags))
	if !n.noZeroes {
		out = append(out, make([]byte, 124)...)
	}
	return out, transmit
}

func (n *negotiation) list(r *replies, data []byte) {
	if !r.empty(data) {
		return
	}
	infos, err := n.exporter.list()
	if err != nil {
		r.refuse(nbd.RepErrPolicy, "Listing is not permitted")
		return
	}
	for _, i := range infos {
		d := binary.BigEndian.AppendUint32(nil, uint32(len(i.Name)))
		d = append(d, i.Name...)
		r.add(nbd.RepServer, append(d, i.Description...))
	}
	r.ack()
}

func (n *negotiation) structuredReply(r *replies, data []byte) {
	switch {
	case !r.empty(data):
	case n.extended:
		r.refuse(nbd.RepErrExtHeaderReqd, "extended headers already negotiated")
	case n.structured:
		r.refuse(nbd.RepErrInvalid, "structured reply already negotiated")
	default:
		n.structured = true
		r.ack()
	}
}

func (n *negotiation) extendedHeaders(r *replies, data []byte) {
	switch {
	case !r.empty(data):
	case n.extended:
		r.refuse(nbd.RepErrInvalid, "extended headers already negotiated")
	default:
		n.extended = true
		r.ack()
	}
}

// info answers INFO and GO, and reports whether it ended in the agreement
// that GO asks for.
func (n *negotiation) info(r *replies, data []byte) (agreed bool) {
	p := parser{data}
	name, ok := p.name(r)
	if !ok {
		return false
	}
	count, ok := p.uint16(r)
	if !ok {
		return false
	}
	var wantName, wantBlockSize bool
	for range count {
		switch t, ok := p.uint16(r); {
		case !ok:
			return false
		case t == nbd.InfoName:
			wantName = true
		case t == nbd.InfoBlockSize:
			wantBlockSize = true
		}
	}
	if !r.atEnd(p.rest) {
		return false
	}
	e, err := n.find(name)
	if err != nil {
		r.notFound(name, err)
		return false
	}

	isGo := r.option == nbd.OptGo
	flags := n.flags(e, true)
	if isGo {
		if err := n.agree(); err != nil {
			r.refuse(nbd.RepErrPolicy, "export '%s' has too many clients", quote(name))
			return false
		}
		flags = n.agreed.flags
	}
	if wantName {
		r.info(nbd.InfoName, []byte(e.Name))
	}
	if e.Description != "" {
		r.info(nbd.InfoDescription, []byte(e.Description))
	}
	r.info(nbd.InfoBlockSize, blockSizes(e, wantBlockSize || !isGo))
	d := binary.BigEndian.AppendUint64(nil, uint64(e.size()))
	r.info(nbd.InfoExport, binary.BigEndian.AppendUint16(d, uint16(flags)))
	r.ack()
	return isGo
}

// blockSizes encodes minimum, preferred size and largest payload. A client
// that did not ask is told that it may send anything, which is true: the
// sizes of a Device are advice.
func blockSizes(e *Export, asked bool) []byte {
	b := e.Device.Info().BlockSize
	minimum := b.Min
	if !asked || minimum < 1 || minimum > 64<<10 || bits.OnesCount(uint(minimum)) != 1 ||
		e.Offset%int64(minimum) != 0 || e.size()%int64(minimum) != 0 {
		minimum = 1
	}
	preferred := max(4096, minimum)
	if b.Preferred > preferred && b.Preferred <= nbd.MaxPayload && bits.OnesCount(uint(b.Preferred)) == 1 {
		preferred = b.Preferred
	}
	out := binary.BigEndian.AppendUint32(nil, uint32(minimum))
	out = binary.BigEndian.AppendUint32(out, uint32(preferred))
	return binary.BigEndian.AppendUint32(out, nbd.MaxPayload)
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (n *negotiation) metaContext(r *replies, data []byte) {
	set := r.option == nbd.OptSetMetaContext
	if set {
		n.metaName, n.contexts = "", nil // whatever comes of it
		if !n.structured && !n.extended {
			r.refuse(nbd.RepErrInvalid, "request option '%v' when structured reply is not negotiated", r.option)
			return
		}
	}
	p := parser{data}
	name, ok := p.name(r)
	if !ok {
		return
	}
	count, ok := p.uint32(r)
	if !ok {
		return
	}
	var queries []string
	for range count {
		size, ok := p.uint32(r)
		if !ok {
			return
		}
		q, ok := p.bytes(r, size)
		if !ok {
			return
		}
		if size <= nbd.MaxString { // no context has a longer name
			queries = append(queries, string(q))
		}
	}
	if !r.atEnd(p.rest) {
		return
	}
	e, err := n.find(name)
	if err != nil {
		r.notFound(name, err)
		return
	}
	chosen := chooseContexts(e, queries, count == 0, set)
	for _, c := range chosen {
		var id uint32 // 0 in a list, as the specification has it
		if set {
			id = c.id
		}
		r.add(nbd.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), c.Name()...))
	}
	if set {
		n.metaName, n.contexts = name, chosen
	}
	r.ack()
}

// chooseContexts returns the contexts of e that the queries ask for, each
// once. In a list no query at all stands for everything, and a query that
// ends in a colon for all that begins with it.
func chooseContexts(e *Export, queries []string, none, set bool) []metaContext {
	var chosen []metaContext
	for _, c := range e.contexts() {
		match := none && !set
		for _, q := range queries {
			match = match || q == c.Name() || !set && strings.HasSuffix(q, ":") && strings.HasPrefix(c.Name(), q)
		}
		if match {
			chosen = append(chosen, c)
		}
	}
	return chosen
}

// A parser takes the fields of an option's data one by one.
type parser struct{ rest []byte }

// bytes takes n bytes, or refuses the option.
func (p *parser) bytes(r *replies, n uint32) ([]byte, bool) {
	if uint64(n) > uint64(len(p.rest)) {
		r.refuse(nbd.RepErrInvalid, "Inconsistent lengths in option %v", r.option)
		return nil, false
	}
	b := p.rest[:n]
	p.rest = p.rest[n:]
	return b, true
}

func (p *parser) uint16(r *replies) (uint16, bool) {
	b, ok := p.bytes(r, 2)
	if !ok {
		return 0, false
	}
	return binary.BigEndian.Uint16(b), true
}

func (p *parser) uint32(r *replies) (uint32, bool) {
	b, ok := p.bytes(r, 4)
	if !ok {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// name takes the name of an export.
func (p *parser) name(r *replies) (string, bool) {
	n, ok := p.uint32(r)
	if !ok {
		return "", false
	}
	if n > nbd.MaxString {
		r.refuse(nbd.RepErrInvalid, "Invalid name length: %d", n)
		return "", false
	}
	b, ok := p.bytes(r, n)
	if !ok {
		return "", false
	}
	if strings.ContainsRune(string(b), 0) {
		r.refuse(nbd.RepErrInvalid, "Unexpected embedded NUL in option %v", r.option)
		return "", false
	}
	return string(b), true
}

// atEnd refuses an option with more data than it should have.
func (r *replies) atEnd(rest []byte) bool { return r.empty(rest) }

func (r *replies) info(typ uint16, data []byte) {
	r.add(nbd.RepInfo, append(binary.BigEndian.AppendUint16(nil, typ), data...))
}

// notFound says why an export cannot be had, in no more words than a stranger
// should hear.
func (r *replies) notFound(name string, err error) {
	if errors.Is(err, fs.ErrPermission) {
		r.refuse(nbd.RepErrPolicy, "export '%s' not permitted", quote(name))
		return
	}
	r.refuse(nbd.RepErrUnknown, "export '%s' not present", quote(name))
}

// quote bounds a name that a client sent and is told again.
func quote(name string) string {
	if len(name) > 80 {
		name = name[:80] + "..."
	}
	return strings.ToValidUTF8(name, "?")
}
