package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A script is a server that says what it has to say without listening.
type script struct {
	io.Reader
	sent bytes.Buffer
}

func (s *script) Write(p []byte) (int, error) { return s.sent.Write(p) }

func play(parts ...[]byte) *script {
	return &script{Reader: bytes.NewReader(bytes.Join(parts, nil))}
}

func greeting(flags uint16) []byte {
	return be(nil, uint64(Magic), uint64(MagicOption), flags)
}

func reply(opt Option, rep OptionReply, data ...any) []byte {
	b := be(nil, data...)
	return be(nil, uint64(MagicOptionReply), uint32(opt), uint32(rep), uint32(len(b)), b)
}

const fixed = FlagFixedNewstyle | FlagNoZeroes

func export(size uint64, flags TransmissionFlags) []byte {
	return reply(OptGo, RepInfo, uint16(InfoExport), size, uint16(flags))
}

func TestNegotiate(t *testing.T) {
	whole := Options{Export: "disk", Contexts: []string{ContextBaseAllocation}}
	s := play(greeting(fixed),
		reply(OptExtendedHeaders, RepErrUnsup, "what?"),
		reply(OptStructuredReply, RepAck),
		reply(OptSetMetaContext, RepMetaContext, uint32(5), ContextBaseAllocation),
		reply(OptSetMetaContext, RepMetaContext, uint32(5), ContextBaseAllocation),
		reply(OptSetMetaContext, RepAck),
		reply(OptGo, RepInfo, uint16(99), "unknown"),
		export(1<<20, everything),
		reply(OptGo, RepInfo, uint16(InfoDescription), "a disk"),
		reply(OptGo, RepInfo, uint16(InfoBlockSize), uint32(512), uint32(4096), uint32(1<<25)),
		reply(OptGo, RepAck), []byte("next"))
	got, err := negotiate(s, whole)
	if err != nil {
		t.Fatal(err)
	}
	want := &Session{
		ExportInfo: ExportInfo{"disk", "a disk", 1 << 20, everything, BlockSize{512, 4096, 1 << 25}},
		Protocol:   Structured,
		Contexts:   []Context{{ContextBaseAllocation, 5}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if rest, _ := io.ReadAll(s); string(rest) != "next" {
		t.Errorf("left %q of the stream; what follows the handshake is not the handshake's", rest)
	}
	option := func(opt Option, data ...any) []byte {
		b := be(nil, data...)
		return be(nil, uint64(MagicOption), uint32(opt), uint32(len(b)), b)
	}
	sent := be(nil, uint32(fixed), option(OptExtendedHeaders), option(OptStructuredReply),
		option(OptSetMetaContext, uint32(4), "disk", uint32(1), uint32(15), ContextBaseAllocation),
		option(OptGo, uint32(4), "disk", uint16(2), uint16(InfoDescription), uint16(InfoBlockSize)))
	if d := cmp.Diff(sent, s.sent.Bytes()); d != "" {
		t.Errorf("sent: -want +got\n%s", d)
	}
}

func TestNegotiateRefused(t *testing.T) {
	simple := Options{Protocol: Simple}
	withContext := Options{Protocol: Structured, Contexts: []string{"a", "b"}}
	structured := reply(OptStructuredReply, RepAck)
	for name, c := range map[string]struct {
		server *script
		opt    Options
		why    string
	}{
		"empty":       {play(), simple, "EOF"},
		"other":       {play([]byte("SSH-2.0-OpenSSH_9.2p1\r\n")), simple, "not an NBD server"},
		"magic":       {play(be(nil, uint64(Magic), uint64(1))), simple, "magic"},
		"old name":    {play(be(nil, uint64(Magic), uint64(MagicOldstyle), uint64(0), uint32(0), make([]byte, 124))), Options{Export: "x"}, "no export names"},
		"old size":    {play(be(nil, uint64(Magic), uint64(MagicOldstyle), uint64(1<<63), uint32(0), make([]byte, 124))), simple, "9223372036854775808"},
		"not fixed":   {play(greeting(0)), Options{Export: "x"}, "no such export"},
		"reply magic": {play(greeting(fixed), make([]byte, 20)), simple, "magic"},
		"option":      {play(greeting(fixed), reply(OptInfo, RepAck)), simple, "reply to option info"},
		"long reply":  {play(greeting(fixed), be(nil, uint64(MagicOptionReply), uint32(OptGo), uint32(RepInfo), uint32(math.MaxUint32))), simple, "4294967295 bytes"},
		"ack":         {play(greeting(fixed), reply(OptGo, RepAck, "x")), simple, "ack with 1"},
		"no export":   {play(greeting(fixed), reply(OptGo, RepAck)), simple, "no export information"},
		"reply":       {play(greeting(fixed), reply(OptGo, RepServer, "x")), simple, "reply 0x2"},
		"size":        {play(greeting(fixed), export(1<<63, 1)), simple, "9223372036854775808"},
		"info":        {play(greeting(fixed), reply(OptGo, RepInfo, "x")), simple, "1 bytes"},
		"short info":  {play(greeting(fixed), reply(OptGo, RepInfo, uint16(InfoExport), uint64(1))), simple, "8 bytes"},
		"block size":  {play(greeting(fixed), reply(OptGo, RepInfo, uint16(InfoBlockSize), uint32(3), uint32(4096), uint32(4096))), simple, "block sizes 3"},
		"block size 0": {play(greeting(fixed), reply(OptGo, RepInfo, uint16(InfoBlockSize), uint32(0), uint32(4096), uint32(4096))),
			simple, "block sizes 0"},
		"block max":   {play(greeting(fixed), reply(OptGo, RepInfo, uint16(InfoBlockSize), uint32(512), uint32(4096), uint32(0))), simple, "block sizes"},
		"description": {play(greeting(fixed), reply(OptGo, RepInfo, uint16(InfoDescription), strings.Repeat("x", 4097))), simple, "4097"},
		"endless":     {play(greeting(fixed), bytes.Repeat(export(1, 1), maxInfos+1)), simple, "more than"},
		"unknown":     {play(greeting(fixed), reply(OptGo, RepErrUnknown, "no \x1b[2Jdisk")), simple, "no such export: no \ufffd[2Jdisk"},
		"strange":     {play(greeting(fixed), reply(OptGo, repError+99)), simple, "0x80000063"},
		"tls":         {play(greeting(fixed), reply(OptStructuredReply, RepErrTLSReqd)), Options{Protocol: Structured}, "requires TLS"},
		"one id": {play(greeting(fixed), structured, reply(OptSetMetaContext, RepMetaContext, uint32(5), "a"),
			reply(OptSetMetaContext, RepMetaContext, uint32(5), "b")), withContext, "one id"},
		"two ids": {play(greeting(fixed), structured, reply(OptSetMetaContext, RepMetaContext, uint32(5), "a"),
			reply(OptSetMetaContext, RepMetaContext, uint32(6), "a")), withContext, "two ids"},
		"unasked":    {play(greeting(fixed), structured, reply(OptSetMetaContext, RepMetaContext, uint32(5), "c")), withContext, "nobody asked for"},
		"repetition": {play(greeting(fixed), structured, bytes.Repeat(reply(OptSetMetaContext, RepMetaContext, uint32(5), strings.Repeat("a", MaxString)), 1<<12)), Options{Contexts: []string{strings.Repeat("a", MaxString)}, Protocol: Structured}, "more than 16777216 bytes"},
		"name":       {play(), Options{Export: strings.Repeat("x", 4097)}, "longer than 4096"},
		"context":    {play(), Options{Contexts: []string{strings.Repeat("x", 4097)}}, "longer than 4096"},
	} {
		s, err := Handshake(t.Context(), scripted{c.server}, c.opt)
		if err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %+v, %v; want it to speak of %q", name, s, err, c.why)
		}
		if errors.Is(err, io.EOF) {
			t.Errorf("%s: io.EOF", name)
		}
	}
}

// scripted makes a script a connection.
type scripted struct{ *script }

func (scripted) Close() error                     { return nil }
func (scripted) LocalAddr() net.Addr              { return nil }
func (scripted) RemoteAddr() net.Addr             { return nil }
func (scripted) SetDeadline(time.Time) error      { return nil }
func (scripted) SetReadDeadline(time.Time) error  { return nil }
func (scripted) SetWriteDeadline(time.Time) error { return nil }

func TestListRefused(t *testing.T) {
	start := be(nil, greeting(fixed), reply(OptExtendedHeaders, RepErrUnsup), reply(OptStructuredReply, RepErrUnsup))
	described := be(nil, reply(OptInfo, RepInfo, uint16(InfoExport), uint64(512), uint16(1)), reply(OptInfo, RepAck))
	for name, c := range map[string]struct {
		server *script
		why    string
	}{
		"policy":  {play(start, reply(OptList, RepErrPolicy, "not you")), "policy: not you"},
		"TLS":     {play(greeting(fixed), reply(OptExtendedHeaders, RepErrTLSReqd), reply(OptList, RepErrTLSReqd, "no")), "option list: the server requires TLS: no"},
		"short":   {play(start, reply(OptList, RepServer, "x")), "1 bytes"},
		"name":    {play(start, reply(OptList, RepServer, uint32(5), "1234")), "name of 5"},
		"long":    {play(start, reply(OptList, RepServer, uint32(4097), strings.Repeat("x", 4097))), "name of 4097"},
		"exports": {play(start, bytes.Repeat(reply(OptList, RepServer, uint32(1), "x"), maxExports+1)), "after 10000 exports"},
		"contexts": {play(start, reply(OptList, RepServer, uint32(1), "x"), reply(OptList, RepAck), described,
			bytes.Repeat(reply(OptListMetaContext, RepMetaContext, uint32(0), "a"), maxContexts+1)), "after 1000 contexts"},
		"bytes": {play(start, bytes.Repeat(reply(OptList, RepServer, uint32(1), "x"), 5), reply(OptList, RepAck),
			bytes.Repeat(be(nil, described, bytes.Repeat(reply(OptListMetaContext, RepMetaContext, uint32(0), strings.Repeat("a", MaxString)), maxContexts),
				reply(OptListMetaContext, RepAck)), 5)), "more than 16777216 bytes"},
	} {
		if l, err := List(t.Context(), scripted{c.server}); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %+v, %v; want it to speak of %q", name, l, err, c.why)
		}
	}
}

// What one export refuses does not hide the others.
func TestListPartly(t *testing.T) {
	s := play(greeting(fixed), reply(OptExtendedHeaders, RepAck),
		reply(OptList, RepServer, uint32(1), "a", "first"), reply(OptList, RepServer, uint32(1), "b"), reply(OptList, RepAck),
		reply(OptInfo, RepErrPolicy, "secret"),
		reply(OptInfo, RepInfo, uint16(InfoExport), uint64(512), uint16(1)), reply(OptInfo, RepAck),
		reply(OptListMetaContext, RepMetaContext, uint32(0), "x:1"), reply(OptListMetaContext, RepMetaContext, uint32(0), "x:2"),
		reply(OptListMetaContext, RepAck))
	l, err := List(t.Context(), scripted{s})
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Exports) != 2 || l.Protocol != Extended {
		t.Fatalf("%+v", l)
	}
	if e := l.Exports[0]; e.Name != "a" || e.Description != "first" || !refused(e.Err, RepErrPolicy) {
		t.Errorf("%+v", e)
	}
	want := Listed{ExportInfo: ExportInfo{Name: "b", Size: 512, Flags: 1, BlockSize: defaultBlockSize}, Contexts: []string{"x:1", "x:2"}}
	if d := cmp.Diff(want, l.Exports[1]); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestHandshakeContext(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		theirs.Write(greeting(fixed))
		cancel()
	}()
	if _, err := Handshake(ctx, ours, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

func FuzzHandshake(f *testing.F) {
	f.Add(be(nil, greeting(fixed), reply(OptExtendedHeaders, RepAck),
		reply(OptSetMetaContext, RepMetaContext, uint32(5), "a"), reply(OptSetMetaContext, RepAck),
		export(1<<20, everything), reply(OptGo, RepInfo, uint16(InfoBlockSize), uint32(1), uint32(4096), uint32(1<<25)), reply(OptGo, RepAck)))
	f.Add(be(nil, greeting(0), uint64(512), uint16(1), make([]byte, 124)))
	f.Add(be(nil, uint64(Magic), uint64(MagicOldstyle), uint64(512), uint32(1), make([]byte, 124)))
	f.Add(be(nil, greeting(fixed), reply(OptExtendedHeaders, RepAck),
		reply(OptList, RepServer, uint32(1), "a", "first"), reply(OptList, RepAck),
		reply(OptInfo, RepInfo, uint16(InfoExport), uint64(512), uint16(1)), reply(OptInfo, RepAck),
		reply(OptListMetaContext, RepMetaContext, uint32(0), "x:1"), reply(OptListMetaContext, RepAck)))
	f.Fuzz(func(t *testing.T, server []byte) {
		s, err := negotiate(play(server), Options{Contexts: []string{"a"}})
		if err == nil && (s.Size < 0 || s.BlockSize.Min == 0 || s.BlockSize.Max < s.BlockSize.Min) {
			t.Fatalf("%+v", s)
		}
		List(t.Context(), scripted{play(server)})
	})
}
