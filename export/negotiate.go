package export

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// Negotiation does no I/O on the connection. The session reads one option and
// asks what to answer and what comes next:
//
//	greeting -> options -> transmission
//	            |    \----> hangup
//	            upgrade -> options
//
// The session reads exactly the bytes of each option, so that nothing sent
// before an upgrade of the channel can take effect after it; the upgraded
// channel begins with a new negotiation.

// A step is what follows an option.
type step int

const (
	stay     step = iota // read the next option
	transmit             // n.agreed is set
	upgrade              // begin TLS, and the negotiation again
	hangup
)

// maxOption bounds the data of one option, in bytes. A longer one ends the
// connection: nothing sensible is so long, and skipping it costs us time.
const maxOption = 128 << 10

// maxOptions bounds how many options one connection may send.
const maxOptions = 1 << 10

// An option is a client's wish, with its data.
type option struct {
	id   nbd.Option
	data []byte
}

// An exporter is what a negotiation asks of the server.
type exporter interface {
	list() ([]Info, error)
	open(name string) (*Export, error) // balanced by release
	release(*Export)
	enter(*Export) bool // false: it has too many clients
}

// A negotiation is the state between the greeting and the agreement.
type negotiation struct {
	exporter   exporter
	tls        tlsState
	fixed      bool // the client knows fixed newstyle
	noZeroes   bool
	structured bool
	extended   bool

	// The export last asked about, held open since GO usually names it again.
	name string
	held *Export

	// What the last SET_META_CONTEXT chose.
	metaName string
	contexts []metaContext

	agreed *agreement
}

// An agreement is what transmission starts with. It never changes.
type agreement struct {
	name       string
	export     *Export
	size       int64
	flags      nbd.TransmissionFlags
	structured bool // or extended
	extended   bool
	contexts   []metaContext
}

// A metaContext is a MetaContext under the number that this connection uses.
type metaContext struct {
	id uint32
	MetaContext
}

// negotiate starts a negotiation with the client's handshake flags.
func negotiate(e exporter, flags uint32, tls tlsState) (*negotiation, error) {
	if flags&^(nbd.FlagFixedNewstyle|nbd.FlagNoZeroes) != 0 {
		return nil, fmt.Errorf("unknown client flags %#x", flags)
	}
	return &negotiation{
		exporter: e,
		tls:      tls,
		fixed:    flags&nbd.FlagFixedNewstyle != 0,
		noZeroes: flags&nbd.FlagNoZeroes != 0,
	}, nil
}

// handle answers one option.
func (n *negotiation) handle(o option) (answer []byte, next step) {
	r := &replies{option: o.id}
	if !n.fixed && o.id != nbd.OptExportName {
		return nil, hangup // such a client would not understand a reply
	}
	if n.tls == tlsAwaited && o.id != nbd.OptStartTLS && o.id != nbd.OptAbort {
		if o.id == nbd.OptExportName {
			return nil, hangup // it has no way to be refused
		}
		r.refuse(nbd.RepErrTLSReqd, "Option 0x%x not permitted before TLS", uint32(o.id))
		return r.out, stay
	}
	next = stay
	switch o.id {
	case nbd.OptExportName:
		return n.exportName(o.data)
	case nbd.OptAbort:
		r.ack()
		next = hangup
	case nbd.OptList:
		n.list(r, o.data)
	case nbd.OptStartTLS:
		next = n.startTLS(r, o.data)
	case nbd.OptInfo:
		n.info(r, o.data)
	case nbd.OptGo:
		if n.info(r, o.data) {
			next = transmit
		}
	case nbd.OptStructuredReply:
		n.structuredReply(r, o.data)
	case nbd.OptExtendedHeaders:
		n.extendedHeaders(r, o.data)
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		n.metaContext(r, o.data)
	default:
		r.refuse(nbd.RepErrUnsup, "Unsupported option %d (<unknown>)", uint32(o.id))
	}
	return r.out, next
}

// close releases what the negotiation holds and did not agree on.
func (n *negotiation) close() {
	if n.held != nil {
		n.exporter.release(n.held)
		n.held = nil
	}
}

// find returns the export of that name, held until another is asked for.
func (n *negotiation) find(name string) (*Export, error) {
	if n.held != nil && n.name == name {
		return n.held, nil
	}
	n.close()
	e, err := n.exporter.open(name)
	if err != nil {
		return nil, err
	}
	n.name, n.held = name, e
	return e, nil
}

var errTooManyClients = errors.New("too many clients")

// agree ends the negotiation with the export that is held.
func (n *negotiation) agree() error {
	if !n.exporter.enter(n.held) {
		return errTooManyClients
	}
	if n.metaName != n.name {
		n.contexts = nil // they were chosen for another export
	}
	n.agreed = &agreement{
		name:       n.name,
		export:     n.held,
		size:       n.held.size(),
		flags:      n.flags(n.held, len(n.contexts) > 0),
		structured: n.structured || n.extended,
		extended:   n.extended,
		contexts:   n.contexts,
	}
	n.held = nil
	return nil
}

// flags returns what e can do on this connection.
func (n *negotiation) flags(e *Export, contexts bool) nbd.TransmissionFlags {
	f := nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendCache
	if e.readOnly() {
		f |= nbd.FlagReadOnly
	} else {
		f |= nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagSendFastZero
	}
	if n.structured || n.extended {
		f |= nbd.FlagSendDF
	}
	if n.extended && contexts {
		f |= nbd.FlagBlockStatusPayload
	}
	if e.MultiConn {
		f |= nbd.FlagCanMultiConn
	}
	if e.Rotational {
		f |= nbd.FlagRotational
	}
	return f
}

// replies builds the answer to an option.
type replies struct {
	option nbd.Option
	out    []byte
}

func (r *replies) add(typ nbd.OptionReply, data []byte) {
	r.out = binary.BigEndian.AppendUint64(r.out, nbd.MagicOptionReply)
	r.out = binary.BigEndian.AppendUint32(r.out, uint32(r.option))
	r.out = binary.BigEndian.AppendUint32(r.out, uint32(typ))
	r.out = binary.BigEndian.AppendUint32(r.out, uint32(len(data)))
	r.out = append(r.out, data...)
}

func (r *replies) ack() { r.add(nbd.RepAck, nil) }

// refuse adds an error. What it quotes has been bounded by quote.
func (r *replies) refuse(typ nbd.OptionReply, format string, args ...any) {
	r.add(typ, fmt.Appendf(nil, format, args...))
}

// empty refuses an option that has data where there should be none.
func (r *replies) empty(data []byte) bool {
	if len(data) != 0 {
		r.refuse(nbd.RepErrInvalid, "option '%v' has unexpected length", r.option)
		return false
	}
	return true
}
