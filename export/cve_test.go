package export

import (
	"bytes"
	"encoding/binary"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// rawOption encodes an option that says it has size bytes of data.
func rawOption(id nbd.Option, size uint32, data ...byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbd.MagicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	return append(binary.BigEndian.AppendUint32(b, size), data...)
}

// What clients have done to other servers. After each, this one serves as it
// did before; what they leave behind is looked at by serve.
func TestClientCVEs(t *testing.T) {
	long := strings.Repeat("x", nbd.MaxString)
	greeted := func(s *server) *peer {
		p := s.dial("unix")
		p.greet()
		return p
	}
	for _, tt := range []struct {
		name string
		try  func(t *testing.T, s *server)
	}{
		// Clients that never negotiate take all descriptors, and one that is
		// there when the server stops crashes it.
		{"CVE-2024-7409", func(t *testing.T, s *server) {
			var idle []*peer
			for range 50 {
				idle = append(idle, s.dial("unix"), greeted(s))
			}
			s.connect("unix", "", simple).ok(nbd.CmdRead, 0, 0, 512, nil)
			s.Shutdown(t.Context())
			for _, p := range idle {
				if err := drain(p); err != nil {
					t.Error(err)
				}
			}
		}},
		// Clients that leave at any point of the handshake.
		{"CVE-2017-9524", func(t *testing.T, s *server) {
			talk := append([]byte{0, 0, 0, 3}, rawOption(nbd.OptStructuredReply, 0)...)
			talk = append(talk, rawOption(nbd.OptGo, 6, 0, 0, 0, 0, 0, 0)...)
			talk = append(talk, encodeRequest(false, request{0, nbd.CmdWrite, 1, 0, 512})...)
			for n := range len(talk) {
				p := s.dial("unix")
				p.write(talk[:n])
				p.conn.Close()
			}
		}},
		{"CVE-2017-7539", func(t *testing.T, s *server) {
			for _, flags := range [][]byte{{0, 0, 0, 0}, {255, 255, 255, 255}, {0, 0, 0, 4}} {
				p := s.dial("unix")
				p.read(18)
				p.write(append(flags, rawOption(nbd.OptList, 0)...))
				if !p.gone() {
					t.Errorf("flags %v are accepted", flags)
				}
			}
			p := greeted(s)
			p.write(make([]byte, 16)) // the magic of nothing
			if !p.gone() {
				t.Error("an option without magic is accepted")
			}
		}},
		// A name of the greatest length, on a small stack.
		{"CVE-2017-15118", func(t *testing.T, s *server) {
			for _, id := range []nbd.Option{nbd.OptInfo, nbd.OptGo} {
				p := greeted(s)
				if typ, err := p.ask(id, optionData(t, id, []string{long})); typ != nbd.RepErrUnknown || err != nil {
					t.Errorf("%v: %#x, %v", id, typ, err)
				}
				if typ, err := p.ask(id, optionData(t, id, []string{long + "x"})); typ != nbd.RepErrInvalid || err != nil {
					t.Errorf("%v, longer: %#x, %v", id, typ, err)
				}
				p.option(nbd.OptAbort, nil)
			}
		}},
		// Gigabytes of an option, to be thrown away.
		{"CVE-2017-15119", func(t *testing.T, s *server) {
			for _, id := range []nbd.Option{nbd.OptAbort, nbd.OptList, nbd.OptExportName, nbd.OptGo, 77} {
				p := greeted(s)
				p.write(rawOption(id, math.MaxUint32))
				if !p.gone() {
					t.Errorf("%v: 4 GiB are read", id)
				}
			}
		}},
		// An error that repeats the name does not fit into an error.
		{"CVE-2020-10761", func(t *testing.T, s *server) {
			p := greeted(s)
			data := optionData(t, nbd.OptGo, []string{strings.Repeat("%s", nbd.MaxString/2)})
			p.write(append(rawOption(nbd.OptGo, uint32(len(data))), data...))
			if n := binary.BigEndian.Uint32(p.read(20)[16:]); n > 200 {
				t.Errorf("the error has %d bytes", n)
			}
		}},
		// Options again and in an order that makes no sense.
		{"CVE-2019-14851", func(t *testing.T, s *server) {
			p := greeted(s)
			for range 3 {
				for _, id := range []nbd.Option{nbd.OptSetMetaContext, nbd.OptStructuredReply, nbd.OptExtendedHeaders, nbd.OptInfo,
					nbd.OptStartTLS, nbd.OptListMetaContext, nbd.OptList} {
					data := optionData(t, nbd.OptGo, []string{"nothing of that name"})
					if _, err := p.ask(id, data); err != nil {
						t.Errorf("%v: %v", id, err)
					}
				}
			}
			p.agree(extended)
			p.style = extended
			p.ok(nbd.CmdRead, 0, 0, 512, nil)
		}},
		// The longest block status that can be asked for.
		{"CVE-2025-47711", func(t *testing.T, s *server) {
			p := s.connect("unix", "", structured, "base:allocation")
			for _, n := range []uint64{math.MaxUint32, math.MaxUint32 - 511, 1 << 31} {
				if a := p.call(nbd.CmdBlockStatus, 0, 0, n, nil); a.errno != nbd.EINVAL {
					t.Errorf("%d bytes: %v", n, a)
				}
			}
			p.ok(nbd.CmdBlockStatus, 0, 0, p.size, nil)
		}},
		{"CVE-2025-47712", func(t *testing.T, s *server) {
			p := s.connect("unix", "", extended, "base:allocation")
			for _, off := range []uint64{1, p.size - 1, math.MaxUint64, math.MaxUint64 - 511, 1 << 63} {
				for _, n := range []uint64{p.size, math.MaxUint64, 1 << 63, math.MaxUint32} {
					for _, cmd := range []nbd.Command{nbd.CmdBlockStatus, nbd.CmdTrim, nbd.CmdCache, nbd.CmdWriteZeroes} {
						if a := p.call(cmd, 0, off, n, nil); a.errno == 0 {
							t.Errorf("%v: %d bytes at %d", cmd, n, off)
						}
					}
				}
			}
			p.ok(nbd.CmdBlockStatus, 0, 0, p.size, nil)
		}},
		// Lengths that become small when something is added.
		{"CVE-2022-26495", func(t *testing.T, s *server) {
			for _, id := range []nbd.Option{nbd.OptInfo, nbd.OptGo, nbd.OptSetMetaContext, nbd.OptListMetaContext} {
				p := greeted(s)
				p.option(nbd.OptStructuredReply, nil)
				for _, n := range []uint32{math.MaxUint32, math.MaxUint32 - 3, math.MaxUint32 - 9} {
					data := append(binary.BigEndian.AppendUint32(nil, n), make([]byte, 60)...)
					if typ, err := p.ask(id, data); typ != nbd.RepErrInvalid || err != nil {
						t.Errorf("%v, %d: %#x, %v", id, n, typ, err)
					}
				}
			}
		}},
		{"CVE-2022-26496", func(t *testing.T, s *server) {
			p := greeted(s)
			p.option(nbd.OptStructuredReply, nil)
			data := append(binary.BigEndian.AppendUint32(nil, 0), 0, 0, 0, 1)
			data = append(binary.BigEndian.AppendUint32(data, 16<<10), bytes.Repeat([]byte("q"), 16<<10)...)
			if _, err := p.ask(nbd.OptListMetaContext, data); err != nil {
				t.Error(err)
			}
			p.agree(simple)
		}},
		// A request for more than there can be, and a payload of that length.
		{"CVE-2005-3534", func(t *testing.T, s *server) {
			p := s.connect("unix", "", simple)
			p.write(p.header(nbd.CmdWrite, 0, 1, 0, math.MaxUint32))
			p.answer(0, 0)
			if !p.gone() {
				t.Error("4 GiB are read")
			}
		}},
		{"CVE-2011-0530", func(t *testing.T, s *server) {
			p := s.connect("unix", "", simple)
			for _, n := range []uint64{nbd.MaxPayload + 1, math.MaxUint32} {
				if p.write(p.header(nbd.CmdRead, 0, 1, 0, n)); p.chunk(0).errno == 0 {
					t.Errorf("%d bytes are read", n)
				}
			}
			p.ok(nbd.CmdRead, 0, 0, 512, nil)
		}},
		// To ask for what there is not ended the server.
		{"CVE-2011-1925", func(t *testing.T, s *server) {
			p := greeted(s)
			p.write(rawOption(nbd.OptExportName, 3, []byte("any")...))
			if !p.gone() {
				t.Error("an unknown export is served")
			}
		}},
		{"CVE-2013-7441", func(t *testing.T, s *server) {
			p := s.dial("unix")
			p.write([]byte("GET / HTTP/1.0\r\n\r\n"))
			p.conn.Close()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := &Export{Device: memDisk(t, 1<<20)}
			s := serve(t, map[string]*Export{"": e, "disk": e}, func(s *Server) { s.Limits.Handshake = time.Minute })
			tt.try(t, s)
			if s.isClosing() {
				return
			}
			s.connect("unix", "", simple).ok(nbd.CmdRead, 0, 0, 512, nil)
		})
	}
}
