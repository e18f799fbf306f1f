package qcow2

import (
	"fmt"
	"math"

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
		switch p.Key {
		case "l2-cache-size", "cache-size":
			n, err := p.Size()
			if err != nil {
				return o, err
			}
			*map[string]*int64{"l2-cache-size": &o.L2CacheSize, "cache-size": &o.CacheSize}[p.Key] = int64(min(n, math.MaxInt64))
		case "data-file", "data-file.filename":
			o.DataFile = p.Value
		default:
			return o, p.Unknown("qcow2")
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
