package export

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// TestReadWrite moves data of many sizes, below and above each threshold, and
// whether or not the device can read without waiting.
func TestReadWrite(t *testing.T) {
	sizes := []int{1, 511, 4096, largeRead - 1, largeRead, largeRead + 1, lineBatch, lineInput + 1, lineBytes - 100, lineBytes, 5<<20 + 3, nbd.MaxPayload}
	each(t, func(t *testing.T, network string, style style) {
		for _, waits := range []bool{false, true} {
			dev := &hooked{Device: memDisk(t, 64<<20)}
			if waits {
				dev.tryReadAt = never
			}
			s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
			p := s.connect(network, "", style)
			for _, n := range sizes {
				off := uint64(n % 8191)
				data := pattern(off, n)
				p.ok(nbd.CmdWrite, 0, off, uint64(n), data)
				p.ok(nbd.CmdWrite, nbd.CmdFlagFUA, off, uint64(n), data)
				same(t, fmt.Sprint("read of ", n), p.ok(nbd.CmdRead, 0, off, uint64(n), nil), data)
			}
		}
	})
}

// TestFUA: what a client wants durable is so before it is answered, by the
// write itself or by a flush after it.
func TestFUA(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<20)}
	var mu sync.Mutex
	var events []string // of one request at a time
	note := func(event string) error {
		mu.Lock()
		defer mu.Unlock()
		events = append(events, event)
		return nil
	}
	dev.writeAt = func(_ []byte, _ int64, flags image.WriteFlags) error {
		return note(map[image.WriteFlags]string{0: "write", image.FUA: "durable write"}[flags])
	}
	dev.writeZeroes = func(int64, int64, image.WriteFlags) error { return note("zero") }
	dev.flush = func() error { return note("flush") }
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", simple)
	for _, c := range []struct {
		cmd   nbd.Command
		flags nbd.CommandFlags
		n     int
		want  string
	}{
		{nbd.CmdWrite, 0, 512, "[write]"},
		{nbd.CmdWrite, nbd.CmdFlagFUA, 512, "[durable write]"},
		{nbd.CmdWrite, nbd.CmdFlagFUA, largeWrite + 512, "[durable write]"},
		{nbd.CmdWriteZeroes, 0, 512, "[zero]"},
		{nbd.CmdWriteZeroes, nbd.CmdFlagFUA, 512, "[zero flush]"},
		{nbd.CmdWriteZeroes, nbd.CmdFlagFUA | nbd.CmdFlagFastZero, 512, "[zero flush]"},
		{nbd.CmdTrim, nbd.CmdFlagFUA, 512, "[flush]"},
	} {
		mu.Lock()
		events = nil
		mu.Unlock()
		var payload []byte
		if c.cmd == nbd.CmdWrite {
			payload = make([]byte, c.n)
		}
		p.ok(c.cmd, c.flags, 0, uint64(c.n), payload)
		mu.Lock()
		got := fmt.Sprint(events)
		mu.Unlock()
		if got != c.want {
			t.Errorf("%v of %d bytes, flags %v: %s, want %s", c.cmd, c.n, c.flags, got, c.want)
		}
	}
}

// TestOffset: an export of a part of a device shows nothing else, to requests
// and contexts alike.
func TestOffset(t *testing.T) {
	dev := memDisk(t, 1<<20)
	if err := dev.WriteAt(pattern(0, 1<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteZeroes(128<<10, 64<<10, image.MayUnmap); err != nil {
		t.Fatal(err)
	}
	s := serve(t, map[string]*Export{"": {Device: dev, Offset: 64 << 10, Length: 192 << 10}}, nil)
	p := s.connect("unix", "", structured, "base:allocation")
	if p.size != 192<<10 {
		t.Fatalf("size %d", p.size)
	}
	if got := p.call(nbd.CmdBlockStatus, 0, 0, p.size, nil).String(); got != "status 0 [{65536 0} {65536 3} {65536 0}]" {
		t.Errorf("status: %s", got)
	}
	a := p.call(nbd.CmdRead, 0, 0, p.size, nil)
	if got := a.String(); got != "data 0+65536, hole 65536+65536, data 131072+65536" {
		t.Errorf("read: %s", got)
	}
	same(t, "first part", a.data[:64<<10], pattern(64<<10, 64<<10))
	if a := p.call(nbd.CmdRead, 0, p.size, 1, nil); a.errno != nbd.EINVAL {
		t.Errorf("read past the end: %v", a)
	}
}

// TestRandom compares a random history of pipelined requests with a model.
func TestRandom(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		const size = 4 << 20
		s := serve(t, map[string]*Export{"": {Device: memDisk(t, size)}}, nil)
		p := s.connect(network, "", style)
		model := make([]byte, size)
		rng := rand.New(rand.NewPCG(1, uint64(style)))
		for range 40 {
			// A batch of requests that touch different parts of the disk, so
			// that any order is right.
			const parts = 8
			type expect struct {
				off  uint64
				want []byte
			}
			var (
				out     []byte
				expects = make(map[uint64]expect)
				got     = make(map[uint64][]byte)
			)
			for i := range uint64(parts) {
				base := i * (size / parts)
				n := rng.Uint64N(size/parts) + 1
				if rng.IntN(2) == 0 {
					n = n%8192 + 1
				}
				off := base + rng.Uint64N(size/parts-n+1)
				switch rng.IntN(4) {
				case 0:
					data := pattern(rng.Uint64(), int(n))
					out = append(append(out, p.header(nbd.CmdWrite, 0, i, off, n)...), data...)
					copy(model[off:], data)
				case 1:
					out = append(out, p.header(nbd.CmdWriteZeroes, 0, i, off, n)...)
					clear(model[off : off+n])
				default:
					out = append(out, p.header(nbd.CmdRead, 0, i, off, n)...)
					expects[i] = expect{off, bytes.Clone(model[off : off+n])}
					got[i] = make([]byte, n)
				}
			}
			sent := make(chan error, 1)
			go func() { _, err := p.conn.Write(out); sent <- err }()
			for left := parts; left > 0; {
				c := p.chunkOf(func(cookie uint64) int { return len(expects[cookie].want) })
				if c.errno != 0 {
					t.Fatalf("error %d %s", c.errno, c.text)
				}
				if c.typ == nbd.ReplyOffsetData {
					copy(got[c.cookie][c.off-expects[c.cookie].off:], c.data)
				} else {
					copy(got[c.cookie], c.data)
				}
				if c.done {
					left--
				}
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			for i, e := range expects {
				same(t, fmt.Sprintf("read of %d at %d", len(e.want), e.off), got[i], e.want)
			}
		}
	})
}

// TestSparse: what is zero is told in chunks, or is sent as zeros where the
// client wants one chunk or knows no others.
func TestSparse(t *testing.T) {
	dev := memDisk(t, 1<<20)
	want := make([]byte, 1<<20)
	copy(want[256<<10:], pattern(7, 128<<10))
	if err := dev.WriteAt(want[256<<10:384<<10], 256<<10, 0); err != nil {
		t.Fatal(err)
	}
	for _, waits := range []bool{false, true} {
		d := &hooked{Device: dev}
		if waits {
			d.tryReadAt = never
		}
		s := serve(t, map[string]*Export{"": {Device: d}}, nil)
		for _, test := range []struct {
			style style
			flags nbd.CommandFlags
			want  string
		}{
			{simple, 0, "ok"},
			{structured, 0, "hole 0+262144, data 262144+131072, hole 393216+655360"},
			{structured, nbd.CmdFlagDF, "data 0+1048576"},
			{extended, 0, "hole 0+262144, data 262144+131072, hole 393216+655360"},
		} {
			p := s.connect("tcp", "", test.style)
			a := p.call(nbd.CmdRead, test.flags, 0, 1<<20, nil)
			if got := a.String(); got != test.want {
				t.Errorf("%v flags %d waits %v: %s, want %s", test.style, test.flags, waits, got, test.want)
			}
			same(t, "data", a.data, want)
		}
	}
}

// TestRequests is the matrix of what is answered to what.
func TestRequests(t *testing.T) {
	const size = 1 << 20
	rw := &Export{Device: memDisk(t, size)}
	ro := &Export{Device: memDisk(t, size), ReadOnly: true}
	const (
		EOF  = size
		huge = nbd.MaxPayload + 512
	)
	for _, test := range []struct {
		name  string
		cmd   nbd.Command
		flags nbd.CommandFlags
		off   uint64
		n     uint64
		rw    nbd.Errno // 0 is success
		ro    nbd.Errno
	}{
		{"read of nothing", nbd.CmdRead, 0, 0, 0, 0, 0},
		{"read of nothing at the end", nbd.CmdRead, 0, EOF, 0, 0, 0},
		{"read of a byte", nbd.CmdRead, 0, 3, 1, 0, 0},
		{"read with FUA", nbd.CmdRead, nbd.CmdFlagFUA, 0, 512, 0, 0},
		{"read past the end", nbd.CmdRead, 0, EOF - 512, 1024, nbd.EINVAL, nbd.EINVAL},
		{"read at the end", nbd.CmdRead, 0, EOF, 512, nbd.EINVAL, nbd.EINVAL},
		{"read far out", nbd.CmdRead, 0, 1 << 63, 512, nbd.EINVAL, nbd.EINVAL},
		{"read that wraps", nbd.CmdRead, 0, 1<<64 - 512, 1024, nbd.EINVAL, nbd.EINVAL},
		{"read of too much", nbd.CmdRead, 0, 0, huge, nbd.EINVAL, nbd.EINVAL},
		{"read with an unknown flag", nbd.CmdRead, 0x8000, 0, 512, nbd.EINVAL, nbd.EINVAL},
		{"read with NO_HOLE", nbd.CmdRead, nbd.CmdFlagNoHole, 0, 512, nbd.EINVAL, nbd.EINVAL},
		{"write of nothing", nbd.CmdWrite, 0, 0, 0, 0, nbd.EPERM},
		{"write", nbd.CmdWrite, 0, 0, 512, 0, nbd.EPERM},
		{"write with FUA", nbd.CmdWrite, nbd.CmdFlagFUA, 1, 70000, 0, nbd.EPERM},
		{"write with NO_HOLE", nbd.CmdWrite, nbd.CmdFlagNoHole, 0, 512, nbd.EINVAL, nbd.EINVAL},
		{"write past the end", nbd.CmdWrite, 0, EOF - 512, 1024, nbd.ENOSPC, nbd.EPERM},
		{"large write past the end", nbd.CmdWrite, 0, EOF - 512, 300000, nbd.ENOSPC, nbd.EPERM},
		{"write of too much", nbd.CmdWrite, 0, 0, huge, nbd.EINVAL, nbd.EPERM},
		{"flush", nbd.CmdFlush, 0, 0, 0, 0, 0},
		{"flush with a range", nbd.CmdFlush, 0, 512, 512, 0, 0},
		{"trim", nbd.CmdTrim, 0, 0, 65536, 0, nbd.EPERM},
		{"trim with FUA", nbd.CmdTrim, nbd.CmdFlagFUA, 5, 1, 0, nbd.EPERM},
		{"trim of nothing", nbd.CmdTrim, 0, 0, 0, 0, nbd.EPERM},
		{"trim past the end", nbd.CmdTrim, 0, EOF - 512, 1024, nbd.EINVAL, nbd.EPERM},
		{"write zeroes", nbd.CmdWriteZeroes, 0, 0, 65536, 0, nbd.EPERM},
		{"write zeroes NO_HOLE FUA", nbd.CmdWriteZeroes, nbd.CmdFlagNoHole | nbd.CmdFlagFUA, 5, 70000, 0, nbd.EPERM},
		{"write zeroes past the end", nbd.CmdWriteZeroes, 0, EOF - 512, 1024, nbd.ENOSPC, nbd.EPERM},
		{"write zeroes DF", nbd.CmdWriteZeroes, nbd.CmdFlagDF, 0, 512, nbd.EINVAL, nbd.EINVAL},
		{"cache", nbd.CmdCache, 0, 0, EOF, 0, 0},
		{"cache past the end", nbd.CmdCache, 0, EOF - 512, 1024, nbd.EINVAL, nbd.EINVAL},
		{"resize", nbd.CmdResize, 0, 0, 0, nbd.EINVAL, nbd.EINVAL},
		{"unknown command", 99, 0, 0, 0, nbd.EINVAL, nbd.EINVAL},
		{"block status without contexts", nbd.CmdBlockStatus, 0, 0, 512, nbd.EINVAL, nbd.EINVAL},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := serve(t, map[string]*Export{"rw": rw, "ro": ro}, nil)
			for name, want := range map[string]nbd.Errno{"rw": test.rw, "ro": test.ro} {
				for _, style := range []style{simple, structured, extended} {
					p := s.connect("unix", name, style)
					var payload []byte
					if test.cmd == nbd.CmdWrite {
						payload = make([]byte, test.n)
					}
					n := test.n
					p.write(append(p.header(test.cmd, test.flags, 42, test.off, n), payload...))
					expect := 0
					if test.cmd == nbd.CmdRead && want == 0 {
						expect = int(n)
					}
					if a := p.answer(test.off, expect); a.errno != want {
						t.Errorf("%s %v: %v %q, want error %d", name, style, a, a.text, want)
					}
					// The connection is as good as before.
					p.ok(nbd.CmdRead, 0, 0, 512, nil)
				}
			}
		})
	}
}

func TestDFNeedsStructuredReplies(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	if a := s.connect("unix", "", simple).call(nbd.CmdRead, nbd.CmdFlagDF, 0, 512, nil); a.errno != nbd.EINVAL {
		t.Errorf("simple: %v", a)
	}
	if a := s.connect("unix", "", structured).call(nbd.CmdRead, nbd.CmdFlagDF, 0, 512, nil); a.errno != 0 {
		t.Errorf("structured: %v", a)
	}
}

// TestFastZero: what is not fast is ENOTSUP with the flag, and only then.
func TestFastZero(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 8<<30)}
	var mu sync.Mutex
	var calls []int64
	dev.writeZeroes = func(_, n int64, flags image.WriteFlags) error {
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, n)
		if flags&image.FastOnly != 0 {
			return fmt.Errorf("zero: %w", errors.ErrUnsupported)
		}
		return nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", extended)
	for _, test := range []struct {
		flags nbd.CommandFlags
		errno nbd.Errno
		calls int
	}{
		{nbd.CmdFlagFastZero, nbd.ENOTSUP, 1}, // whole: it promises to change nothing
		{0, 0, 5},
	} {
		a := p.call(nbd.CmdWriteZeroes, test.flags, 0, 5<<30, nil)
		mu.Lock()
		if a.errno != test.errno || len(calls) != test.calls {
			t.Errorf("flags %d: %v, in pieces of %v", test.flags, a, calls)
		}
		calls = nil
		mu.Unlock()
	}
}

func TestBlockStatus(t *testing.T) {
	dev := memDisk(t, 1<<20)
	for off := int64(0); off < 1<<20; off += 128 << 10 {
		if err := dev.WriteAt(pattern(0, 64<<10), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	e := &Export{Device: dev, AllocationDepth: true, Contexts: []MetaContext{bitmap("qemu:dirty-bitmap:b")}}
	s := serve(t, map[string]*Export{"": e}, nil)
	p := s.connect("unix", "", structured, "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
	for _, test := range []struct {
		flags  nbd.CommandFlags
		off, n uint64
		want   string
	}{
		{0, 0, 192 << 10, "status 0 [{65536 0} {65536 3} {65536 0}], status 1 [{196608 1}], status 2 [{196608 1}]"},
		{nbd.CmdFlagReqOne, 0, 192 << 10, "status 0 [{65536 0}], status 1 [{196608 1}], status 2 [{196608 1}]"},
		{nbd.CmdFlagFUA, 3, 7, "status 0 [{7 0}], status 1 [{7 1}], status 2 [{7 1}]"},
		{0, 0, 0, "error 22"},
		{0, 1 << 20, 1, "error 22"},
		{nbd.CmdFlagPayloadLen, 0, 512, "error 22"},
	} {
		if got := p.call(nbd.CmdBlockStatus, test.flags, test.off, test.n, nil).String(); got != test.want {
			t.Errorf("flags %d %d+%d: %s, want %s", test.flags, test.off, test.n, got, test.want)
		}
	}
}

// TestStatusPayload: with extended headers a client may choose among its
// contexts in each request.
func TestStatusPayload(t *testing.T) {
	e := &Export{Device: memDisk(t, 6<<30), AllocationDepth: true}
	s := serve(t, map[string]*Export{"": e}, nil)
	p := s.connect("unix", "", extended, "base:allocation", "qemu:allocation-depth")
	if p.flags&nbd.FlagBlockStatusPayload == 0 {
		t.Fatalf("flags %#x", p.flags)
	}
	query := func(length uint64, ids ...uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, length)
		for _, id := range ids {
			b = binary.BigEndian.AppendUint32(b, id)
		}
		return b
	}
	for _, test := range []struct {
		payload []byte
		want    string
	}{
		{query(5<<30, 1), "status 1 [{5368709120 1}]"},
		{query(5<<30, 1, 0), "status 1 [{5368709120 1}], status 0 [{5368709120 3}]"},
		{query(512), "none"},
		{query(512, 1, 1), "error 22"},
		{query(512, 7), "error 22"},
		{query(0, 1), "error 22"},
		{query(7<<30, 1), "error 22"},
		{query(512, 1)[:10], "error 22"},
		{nil, "error 22"},
		{make([]byte, 100000), "error 22"},
	} {
		got := p.call(nbd.CmdBlockStatus, nbd.CmdFlagPayloadLen, 0, uint64(len(test.payload)), test.payload).String()
		if got != test.want {
			t.Errorf("%d bytes: %s, want %s", len(test.payload), got, test.want)
		}
	}
	// A range whose end wraps is no range.
	for cmd, want := range map[nbd.Command]nbd.Errno{nbd.CmdTrim: nbd.EINVAL, nbd.CmdWriteZeroes: nbd.ENOSPC, nbd.CmdCache: nbd.EINVAL, nbd.CmdBlockStatus: nbd.EINVAL} {
		if a := p.call(cmd, 0, 1024, 1<<64-512, nil); a.errno != want {
			t.Errorf("%v that wraps: %v", cmd, a)
		}
	}
	// A payload where none belongs is skipped.
	if a := p.call(nbd.CmdTrim, nbd.CmdFlagPayloadLen, 0, 1000, make([]byte, 1000)); a.errno != nbd.EINVAL {
		t.Errorf("trim with a payload: %v", a)
	}
	p.ok(nbd.CmdRead, 0, 0, 512, nil)
	if got := p.call(nbd.CmdBlockStatus, 0, 0, 6<<30, nil).String(); got != "status 0 [{6442450944 3}], status 1 [{6442450944 1}]" {
		t.Errorf("64-bit status: %s", got)
	}
}

// TestStatusBounded: a disk of many small runs is described in parts.
func TestStatusBounded(t *testing.T) {
	dev := &hooked{Device: memDisk(t, 1<<30)}
	dev.appendExtents = func(dst []image.Extent, off, n int64, _ image.Want) ([]image.Extent, error) {
		for n > 0 {
			length := min(4096-off%4096, n)
			dst = append(dst, image.Extent{Offset: off, Length: length, Zero: off/4096%2 == 0, Data: true, Allocated: true})
			off += length
			n -= length
		}
		return dst, nil
	}
	s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
	p := s.connect("unix", "", structured, "base:allocation")
	a := p.call(nbd.CmdBlockStatus, 0, 0, 1<<30, nil)
	if n := len(a.chunks[0].runs); n != maxStatus {
		t.Errorf("%d runs, want %d", n, maxStatus)
	}
}

// TestLostClients: what cannot be understood, or is too long to be skipped,
// ends the connection.
func TestLostClients(t *testing.T) {
	s := serve(t, map[string]*Export{"": {Device: memDisk(t, 1<<20)}}, nil)
	for name, bytes := range map[string][]byte{
		"magic":   make([]byte, nbd.RequestSize),
		"payload": encodeRequest(false, request{0, nbd.CmdWrite, 1, 0, maxSkip + 1}),
	} {
		p := s.connect("unix", "", simple)
		p.write(bytes)
		if name == "payload" {
			p.answer(0, 0)
		}
		if !p.gone() {
			t.Errorf("%s: the connection goes on", name)
		}
	}
}

// TestPayloadIsNoRequest: what is written may look like a request. After a
// large write another of that length is expected, whose payload is not taken
// for one when the first is refused.
func TestPayloadIsNoRequest(t *testing.T) {
	each(t, func(t *testing.T, network string, style style) {
		const size, large = 1 << 20, 256 << 10
		s := serve(t, map[string]*Export{"": {Device: memDisk(t, size)}}, nil)
		p := s.connect(network, "", style)
		forged := append(p.header(nbd.CmdWrite, 0, 666, 0, large), bytes.Repeat([]byte("!"), large)...)[:large]
		go func() { // a pipe holds nothing
			p.conn.Write(append(p.header(nbd.CmdWrite, 0, 1, 0, large), pattern(0, large/2)...))
			p.conn.Write(append(pattern(large/2, large/2), p.header(nbd.CmdWrite, 0, 2, size, large)...))
		}()
		for range 2 { // so that nothing of the payload has arrived with its header
			p.answer(0, 0)
		}
		p.write(forged)
		same(t, "data", p.ok(nbd.CmdRead, 0, 0, large, nil), pattern(0, large))
	})
}

// FuzzRequest feeds bytes to the line: it never panics, and answers are well
// formed.
func FuzzRequest(f *testing.F) {
	f.Add(uint8(0), encodeRequest(false, request{0, nbd.CmdRead, 1, 0, 512}))
	f.Add(uint8(1), append(encodeRequest(false, request{0, nbd.CmdWrite, 1, 0, 4}), 1, 2, 3, 4))
	f.Add(uint8(2), encodeRequest(true, request{nbd.CmdFlagReqOne, nbd.CmdBlockStatus, 1, 0, 1 << 40}))
	f.Add(uint8(2), append(encodeRequest(true, request{nbd.CmdFlagPayloadLen, nbd.CmdBlockStatus, 1, 0, 12}), 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, kind uint8, in []byte) {
		a := &agreement{size: 1 << 20, structured: kind > 0, extended: kind > 1, flags: nbd.TransmissionFlags(kind) << 8}
		e := &Export{Device: memDisk(t, 1<<20)}
		if kind&4 != 0 {
			a.contexts = e.contexts()
		}
		for len(in) >= a.requestSize() {
			r, err := a.decode(in)
			if err != nil {
				return
			}
			in = in[a.requestSize():]
			size := a.payload(&r)
			if refused := a.validate(&r); refused != nil {
				if refused.errno == 0 || refused.text == "" {
					t.Fatalf("%+v is refused without a reason", r)
				}
			} else if size > nbd.MaxPayload && r.cmd != nbd.CmdBlockStatus {
				t.Fatalf("%+v has a payload of %d", r, size)
			} else if r.cmd != nbd.CmdFlush && !(r.cmd == nbd.CmdBlockStatus && r.has(nbd.CmdFlagPayloadLen)) && (r.off() < 0 || r.n() < 0 || r.off()+r.n() > a.size) {
				t.Fatalf("%+v is outside", r)
			}
			size = min(size, uint64(len(in)))
			if r.cmd == nbd.CmdBlockStatus {
				if n, want, refused := a.statusQuery(&r, in[:size]); refused == nil && (len(want) > len(a.contexts) || r.offset+n > uint64(a.size)) {
					t.Fatalf("%+v is outside", r)
				}
			}
			in = in[size:]
		}
	})
}

// Some replies leave while requests that came with theirs are served; with another
// connection that transmits they leave together.
func TestShare(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(2, runtime.NumCPU())))
	for _, alone := range []bool{true, false} {
		t.Run(fmt.Sprint("alone=", alone), func(t *testing.T) {
			const n, block = 4 * lineShare, 512
			dev := &hooked{Device: memDisk(t, 1<<20)}
			stalled, release := make(chan struct{}), make(chan struct{})
			dev.tryReadAt = func(p []byte, off int64) error {
				if off == (n-1)*block { // on the line
					close(stalled)
					<-release
				}
				return dev.Device.TryReadAt(p, off)
			}
			s := serve(t, map[string]*Export{"": {Device: dev}}, nil)
			p := s.connect("unix", "", simple)
			if !alone {
				other := s.connect("unix", "", simple)
				other.write(other.header(nbd.CmdRead, 0, 0, 0, block))
				other.read(nbd.SimpleReplySize + block)
			}
			var requests []byte
			for i := range uint64(n) {
				requests = append(requests, p.header(nbd.CmdRead, 0, i, i*block, block)...)
			}
			p.write(requests)
			<-stalled
			early := 0
			if alone {
				early = n - lineShare
				p.read(early * (nbd.SimpleReplySize + block))
			}
			p.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if got, err := p.conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes more than of %d replies, and %v", got, early, err)
			}
			p.conn.SetReadDeadline(time.Now().Add(patience))
			close(release)
			p.read((n - early) * (nbd.SimpleReplySize + block))
		})
	}
}
