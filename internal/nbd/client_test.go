package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A header is a request as a server reads it.
type header struct {
	magic          uint32
	flags, command uint16
	cookie, offset uint64
	length         uint64
	data           []byte
}

func readRequest(r io.Reader, protocol Protocol) (h header, err error) {
	b := make([]byte, RequestSize)
	if protocol == Extended {
		b = make([]byte, ExtRequestSize)
	}
	if _, err := io.ReadFull(r, b); err != nil {
		return h, err
	}
	h.magic = binary.BigEndian.Uint32(b)
	h.flags, h.command = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	h.cookie, h.offset = binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:])
	if protocol == Extended {
		h.length = binary.BigEndian.Uint64(b[24:])
	} else {
		h.length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	if Command(h.command) == CmdWrite {
		h.data = make([]byte, h.length)
		_, err = io.ReadFull(r, h.data)
	}
	return h, err
}

// be appends numbers, big-endian, and strings.
func be(b []byte, values ...any) []byte {
	for _, v := range values {
		switch v := v.(type) {
		case uint16:
			b = binary.BigEndian.AppendUint16(b, v)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, v)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, v)
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			panic(v)
		}
	}
	return b
}

func simple(errno uint32, cookie uint64, data string) []byte {
	return be(nil, uint32(MagicSimpleReply), errno, cookie, data)
}

func structured(flags, kind uint16, cookie uint64, payload []byte) []byte {
	return be(nil, uint32(MagicStructuredReply), flags, kind, cookie, uint32(len(payload)), payload)
}

func extended(flags, kind uint16, cookie, offset uint64, payload []byte) []byte {
	return be(nil, uint32(MagicExtReply), flags, kind, cookie, offset, uint64(len(payload)), payload)
}

const everything = FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendDF | FlagSendCache | FlagSendFastZero

func testSession(protocol Protocol) *Session {
	return &Session{
		ExportInfo: ExportInfo{Size: 1 << 40, Flags: everything, BlockSize: BlockSize{1, 4096, 1 << 20}},
		Protocol:   protocol,
		Contexts:   []Context{{ContextBaseAllocation, 7}},
	}
}

// newClient returns a Client of a server that f plays.
func newClient(t *testing.T, s *Session, opt Options, f func(net.Conn)) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	var group sync.WaitGroup
	group.Go(func() {
		defer theirs.Close()
		f(theirs)
	})
	c := NewClient(ours, s, opt)
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
		group.Wait()
		<-c.done
	})
	return c
}

// Every breach of the protocol ends the connection with its reason, and
// nothing is written outside the buffer of the read.
func TestBreaches(t *testing.T) {
	const done, offset, size = ReplyFlagDone, 4096, 16
	data := func(at uint64, n int) []byte { return be(nil, at, strings.Repeat("x", n)) }
	status := func(id uint32, extents ...uint32) []byte {
		b := be(nil, id)
		for _, e := range extents {
			b = be(b, e)
		}
		return b
	}
	for name, c := range map[string]struct {
		protocol Protocol
		command  Command
		reply    func(cookie uint64) []byte
		why      string
		alive    bool // only this request fails
	}{
		"magic":            {Simple, CmdRead, func(c uint64) []byte { return make([]byte, 16) }, "magic", false},
		"end":              {Simple, CmdRead, func(c uint64) []byte { return nil }, "unexpected EOF", false},
		"half a header":    {Simple, CmdRead, func(c uint64) []byte { return simple(0, c, "")[:9] }, "unexpected EOF", false},
		"half the data":    {Simple, CmdRead, func(c uint64) []byte { return simple(0, c, "12345678") }, "unexpected EOF", false},
		"cookie":           {Simple, CmdRead, func(c uint64) []byte { return simple(0, c+1, "") }, "awaits none", false},
		"slot":             {Simple, CmdRead, func(c uint64) []byte { return simple(0, math.MaxUint64, "") }, "awaits none", false},
		"serial":           {Simple, CmdRead, func(c uint64) []byte { return simple(0, c+1<<slotBits, "") }, "awaits none", false},
		"structured":       {Simple, CmdRead, func(c uint64) []byte { return structured(done, ReplyNone, c, nil) }, "magic", false},
		"extended":         {Structured, CmdRead, func(c uint64) []byte { return extended(done, ReplyNone, c, offset, nil) }, "magic", false},
		"simple read":      {Structured, CmdRead, func(c uint64) []byte { return simple(0, c, strings.Repeat("x", size)) }, "simple reply", false},
		"simple, extended": {Extended, CmdFlush, func(c uint64) []byte { return simple(0, c, "") }, "magic", false},
		"other offset":     {Extended, CmdRead, func(c uint64) []byte { return extended(done, ReplyOffsetData, c, 0, data(offset, size)) }, "says it is at 0", false},
		"none, not last":   {Structured, CmdRead, func(c uint64) []byte { return structured(0, ReplyNone, c, nil) }, "type 0", false},
		"none with data":   {Structured, CmdFlush, func(c uint64) []byte { return structured(done, ReplyNone, c, []byte("x")) }, "type 0", false},
		"nothing read":     {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyNone, c, nil) }, "16 bytes are missing", true},
		"too little":       {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetData, c, data(offset, size-1)) }, "1 bytes are missing", true},
		"too much":         {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetData, c, data(offset, size+1)) }, "17 bytes at 4096", false},
		"before":           {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetData, c, data(offset-1, 1)) }, "at 4095", false},
		"after":            {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetData, c, data(offset+size, 1)) }, "at 4112", false},
		"no data":          {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetData, c, data(offset, 0)) }, "type 1", false},
		"twice": {Structured, CmdRead, func(c uint64) []byte {
			return be(nil, structured(0, ReplyOffsetData, c, data(offset+8, 8)), structured(0, ReplyOffsetData, c, data(offset, 9)))
		}, "overlap", false},
		"long hole": {Structured, CmdRead, func(c uint64) []byte {
			return structured(done, ReplyOffsetHole, c, be(nil, uint64(offset), uint32(math.MaxUint32)))
		}, "4294967295 bytes", false},
		"empty hole":        {Structured, CmdRead, func(c uint64) []byte { return structured(done, ReplyOffsetHole, c, be(nil, uint64(offset), uint32(0))) }, "0 bytes", false},
		"hole of a write":   {Structured, CmdWrite, func(c uint64) []byte { return structured(done, ReplyOffsetHole, c, be(nil, uint64(offset), uint32(1))) }, "reply to a write", false},
		"unknown type":      {Structured, CmdFlush, func(c uint64) []byte { return structured(done, 99, c, nil) }, "type 99", false},
		"error without one": {Structured, CmdFlush, func(c uint64) []byte { return structured(done, ReplyError, c, be(nil, uint32(0), uint16(0))) }, "code", false},
		"error text":        {Structured, CmdFlush, func(c uint64) []byte { return structured(done, ReplyError, c, be(nil, uint32(5), uint16(1))) }, "text", false},
		"huge error": {Structured, CmdFlush, func(c uint64) []byte {
			return be(nil, uint32(MagicStructuredReply), uint16(done), uint16(ReplyError), c, uint32(math.MaxUint32))
		}, "4294967295 bytes", false},
		"huge data": {Extended, CmdRead, func(c uint64) []byte {
			return be(nil, uint32(MagicExtReply), uint16(done), uint16(ReplyOffsetData), c, uint64(offset), uint64(math.MaxUint64), uint64(offset))
		}, "18446744073709551607 bytes", false},
		"endless errors": {Structured, CmdFlush, func(c uint64) []byte {
			return bytes.Repeat(structured(0, ReplyError, c, be(nil, uint32(5), uint16(0))), maxErrorChunks+1)
		}, "type 32769", false},
		"unknown context": {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyBlockStatus, c, status(8, 16, 0)) }, "not selected", false},
		"context twice": {Structured, CmdBlockStatus, func(c uint64) []byte {
			return bytes.Repeat(structured(0, ReplyBlockStatus, c, status(7, 16, 0)), 2)
		}, "second", false},
		"no status":         {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyNone, c, nil) }, "0 of 1 contexts", true},
		"no extents":        {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyBlockStatus, c, status(7)) }, "4 bytes", false},
		"half an extent":    {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyBlockStatus, c, status(7, 16)) }, "8 bytes", false},
		"empty extent":      {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyBlockStatus, c, status(7, 0, 0)) }, "extent of 0 bytes", false},
		"extents after all": {Structured, CmdBlockStatus, func(c uint64) []byte { return structured(done, ReplyBlockStatus, c, status(7, 16, 0, 1, 0)) }, "0 to describe", false},
		"wrong count": {Extended, CmdBlockStatus, func(c uint64) []byte {
			return extended(done, ReplyBlockStatusExt, c, offset, be(nil, uint32(7), uint32(2), uint64(16), uint64(0)))
		}, "2 extents in 24 bytes", false},
		"huge status": {Structured, CmdBlockStatus, func(c uint64) []byte {
			return be(nil, uint32(MagicStructuredReply), uint16(done), uint16(ReplyBlockStatus), c, uint32(math.MaxUint32&^7+4), uint32(7))
		}, "in 4294967292 bytes", false},
	} {
		t.Run(name, func(t *testing.T) {
			session := testSession(c.protocol)
			client := newClient(t, session, Options{}, func(conn net.Conn) {
				h, err := readRequest(conn, c.protocol)
				if err != nil {
					t.Errorf("request: %v", err)
					return
				}
				conn.Write(c.reply(h.cookie))
				if c.alive {
					if h, err = readRequest(conn, c.protocol); err == nil && c.protocol == Structured {
						conn.Write(structured(done, ReplyNone, h.cookie, nil))
					}
					io.Copy(io.Discard, conn)
				}
			})
			buf := bytes.Repeat([]byte{0xee}, 3*size)
			var err error
			switch c.command {
			case CmdRead:
				err = client.Read(buf[size:2*size], offset, 0)
			case CmdWrite:
				err = client.Write(buf[size:2*size], offset, 0)
			case CmdFlush:
				err = client.Flush()
			case CmdBlockStatus:
				_, err = client.BlockStatus(offset, size, 0)
			}
			if err == nil || !strings.Contains(err.Error(), c.why) {
				t.Errorf("%v; want it to speak of %q", err, c.why)
			}
			if errors.Is(err, ErrConnection) == c.alive {
				t.Errorf("%v: ErrConnection is %v", err, !c.alive)
			}
			if errors.Is(err, io.EOF) {
				t.Error("io.EOF, which a reader takes for a good end")
			}
			for _, guard := range [][]byte{buf[:size], buf[2*size:]} {
				if bytes.Count(guard, []byte{0xee}) != size {
					t.Error("wrote outside the buffer")
				}
			}
			err = client.Flush()
			if (err == nil) != c.alive {
				t.Errorf("flush afterwards: %v", err)
			}
			if (client.Err() == nil) != c.alive {
				t.Errorf("Err: %v", client.Err())
			}
		})
	}
}

func TestErrorChunks(t *testing.T) {
	text := "disk \x1b[31mon fire"
	client := newClient(t, testSession(Structured), Options{}, func(conn net.Conn) {
		h, _ := readRequest(conn, Structured)
		conn.Write(structured(0, ReplyOffsetData, h.cookie, be(nil, uint64(0), "12345678")))
		conn.Write(structured(0, ReplyErrorOffset, h.cookie, be(nil, uint32(ENOSPC), uint16(len(text)), text, uint64(8))))
		conn.Write(structured(ReplyFlagDone, ReplyError, h.cookie, be(nil, uint32(EIO), uint16(0))))
		h, _ = readRequest(conn, Structured)
		conn.Write(structured(ReplyFlagDone, 1<<15+77, h.cookie, be(nil, uint32(ENOTSUP), uint16(0), "more")))
		h, _ = readRequest(conn, Structured)
		conn.Write(simple(4242, h.cookie, ""))
	})
	err := client.Read(make([]byte, 16), 0, 0)
	if want := "read of 16 bytes at 0: no space left on device: disk \ufffd[31mon fire"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if !errors.Is(err, ENOSPC) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v is not ENOSPC", err)
	}
	if err := client.Flush(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("flush: %v, want ENOTSUP of an unknown error chunk", err)
	}
	if err := client.Flush(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("flush: %v, want EINVAL for a number that nobody knows", err)
	}
}

// Requests are in flight together, and their replies may come in any order
// and in pieces that alternate.
func TestPipelined(t *testing.T) {
	const requests = 8
	client := newClient(t, testSession(Structured), Options{}, func(conn net.Conn) {
		var pending []header
		for range requests {
			h, err := readRequest(conn, Structured)
			if err != nil {
				t.Error(err)
				return
			}
			pending = append(pending, h)
		}
		slices.Reverse(pending)
		for _, h := range pending {
			conn.Write(structured(0, ReplyOffsetData, h.cookie, be(nil, h.offset+512, bytes.Repeat([]byte{byte(h.offset >> 10)}, 512))))
		}
		for _, h := range pending {
			conn.Write(structured(ReplyFlagDone, ReplyOffsetHole, h.cookie, be(nil, h.offset, uint32(512))))
		}
	})
	var group sync.WaitGroup
	for i := range requests {
		group.Go(func() {
			buf := bytes.Repeat([]byte{0xee}, 1024)
			if err := client.Read(buf, int64(i)<<10, 0); err != nil {
				t.Error(err)
			}
			if want := append(make([]byte, 512), bytes.Repeat([]byte{byte(i)}, 512)...); !bytes.Equal(buf, want) {
				t.Errorf("read %d has the bytes of another", i)
			}
		})
	}
	group.Wait()
}

// No more than InFlight requests are sent before one is answered.
func TestInFlight(t *testing.T) {
	const limit, requests = 2, 6
	sent := make(chan header, requests)
	client := newClient(t, testSession(Simple), Options{InFlight: limit}, func(conn net.Conn) {
		for {
			h, err := readRequest(conn, Simple)
			if err != nil {
				return
			}
			sent <- h
			if len(sent) > limit {
				t.Errorf("%d requests in flight", len(sent))
			}
			if len(sent) == limit {
				// One more that comes now is one too many.
				conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				if n, _ := conn.Read(make([]byte, 1)); n != 0 {
					t.Error("a request beyond the limit")
				}
				conn.SetReadDeadline(time.Time{})
				for len(sent) > 0 {
					conn.Write(simple(0, (<-sent).cookie, ""))
				}
			}
		}
	})
	var group sync.WaitGroup
	for range requests {
		group.Go(func() {
			if err := client.Flush(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

// What is longer than the server takes goes in pieces, and what is longer than
// 32 bits too; a write has its payload's length flagged only where it must.
func TestPieces(t *testing.T) {
	for protocol := Extended; protocol <= Simple; protocol++ {
		t.Run(protocol.String(), func(t *testing.T) {
			var got []header
			client := newClient(t, testSession(protocol), Options{}, func(conn net.Conn) {
				for {
					h, err := readRequest(conn, protocol)
					if err != nil || Command(h.command) == CmdDisc {
						return
					}
					got = append(got, h)
					switch protocol {
					case Extended:
						conn.Write(extended(ReplyFlagDone, ReplyNone, h.cookie, h.offset, nil))
					default:
						conn.Write(simple(0, h.cookie, ""))
					}
				}
			})
			data := bytes.Repeat([]byte("imgnbd"), 1<<18)
			if err := client.Write(data, 4096, CmdFlagFUA); err != nil {
				t.Fatal(err)
			}
			if err := client.WriteZeroes(0, 5<<30, CmdFlagNoHole); err != nil {
				t.Fatal(err)
			}
			if err := client.Close(); err != nil {
				t.Fatal(err)
			}
			var written []byte
			var zeroed uint64
			for _, h := range got {
				flags := CommandFlags(h.flags)
				switch Command(h.command) {
				case CmdWrite:
					if h.offset != uint64(4096+len(written)) || h.length > 1<<20 || flags&CmdFlagFUA == 0 || (flags&CmdFlagPayloadLen != 0) != (protocol == Extended) {
						t.Errorf("write of %d at %d, flags %#x", h.length, h.offset, flags)
					}
					written = append(written, h.data...)
				case CmdWriteZeroes:
					if h.offset != zeroed || flags != CmdFlagNoHole {
						t.Errorf("zeroes of %d at %d, flags %#x", h.length, h.offset, flags)
					}
					zeroed += h.length
				}
			}
			if !bytes.Equal(written, data) || zeroed != 5<<30 {
				t.Errorf("%d bytes written, %d zeroed", len(written), zeroed)
			}
		})
	}
}

func TestRefusedUnsent(t *testing.T) {
	s := testSession(Simple)
	s.Size = 8192
	s.BlockSize.Min = 512
	s.Flags = FlagHasFlags | FlagSendTrim
	s.Contexts = nil
	client := newClient(t, s, Options{}, func(conn net.Conn) {
		if n, _ := conn.Read(make([]byte, 1)); n != 0 {
			t.Error("something was sent")
		}
	})
	buf := make([]byte, 512)
	for name, c := range map[string]struct {
		err, want error
	}{
		"negative":         {client.Read(buf, -512, 0), syscall.EINVAL},
		"past the end":     {client.Read(buf, 8192, 0), syscall.EINVAL},
		"overflow":         {client.Trim(512, math.MaxInt64&^511, 0), syscall.EINVAL},
		"negative length":  {client.Trim(512, -512, 0), syscall.EINVAL},
		"unaligned offset": {client.Write(buf, 1, 0), syscall.EINVAL},
		"unaligned length": {client.Write(buf[:1], 0, 0), syscall.EINVAL},
		"no FUA":           {client.Write(buf, 0, CmdFlagFUA), errors.ErrUnsupported},
		"no DF":            {client.Read(buf, 0, CmdFlagDF), errors.ErrUnsupported},
		"no flush":         {client.Flush(), errors.ErrUnsupported},
		"no zeroes":        {client.WriteZeroes(0, 512, 0), errors.ErrUnsupported},
		"no cache":         {client.Cache(0, 512), errors.ErrUnsupported},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %v", name, c.err, c.want)
		}
	}
	if _, err := client.BlockStatus(0, 512, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("no context: %v", err)
	}
	client.session.Flags |= FlagReadOnly
	if err := client.Trim(0, 512, 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("read-only: %v", err)
	}
}

// A server that dies fails what is in flight, and what waits for its turn.
func TestServerDies(t *testing.T) {
	const requests = 8
	client := newClient(t, testSession(Extended), Options{InFlight: requests / 2}, func(conn net.Conn) {
		for range requests / 2 {
			readRequest(conn, Extended)
		}
	})
	errs := make(chan error, requests)
	for range requests {
		go func() { errs <- client.Write(make([]byte, 4096), 0, 0) }()
	}
	for range requests {
		if err := <-errs; !errors.Is(err, ErrConnection) || errors.Is(err, io.EOF) {
			t.Errorf("%v, want ErrConnection", err)
		}
	}
	if err := client.Close(); !errors.Is(err, ErrConnection) {
		t.Errorf("Close: %v", err)
	}
	if err := client.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
}

// A server that answers other requests, but not this one, or reads nothing.
func TestTimeout(t *testing.T) {
	over := make(chan struct{})
	for name, serve := range map[string]func(net.Conn){
		"silent": func(conn net.Conn) { io.Copy(io.Discard, conn) },
		"deaf":   func(conn net.Conn) { conn.Read(make([]byte, 1)); <-over },
		"partly": func(conn net.Conn) {
			first := true
			for {
				h, err := readRequest(conn, Simple)
				if err != nil {
					return
				}
				if !first {
					conn.Write(simple(0, h.cookie, ""))
				}
				first = false
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := newClient(t, testSession(Simple), Options{Timeout: 50 * time.Millisecond}, serve)
			if name == "deaf" {
				defer close(over)
			}
			stop := make(chan struct{})
			var group sync.WaitGroup
			group.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(5 * time.Millisecond):
						client.Flush()
					}
				}
			})
			err := client.Write(make([]byte, 1<<20), 0, 0)
			close(stop)
			group.Wait()
			// In the third case the first request may be a flush.
			if name != "partly" && !errors.Is(err, ErrConnection) || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v, want ErrConnection and os.ErrDeadlineExceeded", err)
			}
			if err := client.Err(); err == nil {
				for err == nil {
					err = client.Flush()
				}
			}
		})
	}
}

// Close lets what is in flight finish, refuses what comes later, and says
// goodbye.
func TestClose(t *testing.T) {
	arrived, release, last := make(chan struct{}), make(chan struct{}), make(chan header, 1)
	client := newClient(t, testSession(Structured), Options{}, func(conn net.Conn) {
		h, _ := readRequest(conn, Structured)
		close(arrived)
		<-release
		conn.Write(structured(ReplyFlagDone, ReplyNone, h.cookie, nil))
		h, _ = readRequest(conn, Structured)
		last <- h
	})
	flushed := make(chan error, 1)
	go func() { flushed <- client.Flush() }()
	<-arrived
	closed := make(chan error, 1)
	go func() { closed <- client.Close() }()
	for client.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	if err := client.Flush(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("flush while closing: %v", err)
	}
	select {
	case err := <-closed:
		t.Errorf("Close did not wait: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	close(release)
	if err := <-flushed; err != nil {
		t.Errorf("flush in flight: %v", err)
	}
	if err := <-closed; err != nil {
		t.Errorf("Close: %v", err)
	}
	if h := <-last; Command(h.command) != CmdDisc {
		t.Errorf("the last request is %v", Command(h.command))
	}
}

func TestCoverage(t *testing.T) {
	var c coverage
	for _, s := range []struct {
		off, n int64
		ok     bool
		spans  int
	}{
		{10, 10, true, 1}, {30, 10, true, 2}, {20, 10, true, 1}, {0, 10, true, 1}, // joins all
		{0, 1, false, 1}, {39, 1, false, 1}, {39, 5, false, 1}, {41, 4, true, 2}, {40, 2, false, 2}, {40, 1, true, 1},
	} {
		if ok := c.add(s.off, s.n); ok != s.ok || len(c.spans) != s.spans {
			t.Errorf("add %d+%d: %v, spans %v; want %v, %d spans", s.off, s.n, ok, c.spans, s.ok, s.spans)
		}
	}
	if c.n != 45 {
		t.Errorf("%d bytes, want 45", c.n)
	}
	c.reset()
	for i := range int64(maxGaps) {
		if !c.add(2*i, 1) {
			t.Fatalf("piece %d refused", i)
		}
	}
	if c.add(2*maxGaps, 1) {
		t.Error("too many pieces")
	}
}

// FuzzReply feeds a stream to the parser of replies while a read, a flush and
// a block status wait. Their cookies are known, so that chunks find them.
func FuzzReply(f *testing.F) {
	const offset, size = 4096, 64
	cookie := func(slot int) uint64 { return 1<<slotBits | uint64(slot) }
	f.Add(uint8(Simple), be(nil, simple(5, cookie(1), ""), simple(0, cookie(0), strings.Repeat("x", size))))
	f.Add(uint8(Structured), be(nil,
		structured(0, ReplyOffsetHole, cookie(0), be(nil, uint64(offset+32), uint32(32))),
		structured(0, ReplyBlockStatus, cookie(2), be(nil, uint32(7), uint32(32), uint32(3), uint32(500), uint32(0))),
		structured(ReplyFlagDone, ReplyOffsetData, cookie(0), be(nil, uint64(offset), strings.Repeat("x", 32))),
		structured(ReplyFlagDone, ReplyErrorOffset, cookie(2), be(nil, uint32(5), uint16(2), "no", uint64(3))),
		structured(ReplyFlagDone, ReplyNone, cookie(1), nil)))
	f.Add(uint8(Extended), be(nil,
		extended(ReplyFlagDone, ReplyBlockStatusExt, cookie(2), offset, be(nil, uint32(7), uint32(1), uint64(1<<40), uint64(3))),
		extended(ReplyFlagDone, ReplyOffsetData, cookie(0), offset, be(nil, uint64(offset), strings.Repeat("x", 64)))))
	f.Fuzz(func(t *testing.T, protocol uint8, stream []byte) {
		if Protocol(protocol) > Simple {
			return
		}
		c := &Client{session: *testSession(Protocol(protocol))}
		buf := bytes.Repeat([]byte{0xee}, 3*size)
		for slot, r := range []request{
			{command: CmdRead, offset: offset, length: size, data: buf[size : 2*size : 2*size]},
			{command: CmdFlush},
			{command: CmdBlockStatus, offset: offset, length: size},
		} {
			k := &call{slot: slot, done: make(chan error, 1)}
			if err := c.begin(k, r); err != nil {
				t.Fatal(err)
			}
			c.calls = append(c.calls, k)
		}
		r := bufio.NewReader(bytes.NewReader(stream))
		for c.readReply(r) == nil {
		}
		for _, guard := range [][]byte{buf[:size], buf[2*size:]} {
			if bytes.Count(guard, []byte{0xee}) != size {
				t.Fatal("wrote outside the buffer")
			}
		}
		for _, k := range c.calls {
			select {
			case err := <-k.done:
				if err != nil || k.command != CmdBlockStatus {
					continue
				}
				for _, s := range k.status {
					var sum int64
					for _, e := range s.Extents {
						if e.Length < 1 {
							t.Fatalf("extent of %d", e.Length)
						}
						sum += e.Length
					}
					if sum < 1 || sum > size {
						t.Fatalf("extents of %d bytes in all", sum)
					}
				}
			default:
			}
		}
	})
}
