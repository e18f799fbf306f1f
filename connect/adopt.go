package connect

import "context"

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
func (p *Predecessor) Adopt(ctx context.Context, opt Options) (*Attachment, error) {
	if err := p.checkConnections(&opt); err != nil {
		return nil, err
	}
	a := p.attachment(opt)
	conns, err := a.succeedDead(ctx)
	if err != nil {
		return nil, err
	}
	if a.lines, err = p.host.watch(conns); err != nil {
		return nil, err
	}
	if err := p.record.update(func(r *Record) { r.Away = false }); err != nil {
		a.lines.close()
		return nil, err
	}
	return a, nil
}
