//go:build linux

package load

import (
	"math/bits"
	"time"
)

// A histogram counts durations in buckets that are 1/32 of their value wide.
type histogram struct {
	counts [64 * buckets]int64
	n      int64
	max    time.Duration
}

const (
	bucketBits = 5
	buckets    = 1 << bucketBits
)

func (h *histogram) add(d time.Duration) {
	v := uint64(max(d, 0))
	shift := max(bits.Len64(v)-bucketBits-1, 0)
	h.counts[shift*buckets+int(v>>shift)]++
	h.n++
	h.max = max(h.max, d)
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.n += o.n
	h.max = max(h.max, o.max)
}

// quantile returns the upper end of the bucket in which the share q is
// reached.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(q * float64(h.n))
	for i, n := range h.counts {
		if rank -= n; n > 0 && rank < 0 {
			shift := max(i/buckets-1, 0)
			return min(time.Duration(i-shift*buckets+1)<<shift-1, h.max)
		}
	}
	return h.max
}
