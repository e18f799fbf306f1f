package export

import (
	"encoding/binary"
	"errors"
	"math"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
)

// contexts returns all that e offers, in the order and under the numbers that
// qemu-nbd gives them.
func (e *Export) contexts() []metaContext {
	all := []metaContext{{0, allocation{e.Device}}}
	if e.AllocationDepth {
		all = append(all, metaContext{1, depth{e.Device}})
	}
	for i, c := range e.Contexts {
		all = append(all, metaContext{uint32(2 + i), c})
	}
	return all
}

// allocation is base:allocation.
type allocation struct{ dev image.Device }

func (allocation) Name() string { return nbd.ContextBaseAllocation }

func (a allocation) AppendStatus(dst []Status, off, n int64) ([]Status, error) {
	return appendStatus(dst, a.dev, off, n, image.WantZero, func(e image.Extent) (flags uint64) {
		if !e.Data {
			flags |= nbd.StateHole
		}
		if e.Zero {
			flags |= nbd.StateZero
		}
		return flags
	})
}

// depth is qemu:allocation-depth: the layer that holds the bytes, counted
// from 1, or 0 if none does.
type depth struct{ dev image.Device }

func (depth) Name() string { return nbd.ContextAllocationDepth }

func (d depth) AppendStatus(dst []Status, off, n int64) ([]Status, error) {
	return appendStatus(dst, d.dev, off, n, image.WantAllocated, func(e image.Extent) uint64 {
		if !e.Allocated {
			return 0
		}
		return uint64(e.Depth) + 1
	})
}

func appendStatus(dst []Status, dev image.Device, off, n int64, want image.Want, flags func(image.Extent) uint64) ([]Status, error) {
	extents, err := dev.AppendExtents(nil, off, n, want)
	if err != nil {
		return dst, err
	}
	for _, e := range extents {
		dst = append(dst, Status{e.Length, flags(e)})
	}
	return dst, nil
}

const (
	// maxStatus bounds the runs of one context in one reply. It may end
	// early; the client asks again.
	maxStatus = 16 << 10
	// scarceStatus is the same when memory is used up.
	scarceStatus = 16
	// maxStatusCalls bounds the questions that one request puts to a context.
	// Contexts coalesce badly, and may answer one small run at a time.
	maxStatusCalls = 16 << 10
)

// appendRuns appends the description of [off, off+n) in c, runs of the same
// flags joined, so many at most; there is always at least one.
func (c metaContext) appendRuns(dst []Status, off, n int64, limit int) ([]Status, error) {
	first := len(dst)
	var answer []Status
	for range maxStatusCalls {
		var err error
		if answer, err = c.AppendStatus(answer[:0], off, n); err != nil {
			if len(dst) > first {
				return dst, nil // the next request will begin here and hear of it
			}
			return dst, err
		}
		if len(answer) == 0 {
			return dst, errNoStatus
		}
		for _, s := range answer {
			if last := len(dst) - 1; last >= first && dst[last].Flags == s.Flags {
				dst[last].Length += s.Length
			} else if len(dst)-first == limit {
				return dst, nil
			} else {
				dst = append(dst, s)
			}
			off += s.Length
			n -= s.Length
		}
		if n <= 0 {
			break
		}
	}
	return dst, nil
}

var errNoStatus = errors.New("context gives no answer")

// appendStatusPayload encodes runs as the payload of a block status chunk.
func appendStatusPayload(dst []byte, id uint32, runs []Status, extended bool) []byte {
	dst = binary.BigEndian.AppendUint32(dst, id)
	if extended {
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(runs)))
		for _, s := range runs {
			dst = binary.BigEndian.AppendUint64(dst, uint64(s.Length))
			dst = binary.BigEndian.AppendUint64(dst, s.Flags)
		}
		return dst
	}
	for _, s := range runs {
		// Not beyond the request, whose length had 32 bits.
		dst = binary.BigEndian.AppendUint32(dst, uint32(min(s.Length, math.MaxUint32)))
		dst = binary.BigEndian.AppendUint32(dst, uint32(s.Flags))
	}
	return dst
}
