package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"time"
)

// A Protocol is the form of requests and replies after the handshake.
type Protocol uint8

const (
	// Extended headers carry 64-bit lengths. Every reply is made of chunks.
	Extended Protocol = iota
	// Structured replies are made of chunks: data, holes, status, errors.
	Structured
	// Simple replies are one header, followed by all the data of a read.
	Simple
)

func (p Protocol) String() string {
	switch p {
	case Extended:
		return "extended"
	case Structured:
		return "structured"
	case Simple:
		return "simple"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// BlockSize holds an export's constraints in bytes: offsets and lengths are
// multiples of Min, best of Preferred; the data of one read or write is at
// most Max, which is 0xffffffff where the server sets no limit.
type BlockSize struct{ Min, Preferred, Max uint32 }

// defaultBlockSize holds where a server says nothing.
var defaultBlockSize = BlockSize{Min: 1, Preferred: 4096, Max: MaxPayload}

// ExportInfo describes an export as its server does.
type ExportInfo struct {
	Name        string
	Description string
	Size        int64 // bytes
	Flags       TransmissionFlags
	BlockSize   BlockSize
}

// A Context is a metadata context that the handshake selected.
type Context struct {
	Name string
	ID   uint32
}

// Options say what a client asks a server for.
type Options struct {
	Export   string   // name of the export, "" is the default one
	Contexts []string // metadata contexts wanted; what the server lacks is left out
	Protocol Protocol // the newest form to ask for; the zero value is the newest there is
	NoGo     bool     // ask by EXPORT_NAME, for servers that lose their way at GO

	// InFlight bounds the requests of a Client that await their replies at
	// once; further ones wait. 0 means 64.
	InFlight int
	// Timeout bounds a Client's wait for one reply: when it has passed, the
	// connection is given up. 0 means no bound.
	Timeout time.Duration
}

// A Session is what a handshake agreed on.
type Session struct {
	ExportInfo
	Protocol Protocol
	Contexts []Context
}

// Bounds on what a server may send during the handshake.
const (
	maxOptionReply = 32 << 10 // bytes in one reply: two strings and some
	maxExports     = 10000    // of a list
	maxContexts    = 1000     // of one export
	maxInfos       = 100      // information replies to one option
	maxReplies     = 16 << 20 // bytes of all replies: the bounds above multiply
)

// Handshake negotiates with the server at the other end of conn until requests
// can be sent. It reads not a byte beyond the handshake. When ctx ends first,
// or on an error, conn is of no further use; closing it is the caller's.
func Handshake(ctx context.Context, conn net.Conn, opt Options) (*Session, error) {
	for _, name := range append([]string{opt.Export}, opt.Contexts...) {
		if len(name) > MaxString {
			return nil, fmt.Errorf("name of %d bytes: longer than %d", len(name), MaxString)
		}
	}
	var s *Session
	err := bounded(ctx, conn, func() (err error) {
		s, err = negotiate(conn, opt)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// bounded runs f, which uses conn, and makes conn fail when ctx ends.
func bounded(ctx context.Context, conn net.Conn, f func() error) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() {
		return fmt.Errorf("handshake: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	return nil
}

// A handshake is the client's side of the option phase.
type handshake struct {
	conn     io.ReadWriter
	noZeroes bool
	fixed    bool // fixed newstyle: options other than EXPORT_NAME are answered
	protocol Protocol
	sized    bool // the last export described came with its block sizes
	received int  // bytes of replies
}

func negotiate(conn io.ReadWriter, opt Options) (*Session, error) {
	h := &handshake{conn: conn, protocol: Simple}
	old, err := h.greet()
	if err != nil {
		return nil, err
	}
	if old != nil {
		if opt.Export != "" {
			return nil, fmt.Errorf("the server speaks the oldstyle protocol, which has no export names")
		}
		return &Session{ExportInfo: *old, Protocol: Simple}, nil
	}
	if !h.fixed {
		return h.exportName(opt.Export)
	}
	if err := h.chooseProtocol(opt.Protocol); err != nil {
		return nil, err
	}
	var contexts []Context
	if len(opt.Contexts) > 0 && h.protocol != Simple {
		contexts, err = h.metaContexts(OptSetMetaContext, opt.Export, opt.Contexts)
		if err != nil && !refused(err, RepErrUnsup) {
			return nil, h.abort(err)
		}
	}
	if opt.NoGo && h.protocol != Extended {
		return h.exportName(opt.Export)
	}
	info, err := h.info(OptGo, opt.Export)
	if refused(err, RepErrUnsup) && h.protocol != Extended {
		// A server that answers no GO knows no contexts either.
		return h.exportName(opt.Export)
	}
	if err != nil {
		return nil, h.abort(err)
	}
	return &Session{ExportInfo: *info, Protocol: h.protocol, Contexts: contexts}, nil
}

// greet exchanges the first flags. An oldstyle server describes its only
// export at once and leaves nothing to negotiate.
func (h *handshake) greet() (*ExportInfo, error) {
	if c, ok := h.conn.(*tlsConn); ok {
		h.fixed, h.noZeroes = true, c.noZeroes
		return nil, nil
	}
	var b [18]byte
	if err := h.read(b[:16]); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != Magic {
		return nil, errors.New("greeting: not an NBD server")
	}
	switch binary.BigEndian.Uint64(b[8:]) {
	case MagicOption:
	case MagicOldstyle:
		return h.oldstyle()
	default:
		return nil, protocolError("magic %#x in the greeting", b[8:16])
	}
	if err := h.read(b[16:18]); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	server := binary.BigEndian.Uint16(b[16:])
	h.fixed = server&FlagFixedNewstyle != 0
	h.noZeroes = server&FlagNoZeroes != 0
	var client [4]byte
	binary.BigEndian.PutUint32(client[:], uint32(server&(FlagFixedNewstyle|FlagNoZeroes)))
	_, err := h.conn.Write(client[:])
	return nil, err
}

func (h *handshake) oldstyle() (*ExportInfo, error) {
	var b [8 + 4 + 124]byte
	if err := h.read(b[:]); err != nil {
		return nil, fmt.Errorf("oldstyle greeting: %w", err)
	}
	info := &ExportInfo{BlockSize: defaultBlockSize}
	info.Flags = TransmissionFlags(binary.BigEndian.Uint16(b[10:]))
	return info, info.setSize(binary.BigEndian.Uint64(b[:]))
}

// chooseProtocol asks for the newest form of replies, and no newer than that.
func (h *handshake) chooseProtocol(newest Protocol) error {
	for _, p := range []struct {
		protocol Protocol
		option   Option
	}{{Extended, OptExtendedHeaders}, {Structured, OptStructuredReply}} {
		if p.protocol < newest {
			continue
		}
		switch err := h.simpleOption(p.option); {
		case err == nil:
			h.protocol = p.protocol
			return nil
		case !isOptionError(err) || refused(err, RepErrTLSReqd):
			return err
		}
	}
	return nil
}

// simpleOption sends an option without data, whose answer is ACK or an error.
func (h *handshake) simpleOption(opt Option) error {
	if err := h.send(opt, nil); err != nil {
		return err
	}
	rep, _, err := h.reply(opt)
	if err == nil && rep != RepAck {
		err = protocolError("reply %#x to option %s", uint32(rep), opt)
	}
	return err
}

// exportName enters transmission the old way, which has no error replies.
func (h *handshake) exportName(name string) (*Session, error) {
	if err := h.send(OptExportName, []byte(name)); err != nil {
		return nil, err
	}
	b := make([]byte, 10, 134)
	if !h.noZeroes {
		b = b[:134]
	}
	if err := h.read(b); err != nil {
		return nil, fmt.Errorf("option %s: the server closed the connection, which may mean that there is no such export: %w", OptExportName, err)
	}
	info := ExportInfo{Name: name, BlockSize: defaultBlockSize}
	info.Flags = TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	if err := info.setSize(binary.BigEndian.Uint64(b)); err != nil {
		return nil, err
	}
	return &Session{ExportInfo: info, Protocol: h.protocol}, nil
}

// info sends INFO or GO and gathers what the server tells.
func (h *handshake) info(opt Option, name string) (*ExportInfo, error) {
	data := appendString(nil, name)
	data = append(data, 0, 2, 0, InfoDescription, 0, InfoBlockSize)
	if err := h.send(opt, data); err != nil {
		return nil, err
	}
	info := &ExportInfo{Name: name, BlockSize: defaultBlockSize}
	described := false
	h.sized = false
	for range maxInfos {
		rep, b, err := h.reply(opt)
		if err != nil {
			return nil, err
		}
		switch rep {
		case RepAck:
			if !described {
				return nil, protocolError("option %s: no export information", opt)
			}
			return info, nil
		case RepInfo:
			export, err := info.parse(b)
			if err != nil {
				return nil, err
			}
			described = described || export
			h.sized = h.sized || binary.BigEndian.Uint16(b) == InfoBlockSize
		default:
			return nil, protocolError("reply %#x to option %s", uint32(rep), opt)
		}
	}
	return nil, protocolError("option %s: more than %d replies", opt, maxInfos)
}

// parse takes one information reply and reports whether it is InfoExport.
func (e *ExportInfo) parse(b []byte) (export bool, err error) {
	if len(b) < 2 {
		return false, protocolError("information of %d bytes", len(b))
	}
	kind, b := binary.BigEndian.Uint16(b), b[2:]
	switch kind {
	case InfoExport:
		if len(b) != 10 {
			return false, protocolError("export information of %d bytes", len(b))
		}
		e.Flags = TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
		return true, e.setSize(binary.BigEndian.Uint64(b))
	case InfoDescription:
		if len(b) > MaxString {
			return false, protocolError("description of %d bytes", len(b))
		}
		e.Description = string(b)
	case InfoBlockSize:
		if len(b) != 12 {
			return false, protocolError("block size information of %d bytes", len(b))
		}
		s := BlockSize{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])}
		if !powerOf2(s.Min) || s.Min > 64<<10 || !powerOf2(s.Preferred) || s.Preferred < s.Min || s.Max < s.Min {
			return false, protocolError("block sizes %d, %d, %d", s.Min, s.Preferred, s.Max)
		}
		e.BlockSize = s
	}
	return false, nil // InfoName repeats what was asked for; others may be skipped
}

func powerOf2(n uint32) bool { return n != 0 && n&(n-1) == 0 }

func (e *ExportInfo) setSize(size uint64) error {
	if size > math.MaxInt64 {
		return protocolError("size %d is above %d", size, int64(math.MaxInt64))
	}
	e.Size = int64(size)
	return nil
}

// metaContexts selects or lists the contexts that answer the queries; no
// query lists them all.
func (h *handshake) metaContexts(opt Option, export string, queries []string) ([]Context, error) {
	data := appendString(nil, export)
	data = binary.BigEndian.AppendUint32(data, uint32(len(queries)))
	for _, q := range queries {
		data = appendString(data, q)
	}
	if err := h.send(opt, data); err != nil {
		return nil, err
	}
	var contexts []Context
	for {
		rep, b, err := h.reply(opt)
		if err != nil {
			return nil, err
		}
		if rep == RepAck {
			return contexts, nil
		}
		if rep != RepMetaContext || len(b) < 4 || len(b) > 4+MaxString || len(contexts) == maxContexts {
			return nil, protocolError("option %s: reply %d of %d bytes after %d contexts", opt, uint32(rep), len(b), len(contexts))
		}
		c := Context{Name: string(b[4:]), ID: binary.BigEndian.Uint32(b)}
		if opt == OptSetMetaContext { // otherwise ids mean nothing
			if slices.Contains(contexts, c) {
				continue
			}
			if err := c.selectable(queries, contexts); err != nil {
				return nil, err
			}
		}
		contexts = append(contexts, c)
	}
}

// selectable returns what is wrong about selecting c besides others.
func (c Context) selectable(queries []string, others []Context) error {
	if !slices.Contains(queries, c.Name) {
		return protocolError("context %q, which nobody asked for", c.Name)
	}
	for _, o := range others {
		switch {
		case o.ID == c.ID:
			return protocolError("contexts %q and %q have one id", o.Name, c.Name)
		case o.Name == c.Name:
			return protocolError("context %q has two ids", c.Name)
		}
	}
	return nil
}

// abort says goodbye after a refusal. Not every server answers, so nobody
// waits.
func (h *handshake) abort(cause error) error {
	if isOptionError(cause) {
		h.send(OptAbort, nil)
	}
	return cause
}

func (h *handshake) send(opt Option, data []byte) error {
	b := make([]byte, 0, 16+len(data))
	b = binary.BigEndian.AppendUint64(b, MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := h.conn.Write(append(b, data...)); err != nil {
		return fmt.Errorf("option %s: %w", opt, h.lastWord(err))
	}
	return nil
}

// lastWord is why the server has left, if it has said so in TLS, or else err. A
// client whose certificate is refused has gone on by then, and is told by who
// reads, not by who writes.
func (h *handshake) lastWord(err error) error {
	_, e := h.conn.Read(make([]byte, 1))
	if said, ok := errors.AsType[*net.OpError](e); ok && said.Op == "remote error" {
		return said
	}
	return err
}

// reply reads one reply to opt; a refusal is an *OptionError.
func (h *handshake) reply(opt Option) (OptionReply, []byte, error) {
	var b [20]byte
	if err := h.read(b[:]); err != nil {
		return 0, nil, fmt.Errorf("option %s: %w", opt, err)
	}
	magic := binary.BigEndian.Uint64(b[:])
	about := Option(binary.BigEndian.Uint32(b[8:]))
	rep := OptionReply(binary.BigEndian.Uint32(b[12:]))
	length := binary.BigEndian.Uint32(b[16:])
	switch {
	case magic != MagicOptionReply:
		return 0, nil, protocolError("option %s: reply magic %#x", opt, magic)
	case about != opt:
		return 0, nil, protocolError("option %s: reply to option %s", opt, about)
	case length > maxOptionReply:
		return 0, nil, protocolError("option %s: reply of %d bytes", opt, length)
	}
	if h.received += len(b) + int(length); h.received > maxReplies {
		return 0, nil, protocolError("option %s: replies of more than %d bytes", opt, maxReplies)
	}
	data := make([]byte, length)
	if err := h.read(data); err != nil {
		return 0, nil, fmt.Errorf("option %s: %w", opt, err)
	}
	if rep.IsError() {
		return rep, nil, &OptionError{opt, rep, string(data[:min(len(data), MaxString)])}
	}
	if rep == RepAck && length != 0 {
		return 0, nil, protocolError("option %s: ack with %d bytes", opt, length)
	}
	return rep, data, nil
}

// read fills b; the end of the stream is never a good end here.
func (h *handshake) read(b []byte) error {
	_, err := io.ReadFull(h.conn, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

func isOptionError(err error) bool {
	var e *OptionError
	return errors.As(err, &e)
}

func refused(err error, with OptionReply) bool {
	var e *OptionError
	return errors.As(err, &e) && e.Reply == with
}
