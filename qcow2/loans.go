package qcow2

import (
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
)

// loans counts the Pins of an image that is written. Whoever holds one may have
// sent replies that refer to pages of the store and were not received yet, so a
// cluster that was freed is not reused before all Pins are released. While one
// waits for that no location is given, so no Pin has to be held for longer than
// it takes what was sent to arrive.
//
// Why none slips through: a Pin is counted before the mapping is looked at, and
// whether clusters wait after it; the committer says that they wait before it
// looks at the count. So either a location is not given, or its Pin is seen. And
// an entry that is found was not removed before, or its cluster waits by now, or
// it waits for the epoch of who found it.
//
// All methods of a nil loans do nothing.
type loans struct {
	out     atomic.Int64
	waiting atomic.Int64 // clusters that were freed and may not be reused yet
	recall  int64        // how many may wait before Pins are wanted back
	over    atomic.Bool  // the image is being closed: nobody writes to it any more
}

// Pin keeps clusters whose location was given from being reused.
func (im *Image) Pin() image.Pin {
	if im.loans == nil {
		return image.Pin{}
	}
	im.loans.out.Add(1)
	return image.NewPin(im.loans, 0)
}

// Unpin is for image.Pin.
func (l *loans) Unpin(uint64) { l.out.Add(-1) }

// Recalled is for image.Pin: clusters that are given up and not reused make the
// file grow.
func (l *loans) Recalled() bool { return l.waiting.Load() > l.recall }

// give reports whether locations are given at present.
func (l *loans) give() bool { return l != nil && l.waiting.Load() == 0 }

// held reports whether what waits has to go on waiting.
func (l *loans) held() bool { return l != nil && l.out.Load() > 0 && !l.over.Load() }

// wait notes that n more clusters wait, or fewer.
func (l *loans) wait(n int64) {
	if l != nil {
		l.waiting.Add(n)
	}
}

// end lets go of what waits. Nobody may write to the image any more.
func (l *loans) end() {
	if l != nil {
		l.over.Store(true)
	}
}
