package imagetest

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/imgnbd/imgnbd/image"
)

// A history is what happens to a disk: batches one after the other, the
// operations of a batch all at once.
type history []batch

type batch []op

type op struct {
	kind   string // read try write zero discard extents flush reopen
	off, n int64
	flags  image.WriteFlags
	id     uint64 // of the data of a write; 0 writes zeros
}

// mutates reports whether o may change bytes.
func (o op) mutates() bool { return o.kind == "write" || o.kind == "zero" || o.kind == "discard" }

// generate makes a history. It depends on nothing but its arguments.
func generate(seed uint64, size, cluster int64, steps int) history {
	g := generator{rand.New(rand.NewPCG(seed, 0x696d67)), size, cluster, 0}
	h := make(history, steps)
	for i := range h {
		h[i] = g.batch()
	}
	return h
}

type generator struct {
	*rand.Rand
	size, cluster int64
	id            uint64
}

func (g *generator) batch() batch {
	switch r := g.IntN(100); {
	case r < 2:
		return batch{{kind: "reopen"}}
	case r < 5:
		return batch{{kind: "flush"}}
	case r < 40:
		off, n := g.span()
		return batch{g.op(off, n)}
	case r < 80:
		return g.disjoint()
	default:
		b := make(batch, 2+g.IntN(6))
		for i := range b {
			off, n := g.span()
			b[i] = g.op(off, n)
		}
		return b
	}
}

// disjoint cuts a few clusters in pieces and gives each to an operation of its
// own: they share clusters, and not a byte.
func (g *generator) disjoint() (b batch) {
	off := g.Int64N((g.size+g.cluster-1)/g.cluster) * g.cluster
	end := min(off+g.cluster*(1+g.Int64N(3)), g.size)
	piece := max((end-off)/(2+g.Int64N(8)), 1)
	for off < end && len(b) < 12 {
		n := min(1+g.Int64N(2*piece), end-off)
		if g.IntN(3) == 0 {
			n = min(max(n&^511, 512), end-off) // sectors meet where bytes do not
		}
		b = append(b, g.op(off, n))
		off += n
	}
	if g.IntN(4) == 0 {
		b = append(b, op{kind: "flush"})
	}
	return b
}

// span picks a range, most of the time one that begins or ends near a border.
func (g *generator) span() (off, n int64) {
	off = g.Int64N(g.size)
	if g.IntN(3) > 0 {
		off -= off % g.cluster
		if g.IntN(2) == 0 {
			off += g.Int64N(1025) - 512
		}
	}
	switch g.IntN(5) {
	case 0:
		n = 1 + g.Int64N(512)
	case 1:
		n = 512 * (1 + g.Int64N(16))
	case 2:
		n = g.cluster
	case 3:
		n = 1 + g.Int64N(2*g.cluster)
	case 4:
		n = g.cluster*(1+g.Int64N(4)) + g.Int64N(3) - 1
	}
	off = min(max(off, 0), g.size-1)
	return off, min(n, g.size-off)
}

func (g *generator) op(off, n int64) op {
	o := op{off: off, n: n}
	switch r := g.IntN(100); {
	case r < 45:
		o.kind = "write"
		if g.IntN(10) > 0 { // else of zeros
			g.id++
			o.id = g.id
		}
	case r < 60:
		o.kind = "zero"
	case r < 70:
		o.kind = "discard"
	case r < 85:
		o.kind = "read"
	case r < 90:
		o.kind = "try"
	default:
		o.kind = "extents"
	}
	if o.kind == "write" || o.kind == "zero" {
		if g.IntN(8) == 0 {
			o.flags |= image.FUA
		}
	}
	if o.kind == "zero" {
		if g.IntN(2) == 0 {
			o.flags |= image.MayUnmap
		}
		if g.IntN(6) == 0 {
			o.flags |= image.FastOnly
		}
	}
	return o
}

func (h history) ops() (n int) {
	for _, b := range h {
		n += len(b)
	}
	return n
}

// String writes one batch a line, such as
//
//	write 0x200+512 id=7 fua | zero 0+65536 unmap
func (h history) String() string {
	var s strings.Builder
	for _, b := range h {
		for i, o := range b {
			if i > 0 {
				s.WriteString(" | ")
			}
			s.WriteString(o.String())
		}
		s.WriteByte('\n')
	}
	return s.String()
}

var flagNames = []struct {
	flag image.WriteFlags
	name string
}{{image.FUA, "fua"}, {image.MayUnmap, "unmap"}, {image.FastOnly, "fast"}}

func (o op) String() string {
	if o.kind == "flush" || o.kind == "reopen" {
		return o.kind
	}
	s := fmt.Sprintf("%s %#x+%d", o.kind, o.off, o.n)
	if o.kind == "write" {
		s += fmt.Sprintf(" id=%d", o.id)
	}
	for _, f := range flagNames {
		if o.flags&f.flag != 0 {
			s += " " + f.name
		}
	}
	return s
}
