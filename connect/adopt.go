package connect

import (
	"context"
	"fmt"
)

// FindUntended returns a device whose data passed through a process, to this
// server, that has died; nil if there is none. Where the kernel reaches the
// server by itself, nothing waits for another process.
func FindUntended(ctx context.Context, device, server string) (*Predecessor, error) {
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	return h.findPredecessor(ctx, device, server, false)
}

// Adopt is TakeOver for a device of a server: the Attachment is to be tended.
func (p *Predecessor) Adopt(ctx context.Context, opt Options) (_ *Attachment, err error) {
	if opt.Connections != p.record.Connections {
		return nil, fmt.Errorf("%s had %d connections, not %d", p.Path(), p.record.Connections, opt.Connections)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s does not answer, after %v", p.Path(), patience))
	defer cancel()
	// The kernel has seen the end of the old connections, which was before
	// that of their process, or does now.
	if err := sleep(ctx, settling); err != nil {
		return nil, err
	}
	a := p.attachment(opt)
	c, conns, err := a.look(ctx)
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	if a.lines, err = p.host.watch(conns); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			a.lines.close()
		}
	}()
	if err := a.become(); err != nil {
		return nil, fmt.Errorf("%s: %w", a.Path(), err)
	}
	if err := a.attached(conns...); err != nil {
		return nil, fmt.Errorf("%s: %w", a.Path(), err)
	}
	answer := make(chan error, 1)
	go func() { answer <- p.host.readBlock(p.Path(), int(c.blockSize)) }()
	select {
	case err := <-answer:
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.Path(), err)
		}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	p.record.Away = false
	return a, p.record.write()
}
