package qcow2

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/imgnbd/imgnbd/image"
)

const defaultL2Cache = 32 << 20 // bytes

// Options are the parameters of opening an image, by QEMU's names.
type Options struct {
	// L2CacheSize (l2-cache-size) bounds the memory for L2 tables in bytes.
	// CacheSize (cache-size) bounds it together with that for refcounts, of
	// which reading needs none.
	L2CacheSize, CacheSize int64

	// DataFile (data-file) is opened in place of the external data file that
	// the image names.
	DataFile string
}

// parseOptions turns what the user wrote into Options.
func parseOptions(params []image.Param) (Options, error) {
	o := Options{L2CacheSize: -1, CacheSize: -1}
	for _, p := range params {
		var err error
		switch p.Key {
		case "l2-cache-size":
			o.L2CacheSize, err = parseSize(p.Value)
		case "cache-size":
			o.CacheSize, err = parseSize(p.Value)
		case "data-file", "data-file.filename":
			o.DataFile = p.Value
		default:
			return o, fmt.Errorf("qcow2: unknown option %s", p.Key)
		}
		if err != nil {
			return o, fmt.Errorf("qcow2: %s=%s: %w", p.Key, p.Value, err)
		}
	}
	if o.L2CacheSize >= 0 && o.CacheSize >= 0 && o.L2CacheSize > o.CacheSize {
		return o, fmt.Errorf("l2-cache-size may not exceed cache-size") // QEMU's words
	}
	return o, nil
}

// strictCache bounds the memory for L2 tables where the user has not.
func (o *Options) strictCache() {
	if o.L2CacheSize < 0 && o.CacheSize < 0 {
		o.L2CacheSize = strictL2Cache
	}
}

// l2Budget returns how many bytes of L2 tables may be kept.
func (o *Options) l2Budget() int64 {
	switch {
	case o.L2CacheSize >= 0:
		return o.L2CacheSize
	case o.CacheSize >= 0:
		return o.CacheSize
	}
	return defaultL2Cache
}

// parseSize reads a number of bytes as QEMU takes it: 4096, 16M.
func parseSize(s string) (int64, error) {
	shift := 0
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", s[len(s)-1]|0x20); i >= 0 && s[len(s)-1] > '9' {
			s, shift = s[:len(s)-1], 10*i
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("not a number of bytes")
	}
	return n << shift, nil
}
