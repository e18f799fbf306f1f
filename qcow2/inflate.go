package qcow2

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// An inflater decodes raw deflate data (RFC 1951) of which all is in memory.
// That alone makes it faster than a decoder of streams: the output is its own
// window, and input is taken eight bytes at a time.
type inflater struct {
	lit  [litTable]uint32
	dist [distTable]uint32
	lens [288 + 32]uint8
}

// Codes are looked up by their first litBits or distBits bits; longer ones
// have a table of their own for the rest, behind the first. The sizes are the
// most that complete codes of 288 and 32 symbols of 15 bits can need.
const (
	litBits   = 11
	litTable  = 2342
	distBits  = 8
	distTable = 402
	preBits   = 7
)

// An entry of a table has the number of bits that it consumes in bits 0 to 7,
// of extra bits in bits 8 to 15, and a value in bits 16 to 28: a literal, the
// base of a length or distance, or where a further table begins, the extra
// bits being those of its index. 0 is no code.
const (
	isLiteral = 1 << 31
	isEnd     = 1 << 30
	isTable   = 1 << 29
	valueMask = 0x1fff
)

var (
	errDeflate = errors.New("invalid deflate data")
	errShort   = errors.New("the deflate data ends too early")
)

var (
	lengthBase  = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthExtra = [29]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	preOrder    = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
)

// input is the source as a queue of bits, the next one lowest.
type input struct {
	src  []byte
	pos  int
	bits uint64
	n    uint // valid bits
}

// refill makes at least 56 bits valid, or all that there are.
func (in *input) refill() {
	if in.pos+8 <= len(in.src) {
		in.bits |= binary.LittleEndian.Uint64(in.src[in.pos:]) << in.n
		in.pos += int(63-in.n) >> 3
		in.n |= 56
		return
	}
	for in.n <= 55 && in.pos < len(in.src) {
		in.bits |= uint64(in.src[in.pos]) << in.n
		in.pos++
		in.n += 8
	}
}

// take returns the next n bits, at most 16.
func (in *input) take(n uint) (uint, error) {
	if in.n < n {
		if in.refill(); in.n < n {
			return 0, errShort
		}
	}
	v := uint(in.bits & (1<<n - 1))
	in.bits >>= n
	in.n -= n
	return v, nil
}

// inflate fills dst from src. It does not mind what follows.
func (f *inflater) inflate(dst, src []byte) error {
	in := input{src: src}
	for out := 0; out < len(dst); {
		h, err := in.take(3)
		if err != nil {
			return err
		}
		switch h >> 1 {
		case 0:
			out, err = in.stored(dst, out)
		case 1:
			f.fixed()
			out, err = f.block(dst, out, &in)
		case 2:
			if err = f.dynamic(&in); err == nil {
				out, err = f.block(dst, out, &in)
			}
		default:
			err = errDeflate
		}
		if err != nil {
			return err
		}
		if h&1 != 0 && out < len(dst) {
			return errShort
		}
	}
	return nil
}

// stored copies a block that is not compressed.
func (in *input) stored(dst []byte, out int) (int, error) {
	in.pos -= int(in.n >> 3) // give back whole bytes
	in.bits, in.n = 0, 0
	if in.pos+4 > len(in.src) {
		return out, errShort
	}
	n := int(binary.LittleEndian.Uint16(in.src[in.pos:]))
	if n^0xffff != int(binary.LittleEndian.Uint16(in.src[in.pos+2:])) {
		return out, errDeflate
	}
	in.pos += 4
	copied := copy(dst[out:], in.src[in.pos:min(in.pos+n, len(in.src))])
	in.pos += copied
	if copied < n && out+copied < len(dst) {
		return out, errShort
	}
	return out + copied, nil
}

// fixed makes the tables of blocks with the codes that the format fixes.
func (f *inflater) fixed() {
	for i := range 288 {
		switch {
		case i < 144:
			f.lens[i] = 8
		case i < 256:
			f.lens[i] = 9
		case i < 280:
			f.lens[i] = 7
		default:
			f.lens[i] = 8
		}
	}
	for i := range 32 {
		f.lens[288+i] = 5
	}
	// Both are complete, so this cannot fail.
	_ = makeTable(f.lit[:], litBits, f.lens[:288], litEntry)
	_ = makeTable(f.dist[:], distBits, f.lens[288:], distEntry)
}

// dynamic reads the codes of a block and makes their tables.
func (f *inflater) dynamic(in *input) error {
	counts, err := in.take(14)
	if err != nil {
		return err
	}
	lits, dists, pres := int(counts&31)+257, int(counts>>5&31)+1, int(counts>>10)+4
	if lits > 286 || dists > 30 {
		return errDeflate
	}
	var preLens [19]uint8
	for i := range pres {
		n, err := in.take(3)
		if err != nil {
			return err
		}
		preLens[preOrder[i]] = uint8(n)
	}
	var pre [1 << preBits]uint32
	if err := makeTable(pre[:], preBits, preLens[:], func(sym int) uint32 { return isLiteral | uint32(sym)<<16 }); err != nil {
		return err
	}
	for i := 0; i < lits+dists; {
		in.refill()
		e := pre[in.bits&(1<<preBits-1)]
		if e == 0 {
			return errDeflate
		}
		if _, err := in.take(uint(e & 0xff)); err != nil {
			return err
		}
		sym := e >> 16 & valueMask
		if sym < 16 {
			f.lens[i] = uint8(sym)
			i++
			continue
		}
		var length uint8
		bits, base := uint(2), uint(3)
		switch sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			length = f.lens[i-1]
		case 17:
			bits = 3
		default:
			bits, base = 7, 11
		}
		n, err := in.take(bits)
		if err != nil {
			return err
		}
		if n += base; i+int(n) > lits+dists {
			return errDeflate
		}
		for ; n > 0; n-- {
			f.lens[i] = length
			i++
		}
	}
	if err := makeTable(f.lit[:], litBits, f.lens[:lits], litEntry); err != nil {
		return err
	}
	return makeTable(f.dist[:], distBits, f.lens[lits:lits+dists], distEntry)
}

// litEntry returns the entry of a literal, length or end, 0 if there is no
// such symbol.
func litEntry(sym int) uint32 {
	switch {
	case sym < 256:
		return isLiteral | uint32(sym)<<16
	case sym == 256:
		return isEnd
	case sym-257 < len(lengthBase):
		return uint32(lengthBase[sym-257])<<16 | uint32(lengthExtra[sym-257])<<8
	}
	return 0
}

// distEntry returns the entry of a distance. Its value is what the base has
// before the extra bits; the base of 24,577 does not fit.
func distEntry(sym int) uint32 {
	switch {
	case sym < 4:
		return uint32(sym)<<16 | isLiteral
	case sym < 30:
		return uint32(2|sym&1)<<16 | uint32(sym/2-1)<<8 | isLiteral
	}
	return 0
}

// makeTable makes a table of codes whose symbols have the given lengths. The
// code has to be complete; one symbol of one bit, or none at all, is allowed.
func makeTable(table []uint32, tableBits uint, lens []uint8, entry func(sym int) uint32) error {
	var count, next [16]uint32
	for _, n := range lens {
		count[n]++
	}
	unused := int(count[0])
	count[0] = 0
	code, left, longest := uint32(0), int32(1), uint(0)
	for n := uint(1); n < 16; n++ {
		code = (code + count[n-1]) << 1
		next[n] = code
		if left = left<<1 - int32(count[n]); left < 0 {
			return errDeflate
		}
		if count[n] > 0 {
			longest = n
		}
	}
	if left > 0 && longest != 1 && unused < len(lens) {
		return errDeflate
	}
	root := table[:1<<tableBits]
	clear(root)
	var codes [288]uint16 // as they come in the input
	for sym, n := range lens {
		if n == 0 {
			continue
		}
		codes[sym] = bits.Reverse16(uint16(next[n])) >> (16 - n)
		next[n]++
		if uint(n) > tableBits {
			// Note how many bits the longest code needs that begins alike.
			first := &root[codes[sym]&(1<<tableBits-1)]
			*first = max(*first, uint32(n)-uint32(tableBits))
		}
	}
	free := len(root) // where the next further table begins
	for sym, n8 := range lens {
		n, code := uint(n8), uint(codes[sym])
		if n == 0 {
			continue
		}
		part, bits := root, tableBits
		if n > tableBits {
			first := &root[code&(1<<tableBits-1)]
			if *first&isTable == 0 {
				if free+1<<*first > len(table) {
					return errDeflate // cannot be, of a complete code
				}
				sub := *first
				*first = isTable | uint32(free)<<16 | sub<<8 | uint32(tableBits)
				clear(table[free : free+1<<sub])
				free += 1 << sub
			}
			bits = uint(*first >> 8 & 0xff)
			part = table[*first>>16&valueMask:][:1<<bits]
			n, code = n-tableBits, code>>tableBits
		}
		e := entry(sym)
		if e != 0 {
			e |= uint32(n)
		}
		for i := code; i < 1<<bits; i += 1 << n {
			part[i] = e
		}
	}
	return nil
}

// What the fast loop wants to be left of source and destination: two refills,
// and the longest match with what is copied beyond it.
const (
	fastSrc = 16
	fastDst = 3 + 258 + 8
)

// fast decodes symbols while there is plenty of source and destination, and
// reports whether the block ended. It is block without what can be left out
// then, and with its state in registers.
func (f *inflater) fast(dst []byte, out int, in *input) (_ int, end bool, err error) {
	src, pos, bits, n := in.src, in.pos, in.bits, in.n
	for pos+fastSrc <= len(src) && out+fastDst <= len(dst) {
		bits |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
		pos += int(63-n) >> 3
		n |= 56

		e := f.lit[bits&(1<<litBits-1)]
		if e&isLiteral != 0 {
			// Three that are in the first table have at most 33 bits.
			bits >>= e & 63
			n -= uint(e & 63)
			dst[out] = byte(e >> 16)
			out++
			if e = f.lit[bits&(1<<litBits-1)]; e&isLiteral != 0 {
				bits >>= e & 63
				n -= uint(e & 63)
				dst[out] = byte(e >> 16)
				out++
				if e = f.lit[bits&(1<<litBits-1)]; e&isLiteral != 0 {
					bits >>= e & 63
					n -= uint(e & 63)
					dst[out] = byte(e >> 16)
					out++
					continue
				}
			}
			bits |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
			pos += int(63-n) >> 3
			n |= 56
		}
		if e&isTable != 0 {
			bits >>= litBits
			n -= litBits
			e = f.lit[e>>16&valueMask+uint32(bits)&(1<<(e>>8&31)-1)]
			if e&isLiteral != 0 {
				bits >>= e & 63
				n -= uint(e & 63)
				dst[out] = byte(e >> 16)
				out++
				continue
			}
		}
		if e == 0 {
			return out, false, errDeflate
		}
		bits >>= e & 63
		n -= uint(e & 63)
		if e&isEnd != 0 {
			end = true
			break
		}
		extra := uint(e >> 8 & 31)
		length := int(e>>16&valueMask) + int(bits&(1<<extra-1))
		bits >>= extra
		n -= extra

		if e = f.dist[bits&(1<<distBits-1)]; e&isTable != 0 {
			bits >>= distBits
			n -= distBits
			e = f.dist[e>>16&valueMask+uint32(bits)&(1<<(e>>8&31)-1)]
		}
		if e == 0 {
			return out, false, errDeflate
		}
		bits >>= e & 63
		n -= uint(e & 63)
		extra = uint(e >> 8 & 31)
		dist := int(e>>16&valueMask)<<extra + 1 + int(bits&(1<<extra-1))
		bits >>= extra
		n -= extra
		if dist > out {
			return out, false, errDeflate
		}
		if dist < 8 {
			out = repeat(dst, out, dist, length)
			continue
		}
		to := out + length
		for from := out - dist; out < to; from, out = from+8, out+8 {
			binary.LittleEndian.PutUint64(dst[out:], binary.LittleEndian.Uint64(dst[from:]))
		}
		out = to
	}
	in.pos, in.bits, in.n = pos, bits, n
	return out, end, nil
}

// block decodes the symbols of a block until it ends or dst is full.
func (f *inflater) block(dst []byte, out int, in *input) (int, error) {
	out, end, err := f.fast(dst, out, in)
	if end || err != nil {
		return out, err
	}
	for {
		in.refill() // 56 bits are enough for one of everything: 15+5+15+13
		e := f.lit[in.bits&(1<<litBits-1)]
		if e&isTable != 0 {
			in.drop(e)
			e = f.lit[e>>16&valueMask+uint32(in.bits)&(1<<(e>>8&0xff)-1)]
		}
		if e&isLiteral != 0 {
			if in.drop(e); in.n > maxBits {
				return out, errShort
			}
			dst[out] = byte(e >> 16)
			if out++; out == len(dst) {
				return out, nil
			}
			continue
		}
		if e == 0 {
			return out, f.none(in)
		}
		in.drop(e)
		if e&isEnd != 0 {
			if in.n > maxBits {
				return out, errShort
			}
			return out, nil
		}
		length := int(e>>16&valueMask) + in.extra(e)

		e = f.dist[in.bits&(1<<distBits-1)]
		if e&isTable != 0 {
			in.drop(e)
			e = f.dist[e>>16&valueMask+uint32(in.bits)&(1<<(e>>8&0xff)-1)]
		}
		if e == 0 {
			return out, f.none(in)
		}
		in.drop(e)
		dist := int(e>>16&valueMask)<<(e>>8&0xff) + 1
		dist += in.extra(e)
		switch {
		case in.n > maxBits:
			return out, errShort
		case dist > out:
			return out, errDeflate
		}
		if out = repeat(dst, out, dist, length); out == len(dst) {
			return out, nil
		}
	}
}

// maxBits is exceeded by input.n when more was consumed than there is.
const maxBits = 64

// drop consumes the code of an entry, extra its extra bits.
func (in *input) drop(e uint32) {
	in.bits >>= e & 0xff
	in.n -= uint(e & 0xff)
}

func (in *input) extra(e uint32) int {
	n := e >> 8 & 0xff
	v := in.bits & (1<<n - 1)
	in.bits >>= n
	in.n -= uint(n)
	return int(v)
}

// none says why there is no code.
func (f *inflater) none(in *input) error {
	if in.n < 15 && in.pos >= len(in.src) || in.n > maxBits {
		return errShort
	}
	return errDeflate
}

// repeat appends n bytes, or as many as fit, from dist bytes back.
func repeat(dst []byte, out, dist, n int) int {
	end := min(out+n, len(dst))
	for out < end {
		// What was repeated can be repeated in turn.
		out += copy(dst[out:end], dst[out-dist:out])
		dist *= 2
	}
	return end
}
