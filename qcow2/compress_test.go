package qcow2

import (
	"bytes"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestZstdFrames: a cluster is what the frames give, one or several, known
// length or not; what follows does not matter, too little does.
func TestZstdFrames(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	noSize := func(p []byte) []byte { // a stream does not know how long it gets
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		for ; len(p) > 0; p = p[min(len(p), 1000):] {
			w.Write(p[:min(len(p), 1000)])
			w.Flush()
		}
		w.Close()
		return b.Bytes()
	}
	frame := func(p []byte) []byte { return enc.EncodeAll(p, nil) }
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	want := texts(4096)["words"]
	skip := []byte("\x50\x2a\x4d\x18\x03\x00\x00\x00abc")
	for _, tt := range []struct {
		name string
		src  []byte
		ok   bool
	}{
		{"one", frame(want), true},
		{"unknown length", noSize(want), true},
		{"two", cat(frame(want[:1000]), frame(want[1000:])), true},
		{"two and an empty one between", cat(frame(want[:1000]), noSize(nil), noSize(want[1000:])), true},
		{"followed by anything", cat(frame(want), []byte("anything")), true},
		{"followed by zeros", cat(noSize(want), make([]byte, 300)), true},
		{"after a skippable one", cat(skip, frame(want)), true},
		{"longer", frame(cat(want, want)), true},
		{"second longer", cat(frame(want[:1000]), noSize(cat(want[1000:], want))), true},
		{"short", frame(want[:4000]), false},
		{"short, then zeros", cat(frame(want[:4000]), make([]byte, 300)), false},
		{"cut", frame(want)[:100], false},
		{"nothing", nil, false},
		{"only skippable", skip, false},
		{"window of a gigabyte", []byte("\x28\xb5\x2f\xfd\x00\xa0\x01\x00\x00"), false},
	} {
		w := new(workspace)
		for range 2 { // a workspace is used again, after errors too
			got := make([]byte, len(want))
			w.src = tt.src
			err := w.zstd(got)
			if tt.ok && (err != nil || !bytes.Equal(got, want)) || !tt.ok && err == nil {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
	}
}

// TestCompressedAtTheEnd: the length of compressed data is in sectors, so it
// may seem to reach past the end of the image.
func TestCompressedAtTheEnd(t *testing.T) {
	x := build(16, 1<<20)
	raw := deflate(t, bytes.Repeat([]byte{5}, 0x10000))
	x.compressed(0, raw)
	b := x.bytes()
	at := len(b) - 0x10000
	im := openBytes(t, b[:at+len(raw)])
	p := make([]byte, 0x10000)
	if _, err := im.ReadAt(p, 0); err != nil || p[0] != 5 || p[0xffff] != 5 {
		t.Errorf("%v", err)
	}
	im = openBytes(t, b[:at+len(raw)-4])
	if _, err := im.ReadAt(p, 0); err == nil || !strings.Contains(err.Error(), "compressed data at 0x") {
		t.Errorf("cut: %v", err)
	}
}
