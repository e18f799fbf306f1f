package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"sync"
	"time"
)

// A Client sends requests over one connection.
//
// All methods may be called concurrently; the requests of concurrent calls are
// in flight together and complete in the order that the server chooses. A
// server is not trusted: whatever it sends, memory stays bounded by what was
// asked for, and a breach of the protocol ends the connection.
//
// A refusal is an [*Error]. Requests that are unanswered when the connection
// is lost, and later ones, fail with an error that wraps [ErrConnection].
// What the export does not offer is errors.ErrUnsupported, and nothing is sent.
type Client struct {
	session Session
	conn    net.Conn
	timeout time.Duration
	limit   int64      // bytes of data in one request
	free    chan *call // idle calls: their number bounds the requests in flight
	done    chan struct{}
	active  sync.WaitGroup // methods that run; added to under mu, while not closing

	send   sync.Mutex // held while a request is written, so that it stays whole
	header [ExtRequestSize]byte

	mu      sync.Mutex // under send where both are held
	calls   []*call    // by slot; calls[i].active says whether it awaits a reply
	err     error      // why the connection ended, nil while it lives
	closing bool
}

// A call is a request and what has come in of its reply. Between begin and
// finish it belongs to the goroutine that reads replies.
type call struct {
	slot   int
	serial uint64
	active bool // guarded by Client.mu
	start  time.Time

	command     Command
	offset, len int64
	data        []byte // of a read: where it goes
	got         coverage
	status      []ContextStatus
	err         error // the first that the server told
	errors      int
	done        chan error // gets one value: the outcome
}

const defaultInFlight = 64

// NewClient takes over a connection whose handshake gave session, and closes
// it in the end. InFlight and Timeout of opt apply.
func NewClient(conn net.Conn, session *Session, opt Options) *Client {
	n := opt.InFlight
	if n <= 0 {
		n = defaultInFlight
	}
	n = min(n, 1<<slotBits)
	c := &Client{session: *session, conn: conn, timeout: opt.Timeout, free: make(chan *call, n), done: make(chan struct{})}
	if c.session.BlockSize == (BlockSize{}) {
		c.session.BlockSize = defaultBlockSize
	}
	size := c.session.BlockSize
	c.limit = max(min(int64(size.Max), MaxPayload)/int64(size.Min), 1) * int64(size.Min)
	for i := range n {
		k := &call{slot: i, done: make(chan error, 1)}
		c.calls = append(c.calls, k)
		c.free <- k
	}
	go c.receive(bufio.NewReaderSize(conn, 64<<10))
	if c.timeout > 0 {
		go c.watch()
	}
	return c
}

// Connect performs the handshake over conn and returns a Client, which owns
// conn. On an error conn is closed.
func Connect(ctx context.Context, conn net.Conn, opt Options) (*Client, error) {
	s, err := Handshake(ctx, conn, opt)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return NewClient(conn, s, opt), nil
}

// Session returns what the handshake agreed on.
func (c *Client) Session() Session { return c.session }

// Read fills p from offset off. CmdFlagDF asks for one piece of data where the
// server offers it. More than the server takes at once is read piece by piece.
// After an error p is undefined.
func (c *Client) Read(p []byte, off int64, flags CommandFlags) error {
	return c.run(request{command: CmdRead, flags: flags, offset: off, length: int64(len(p)), data: p}, c.limit)
}

// Write writes p at offset off; with CmdFlagFUA it is durable on return. More
// than the server takes at once is written piece by piece.
func (c *Client) Write(p []byte, off int64, flags CommandFlags) error {
	return c.run(request{command: CmdWrite, flags: flags, offset: off, length: int64(len(p)), data: p}, c.limit)
}

// Flush makes durable all writes that returned before the call.
func (c *Client) Flush() error {
	return c.run(request{command: CmdFlush}, maxRange)
}

// Trim says that the range is not needed.
func (c *Client) Trim(off, n int64, flags CommandFlags) error {
	return c.run(request{command: CmdTrim, flags: flags, offset: off, length: n}, maxRange)
}

// WriteZeroes makes the range read as zeros. Flags are CmdFlagFUA,
// CmdFlagNoHole and CmdFlagFastZero; where the last fails midway, a part of a
// range beyond 1 GiB may have been zeroed.
func (c *Client) WriteZeroes(off, n int64, flags CommandFlags) error {
	return c.run(request{command: CmdWriteZeroes, flags: flags, offset: off, length: n}, maxRange)
}

// Cache tells the server that the range will soon be read.
func (c *Client) Cache(off, n int64) error {
	return c.run(request{command: CmdCache, offset: off, length: n}, c.limit)
}

// maxRange is the most that one request without data covers, in bytes: well
// within 32 bits and a multiple of any block size.
const maxRange = 1 << 30

// A StatusExtent is a run of bytes with one status in a metadata context.
type StatusExtent struct {
	Length int64
	Flags  uint64
}

// A ContextStatus is the status in one context, from the offset asked for on.
type ContextStatus struct {
	Context string
	Extents []StatusExtent
}

// BlockStatus asks for the status of a range in all contexts of the session.
// Each answer covers a prefix of the range, of at least one byte and never
// beyond its end; with CmdFlagReqOne it is one extent.
func (c *Client) BlockStatus(off, n int64, flags CommandFlags) ([]ContextStatus, error) {
	r := request{command: CmdBlockStatus, flags: flags, offset: off, length: n, status: new([]ContextStatus)}
	if err := c.enter(r); err != nil {
		return nil, err
	}
	defer c.active.Done()
	if c.session.Protocol != Extended {
		r.length = min(n, math.MaxUint32&^(64<<10-1))
	}
	err := c.do(r)
	return *r.status, err
}

// What has to be offered for a command or a flag.
var (
	commandNeeds = map[Command]TransmissionFlags{
		CmdFlush: FlagSendFlush, CmdTrim: FlagSendTrim, CmdCache: FlagSendCache, CmdWriteZeroes: FlagSendWriteZeroes,
	}
	flagNeeds = map[CommandFlags]TransmissionFlags{
		CmdFlagFUA: FlagSendFUA, CmdFlagDF: FlagSendDF, CmdFlagFastZero: FlagSendFastZero,
	}
)

// check refuses what must not be sent to this server.
func (c *Client) check(r request) error {
	offered, size := c.session.Flags, c.session.Size
	if r.offset < 0 || r.length < 0 || r.offset > size || r.length > size-r.offset {
		return fmt.Errorf("outside the export of %d bytes: %w", size, EINVAL)
	}
	if m := int64(c.session.BlockSize.Min); m > 1 && (r.offset%m != 0 || r.length%m != 0) {
		return fmt.Errorf("not a multiple of the block size %d: %w", m, EINVAL)
	}
	switch r.command {
	case CmdWrite, CmdTrim, CmdWriteZeroes:
		if offered&FlagReadOnly != 0 {
			return EPERM
		}
	case CmdBlockStatus:
		if len(c.session.Contexts) == 0 {
			return errors.ErrUnsupported
		}
		if r.length == 0 {
			return EINVAL
		}
	}
	if need := commandNeeds[r.command]; offered&need != need {
		return errors.ErrUnsupported
	}
	for flag, need := range flagNeeds {
		if r.flags&flag != 0 && offered&need == 0 {
			return errors.ErrUnsupported
		}
	}
	return nil
}

type request struct {
	command        Command
	flags          CommandFlags
	offset, length int64
	data           []byte // to be written, or to be filled
	status         *[]ContextStatus
}

// enter lets a method begin, or says why not. Close waits for its active.Done.
func (c *Client) enter(r request) error {
	if err := c.check(r); err != nil {
		return fmt.Errorf("%s of %d bytes at %d: %w", r.command, r.length, r.offset, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return fs.ErrClosed
	}
	c.active.Add(1)
	return nil
}

// run sends r in pieces of at most so many bytes, one after the other.
func (c *Client) run(r request, most int64) error {
	if err := c.enter(r); err != nil {
		return err
	}
	defer c.active.Done()
	if r.command == CmdFlush {
		return c.do(r)
	}
	for r.length > 0 {
		piece := r
		piece.length = min(r.length, most)
		if r.data != nil {
			piece.data, r.data = r.data[:piece.length], r.data[piece.length:]
		}
		if err := c.do(piece); err != nil {
			return err
		}
		r.offset, r.length = r.offset+piece.length, r.length-piece.length
	}
	return nil
}

// do sends one request and waits for its outcome.
func (c *Client) do(r request) error {
	k := <-c.free // a lost connection ends all calls, so that one comes
	defer func() { c.free <- k }()
	if err := c.begin(k, r); err != nil {
		return err
	}
	if err := c.write(k, r); err != nil {
		c.fail(err) // which ends receive, which ends this call
	}
	err := <-k.done
	if r.status != nil {
		*r.status, k.status = k.status, nil
	}
	k.data = nil
	return err
}

// begin makes k a call that awaits a reply.
func (c *Client) begin(k *call, r request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	k.serial++
	k.start = time.Now()
	k.command, k.offset, k.len = r.command, r.offset, r.length
	k.data, k.status, k.err, k.errors = nil, nil, nil, 0
	k.got.reset()
	if r.command == CmdRead {
		k.data = r.data
	}
	k.active = true
	return nil
}

// A cookie is a slot below a serial number, so that a second reply to a
// request is told from the first to the slot's next one.
const slotBits = 16

func (k *call) cookie() uint64 { return k.serial<<slotBits | uint64(k.slot) }

// write sends the request of k.
func (c *Client) write(k *call, r request) error {
	c.send.Lock()
	defer c.send.Unlock()
	flags := r.flags
	if c.session.Protocol == Extended && r.command == CmdWrite {
		flags |= CmdFlagPayloadLen
	}
	b := c.header[:0]
	if c.session.Protocol == Extended {
		b = binary.BigEndian.AppendUint32(b, MagicExtRequest)
	} else {
		b = binary.BigEndian.AppendUint32(b, MagicRequest)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.command))
	b = binary.BigEndian.AppendUint64(b, k.cookie())
	b = binary.BigEndian.AppendUint64(b, uint64(r.offset))
	if c.session.Protocol == Extended {
		b = binary.BigEndian.AppendUint64(b, uint64(r.length))
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(r.length))
	}
	if r.command != CmdWrite {
		_, err := c.conn.Write(b)
		return err
	}
	buffers := net.Buffers{b, r.data}
	_, err := buffers.WriteTo(c.conn)
	return err
}

// fail ends the connection. The first cause is the one that is told.
func (c *Client) fail(cause error) {
	if cause == io.EOF {
		cause = io.ErrUnexpectedEOF
	}
	c.mu.Lock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", ErrConnection, cause)
	}
	c.mu.Unlock()
	c.conn.Close()
}

// receive reads replies until the connection ends, then ends the calls that
// still wait. It alone completes calls, so that none returns while its buffer
// may yet be written to.
func (c *Client) receive(r *bufio.Reader) {
	defer close(c.done)
	for {
		if err := c.readReply(r); err != nil {
			c.fail(err)
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		if k.active {
			k.active = false
			k.done <- c.err
		}
	}
}

// watch gives the connection up when a reply is overdue.
func (c *Client) watch() {
	tick := time.NewTicker(max(c.timeout/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-c.done:
			return
		case now := <-tick.C:
			if c.overdue(now) {
				c.fail(fmt.Errorf("no reply within %v: %w", c.timeout, os.ErrDeadlineExceeded))
				return
			}
		}
	}
}

func (c *Client) overdue(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		if k.active && now.Sub(k.start) > c.timeout {
			return true
		}
	}
	return false
}

// Err returns nil while the connection is usable, else why it is not.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return fs.ErrClosed
	}
	return c.err
}

// Close waits for the requests in flight, takes leave of the server and closes
// the connection. It does not flush. Its error is that of a connection that
// had been lost before. Close twice returns fs.ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return fs.ErrClosed
	}
	c.closing = true
	c.mu.Unlock()
	c.active.Wait()
	c.mu.Lock()
	err := c.err
	if err == nil {
		c.err = fs.ErrClosed
	}
	c.mu.Unlock()
	if err == nil {
		// The data of all requests has been read by the server, which answered
		// them, so that these few bytes fit into its socket.
		c.conn.SetWriteDeadline(time.Now().Add(time.Second))
		c.write(&call{}, request{command: CmdDisc})
	}
	c.conn.Close()
	<-c.done
	return err
}
