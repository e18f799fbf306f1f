package file

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// A barrier makes durable what was written before it.
//
// The kernel reports a failed write-back once per open file, to whichever sync
// comes first, and may have dropped the data by then. So syncs run one at a
// time, else one could miss the failure that another was told of; and after a
// failure every later one fails. Callers that wait meanwhile share the next
// one.
type barrier struct {
	failed func() // called when one has failed; nil: nobody wants to know
	begun  atomic.Uint64

	mu  sync.Mutex // held across the system call
	err error      // of the one that failed
}

func (b *barrier) sync(datasync func() error) error {
	before := b.begun.Load()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return b.err
	}
	if b.begun.Load() > before {
		return nil // one began after our call, and has ended well
	}
	b.begun.Add(1)
	if err := retry(datasync); err != nil {
		b.err = fmt.Errorf("what was written since the last flush may be lost, and no flush succeeds until the image is opened again: %w", err)
		if b.failed != nil {
			b.failed()
		}
	}
	return b.err
}
