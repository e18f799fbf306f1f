package qcow2

import (
	"bytes"
	stdflate "compress/flate"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/flate"
)

// texts are contents with codes of all kinds: long runs, short distances, few
// symbols, all symbols, skewed so that codes get long.
func texts(n int) map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 9))
	m := map[string][]byte{"zeros": make([]byte, n), "noise": make([]byte, n), "skewed": make([]byte, n), "words": nil, "mixed": make([]byte, n)}
	for i := range n {
		m["noise"][i] = byte(rnd.Uint32())
		m["skewed"][i] = byte(rnd.ExpFloat64() * 12)
		m["mixed"][i] = byte(rnd.Uint32()) & byte(i>>10)
	}
	// Probabilities that fall by the golden ratio make the longest codes, for
	// symbols and for distances.
	m["fibonacci"], m["far"] = make([]byte, n), make([]byte, n)
	for i := range n {
		m["fibonacci"][i] = byte(rnd.ExpFloat64() / 0.48)
	}
	copy(m["far"], m["noise"][:n/8])
	for i := n / 8; i < n; {
		back := min(1+int(math.Exp2(rnd.ExpFloat64()*4)), i, 32<<10)
		i += copy(m["far"][i:min(n, i+3+rnd.IntN(6))], m["far"][i-back:i])
		if i < n {
			m["far"][i] = byte(rnd.Uint32())
			i++
		}
	}
	for len(m["words"]) < n {
		m["words"] = fmt.Appendf(m["words"], "%d and %x, ", rnd.IntN(1000), rnd.IntN(64))
	}
	m["words"] = m["words"][:n]
	return m
}

func TestInflate(t *testing.T) {
	f := new(inflater)
	for _, n := range []int{1, 7, 512, 4096, 65536, 300000} {
		for name, want := range texts(n) {
			for _, level := range []int{-2, 0, 1, 5, 9} {
				var b bytes.Buffer
				w, err := stdflate.NewWriter(&b, level)
				if err != nil {
					t.Fatal(err)
				}
				w.Write(want)
				w.Close()
				got := make([]byte, n)
				for _, tail := range []string{"", "what follows", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"} {
					if err := f.inflate(got, append(b.Bytes(), tail...)); err != nil || !bytes.Equal(got, want) {
						t.Fatalf("%s, %d bytes, level %d: %v", name, n, level, err)
					}
				}
				if err := f.inflate(make([]byte, n+1), b.Bytes()); err == nil {
					t.Fatalf("%s, %d bytes, level %d: gave more than there is", name, n, level)
				}
				half := b.Bytes()[:b.Len()/2]
				_, stdErr := io.ReadFull(stdflate.NewReader(bytes.NewReader(half)), got)
				if err := f.inflate(got, half); err == nil && stdErr != nil && !errors.Is(stdErr, io.ErrUnexpectedEOF) || err != nil && stdErr == nil {
					t.Fatalf("%s, %d bytes, level %d: half of it: %v, the library says %v", name, n, level, err, stdErr)
				}
			}
		}
	}
}

// FuzzInflate compares with the decoder of the standard library.
func FuzzInflate(f *testing.F) {
	for _, p := range texts(300) {
		for _, level := range []int{0, 1, 9, -2} {
			var b bytes.Buffer
			w, err := stdflate.NewWriter(&b, level)
			if err != nil {
				f.Fatal(err)
			}
			w.Write(p)
			w.Close()
			f.Add(b.Bytes(), uint16(300))
		}
	}
	d := new(inflater)
	f.Fuzz(func(t *testing.T, b []byte, n uint16) {
		want, got := make([]byte, n), make([]byte, n)
		read, stdErr := io.ReadFull(stdflate.NewReader(bytes.NewReader(b)), want)
		err := d.inflate(got, b)
		// The library wants as many bits as the end of the block has, for any
		// symbol; so near the end of its input it gives up earlier.
		if err == nil && errors.Is(stdErr, io.ErrUnexpectedEOF) {
			stdErr = nil
		}
		if (err == nil) != (stdErr == nil) {
			t.Fatalf("ours: %v, the library's after %d bytes: %v", err, read, stdErr)
		}
		if !bytes.Equal(got[:read], want[:read]) {
			t.Fatalf("the first %d bytes differ", read)
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	for name, p := range texts(65536) {
		src := deflate(b, p)
		got := make([]byte, len(p))
		b.Run(name+"/ours", func(b *testing.B) {
			f := new(inflater)
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if err := f.inflate(got, src); err != nil {
					b.Fatal(err)
				}
			}
		})
		for other, r := range map[string]io.Reader{"std": stdflate.NewReader(nil), "klauspost": flate.NewReader(nil)} {
			b.Run(name+"/"+other, func(b *testing.B) {
				b.SetBytes(int64(len(p)))
				for b.Loop() {
					r.(flate.Resetter).Reset(bytes.NewReader(src), nil)
					if _, err := io.ReadFull(r, got); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
