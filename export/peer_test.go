package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// patience bounds what would otherwise hang.
const patience = 5 * time.Minute

// hooked is a Device with methods replaced, for faults and stalls.
type hooked struct {
	image.Device
	tryReadAt     func(p []byte, off int64) error
	readAt        func(p []byte, off int64) (int, error)
	writeAt       func(p []byte, off int64, flags image.WriteFlags) error
	writeZeroes   func(off, n int64, flags image.WriteFlags) error
	flush         func() error
	appendExtents func(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error)
}

func (h *hooked) TryReadAt(p []byte, off int64) error {
	if h.tryReadAt != nil {
		return h.tryReadAt(p, off)
	}
	return h.Device.TryReadAt(p, off)
}

func (h *hooked) ReadAt(p []byte, off int64) (int, error) {
	if h.readAt != nil {
		return h.readAt(p, off)
	}
	return h.Device.ReadAt(p, off)
}

func (h *hooked) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	if h.writeAt != nil {
		return h.writeAt(p, off, flags)
	}
	return h.Device.WriteAt(p, off, flags)
}

func (h *hooked) WriteZeroes(off, n int64, flags image.WriteFlags) error {
	if h.writeZeroes != nil {
		return h.writeZeroes(off, n, flags)
	}
	return h.Device.WriteZeroes(off, n, flags)
}

func (h *hooked) Flush() error {
	if h.flush != nil {
		return h.flush()
	}
	return h.Device.Flush()
}

func (h *hooked) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	if h.appendExtents != nil {
		return h.appendExtents(dst, off, n, want)
	}
	return h.Device.AppendExtents(dst, off, n, want)
}

// never is a TryReadAt that always leaves the read to a worker.
func never([]byte, int64) error { return image.ErrWouldBlock }

// underWayAlways is a TryReadAt that says of all that it is under way.
func underWayAlways([]byte, int64) error { return image.ErrUnderWay }

// server starts a server for exports by name, on each kind of transport. At
// the end it is shut down, and nothing may be left of it.
type server struct {
	*Server
	t     *testing.T
	addr  map[string]net.Addr
	ended chan error
}

func serve(t *testing.T, exports map[string]*Export, set func(*Server)) *server {
	t.Helper()
	before := runtime.NumGoroutine()
	s := &server{t: t, addr: make(map[string]net.Addr), ended: make(chan error, 2)}
	s.Server = &Server{Open: func(_ context.Context, _ *Client, name string) (*Export, error) {
		if e := exports[name]; e != nil {
			return e, nil
		}
		return nil, fs.ErrNotExist
	}}
	if set != nil {
		set(s.Server)
	}
	for network, address := range map[string]string{"unix": filepath.Join(t.TempDir(), "s"), "tcp": "127.0.0.1:0"} {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		s.addr[network] = l.Addr()
		go func() { s.ended <- s.Serve(l) }()
	}
	t.Cleanup(func() {
		s.shutdown()
		for range 2 {
			if err := <-s.ended; err != ErrServerClosed {
				t.Errorf("Serve returned %v", err)
			}
		}
		if n := s.bufs.out; n != 0 {
			t.Errorf("%d buffers are held", n)
		}
		if n := s.memory.used; n != 0 {
			t.Errorf("%d bytes are counted", n)
		}
		if len(s.devices)+len(s.clients) != 0 {
			t.Errorf("%d devices and %d exports are in use", len(s.devices), len(s.clients))
		}
		settle(t, before)
	})
	return s
}

// settle waits until there are no more goroutines than before.
func settle(t *testing.T, before int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, were %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(time.Millisecond)
	}
}

func (s *server) shutdown() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.t.Errorf("Shutdown: %v", err)
	}
}

// A style is how a peer talks: the kinds of replies.
type style int

const (
	simple style = iota
	structured
	extended
)

func (s style) String() string { return [...]string{"simple", "structured", "extended"}[s] }

// A peer is a client that can misbehave.
type peer struct {
	t     *testing.T
	conn  net.Conn
	style style
	size  uint64
	flags nbd.TransmissionFlags
}

// connect agrees with the server on an export. network is "unix", "tcp" or
// "pipe", which has no descriptor.
func (s *server) connect(network, name string, style style, contexts ...string) *peer {
	s.t.Helper()
	p := s.dial(network)
	p.style = style
	p.greet()
	switch style {
	case structured:
		p.option(nbd.OptStructuredReply, nil)
	case extended:
		p.option(nbd.OptExtendedHeaders, nil)
	}
	if len(contexts) > 0 {
		p.option(nbd.OptSetMetaContext, optionData(s.t, nbd.OptSetMetaContext, append([]string{name}, contexts...)))
	}
	for _, info := range p.option(nbd.OptGo, optionData(s.t, nbd.OptGo, []string{name})) {
		if binary.BigEndian.Uint16(info) == nbd.InfoExport {
			p.size = binary.BigEndian.Uint64(info[2:])
			p.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(info[10:]))
		}
	}
	return p
}

func (s *server) dial(network string) *peer {
	s.t.Helper()
	p := &peer{t: s.t}
	if network == "pipe" {
		here, there := net.Pipe()
		go s.ServeConn(there)
		p.conn = here
	} else {
		var err error
		if p.conn, err = net.Dial(network, s.addr[network].String()); err != nil {
			s.t.Fatal(err)
		}
	}
	p.conn.SetDeadline(time.Now().Add(patience))
	s.t.Cleanup(func() { p.conn.Close() })
	return p
}

func (p *peer) greet() {
	p.t.Helper()
	p.read(18)
	p.write([]byte{0, 0, 0, 3})
}

// option sends an option and returns the data of its replies but the last,
// which has to be an acknowledgement.
func (p *peer) option(id nbd.Option, data []byte) (replies [][]byte) {
	p.t.Helper()
	b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	p.write(append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...))
	for {
		h := p.read(20)
		d := p.read(int(binary.BigEndian.Uint32(h[16:])))
		switch typ := nbd.OptionReply(binary.BigEndian.Uint32(h[12:])); {
		case typ == nbd.RepAck:
			return replies
		case typ.IsError():
			p.t.Fatalf("option %v: %v %s", id, replyNames[typ], d)
		}
		replies = append(replies, d)
	}
}

func (p *peer) read(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.conn, b); err != nil {
		p.t.Fatalf("reading from the server: %v", err)
	}
	return b
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.conn.Write(b); err != nil {
		p.t.Fatalf("writing to the server: %v", err)
	}
}

// header encodes the header of a request.
func (p *peer) header(cmd nbd.Command, flags nbd.CommandFlags, cookie, off, n uint64) []byte {
	if p.style == extended {
		if cmd == nbd.CmdWrite {
			flags |= nbd.CmdFlagPayloadLen
		}
		return encodeRequest(true, request{flags, cmd, cookie, off, n})
	}
	return encodeRequest(false, request{flags, cmd, cookie, off, n})
}

func encodeRequest(extended bool, r request) []byte {
	magic := uint32(nbd.MagicRequest)
	if extended {
		magic = nbd.MagicExtRequest
	}
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint16(b, uint16(r.flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.cmd))
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	if extended {
		return binary.BigEndian.AppendUint64(b, r.length)
	}
	return binary.BigEndian.AppendUint32(b, uint32(r.length))
}

// A chunk is a part of a reply.
type chunk struct {
	cookie  uint64
	done    bool
	typ     uint16 // of a structured reply
	errno   nbd.Errno
	text    string
	off     uint64
	n       int
	data    []byte
	context uint32
	runs    []Status
}

// chunk reads one. n is how long the data is in a simple reply that is no error.
func (p *peer) chunk(n int) chunk {
	p.t.Helper()
	return p.chunkOf(func(uint64) int { return n })
}

// chunkOf is chunk where that depends on the cookie.
func (p *peer) chunkOf(length func(cookie uint64) int) chunk {
	p.t.Helper()
	switch magic := binary.BigEndian.Uint32(p.read(4)); magic {
	case nbd.MagicSimpleReply:
		h := p.read(12)
		c := chunk{done: true, errno: nbd.Errno(binary.BigEndian.Uint32(h)), cookie: binary.BigEndian.Uint64(h[4:])}
		if p.style == extended {
			p.t.Fatal("a simple reply to a client with extended headers")
		}
		if c.errno == 0 {
			c.n = length(c.cookie)
			c.data = p.read(c.n)
		}
		return c
	case nbd.MagicStructuredReply, nbd.MagicExtReply:
		if (magic == nbd.MagicExtReply) != (p.style == extended) {
			p.t.Fatal("a reply in the wrong style")
		}
		h := p.read(12)
		c := chunk{
			done: binary.BigEndian.Uint16(h)&nbd.ReplyFlagDone != 0,
			typ:  binary.BigEndian.Uint16(h[2:]), cookie: binary.BigEndian.Uint64(h[4:]),
		}
		var size uint64
		if p.style == extended {
			size = binary.BigEndian.Uint64(p.read(16)[8:])
		} else {
			size = uint64(binary.BigEndian.Uint32(p.read(4)))
		}
		b := p.read(int(size))
		switch c.typ {
		case nbd.ReplyOffsetData:
			c.off, c.data, c.n = binary.BigEndian.Uint64(b), b[8:], len(b)-8
		case nbd.ReplyOffsetHole:
			c.off, c.n = binary.BigEndian.Uint64(b), int(binary.BigEndian.Uint32(b[8:]))
		case nbd.ReplyError, nbd.ReplyErrorOffset:
			size := binary.BigEndian.Uint16(b[4:])
			c.errno, c.text = nbd.Errno(binary.BigEndian.Uint32(b)), string(b[6:6+size])
			if c.typ == nbd.ReplyErrorOffset {
				c.off = binary.BigEndian.Uint64(b[6+size:])
			}
		case nbd.ReplyBlockStatus:
			c.context = binary.BigEndian.Uint32(b)
			for b = b[4:]; len(b) > 0; b = b[8:] {
				c.runs = append(c.runs, Status{int64(binary.BigEndian.Uint32(b)), uint64(binary.BigEndian.Uint32(b[4:]))})
			}
		case nbd.ReplyBlockStatusExt:
			c.context = binary.BigEndian.Uint32(b)
			if int(binary.BigEndian.Uint32(b[4:]))*16 != len(b)-8 {
				p.t.Fatal("wrong count of extents")
			}
			for b = b[8:]; len(b) > 0; b = b[16:] {
				c.runs = append(c.runs, Status{int64(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint64(b[8:])})
			}
		}
		return c
	default:
		p.t.Fatalf("bad reply magic %#x", magic)
		panic("unreachable")
	}
}

// An answer is a whole reply, its chunks also in words.
type answer struct {
	errno  nbd.Errno
	text   string
	data   []byte // of a read
	chunks []chunk
}

func (a answer) String() string {
	var words []string
	for _, c := range a.chunks {
		switch {
		case c.errno != 0 && c.typ == nbd.ReplyErrorOffset:
			words = append(words, fmt.Sprintf("error %d at %d", c.errno, c.off))
		case c.errno != 0:
			words = append(words, fmt.Sprintf("error %d", c.errno))
		case c.typ == nbd.ReplyOffsetHole:
			words = append(words, fmt.Sprintf("hole %d+%d", c.off, c.n))
		case c.typ == nbd.ReplyOffsetData:
			words = append(words, fmt.Sprintf("data %d+%d", c.off, c.n))
		case c.runs != nil:
			words = append(words, fmt.Sprintf("status %d %v", c.context, c.runs))
		case c.typ == nbd.ReplyNone && c.data == nil:
			words = append(words, "none")
		default:
			words = append(words, "ok")
		}
	}
	return strings.Join(words, ", ")
}

// answer reads the reply to the one read in progress, of n bytes at off, or to
// another request with n 0.
func (p *peer) answer(off uint64, n int) answer {
	p.t.Helper()
	var a answer
	a.data = make([]byte, n)
	covered := 0
	for {
		c := p.chunk(n)
		a.chunks = append(a.chunks, c)
		switch {
		case c.errno != 0:
			a.errno, a.text = c.errno, c.text
		case c.typ == nbd.ReplyOffsetData:
			copy(a.data[c.off-off:], c.data)
			covered += c.n
		case c.typ == nbd.ReplyOffsetHole:
			covered += c.n
		default:
			covered += copy(a.data, c.data)
		}
		if c.done {
			break
		}
	}
	if a.errno == 0 && covered != n {
		p.t.Fatalf("%d bytes of %d came: %v", covered, n, a)
	}
	return a
}

// call does one request.
func (p *peer) call(cmd nbd.Command, flags nbd.CommandFlags, off, n uint64, payload []byte) answer {
	p.t.Helper()
	p.write(append(p.header(cmd, flags, 42, off, n), payload...))
	if cmd == nbd.CmdRead {
		return p.answer(off, int(n))
	}
	return p.answer(0, 0)
}

// ok is call for what has to succeed.
func (p *peer) ok(cmd nbd.Command, flags nbd.CommandFlags, off, n uint64, payload []byte) []byte {
	p.t.Helper()
	a := p.call(cmd, flags, off, n, payload)
	if a.errno != 0 {
		p.t.Fatalf("%v: error %d %s", cmd, a.errno, a.text)
	}
	return a.data
}

// gone reports whether the server has closed the connection.
func (p *peer) gone() bool {
	p.conn.SetDeadline(time.Now().Add(patience))
	_, err := p.conn.Read(make([]byte, 1))
	return err != nil && !strings.Contains(err.Error(), "timeout")
}

// pattern returns n bytes that depend on where they are.
func pattern(off uint64, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		x := (off + uint64(i)) * 0x9e3779b97f4a7c15
		b[i] = byte(x>>56) | 1
	}
	return b
}

// each runs a test for every style on every transport.
func each(t *testing.T, test func(t *testing.T, network string, style style)) {
	for _, network := range []string{"unix", "tcp", "pipe"} {
		for _, style := range []style{simple, structured, extended} {
			t.Run(network+"/"+style.String(), func(t *testing.T) { test(t, network, style) })
		}
	}
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		t.Fatalf("%s: %d bytes, want %d, differ at %d", what, len(got), len(want), at)
	}
}
