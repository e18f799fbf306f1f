package export

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"
)

// A Handed connection was left by one Server at the boundary of a request, to
// be resumed by another, perhaps in another process.
type Handed struct {
	Conn  net.Conn
	Input []byte // has arrived, and begins with a request
}

// errHanded is the end of a session that leaves its connection open.
var errHanded = errors.New("handed over")

// HandOver ends the server as Shutdown does, but leaves open the connections of
// clients that have agreed on simple replies, in the clear: the kernel's are
// such. All that was accepted from them is done, answered and flushed. If that
// fails for one, all are closed.
func (s *Server) HandOver(ctx context.Context) ([]Handed, error) {
	s.init()
	s.mu.Lock()
	for ses := range s.sessions {
		ses.handing.Store(true)
	}
	s.mu.Unlock()
	err := s.Shutdown(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	handed := s.handed
	s.handed = nil
	for _, h := range handed {
		err = errors.Join(err, h.Conn.SetReadDeadline(time.Time{})) // by which sessions were stopped
	}
	if err != nil {
		for _, h := range handed {
			h.Conn.Close()
		}
		return nil, err
	}
	return handed, nil
}

// Resume goes on with a connection as if its client had agreed on e here, and
// returns once ConnState has been told. What goes wrong is logged.
func (s *Server) Resume(h Handed, e *Export) error {
	s.init()
	if len(h.Input) > lineInput {
		return fmt.Errorf("%d bytes have arrived and were not served, the limit is %d", len(h.Input), lineInput)
	}
	ses, err := s.admit(h.Conn, false)
	if err != nil {
		return err
	}
	if !s.enter(e) {
		s.leave(ses)
		return fmt.Errorf("export '%s' has too many clients", e.Name)
	}
	n := negotiation{exporter: ses}
	ses.resumed = &agreement{name: e.Name, export: e, size: e.size(), flags: n.flags(e, false)}
	ses.line.early = h.Input
	ses.run(func(error) {})
	return nil
}

// mayHandOver reports whether the connection of a session can go on elsewhere
// knowing only its export.
func (s *session) mayHandOver() bool {
	return s.handing.Load() && !s.structured && s.channel == s.conn && len(s.contexts) == 0
}

// boundary returns errHanded where a request ends and the connection is handed
// over from there.
func (s *session) boundary() error {
	if s.mayHandOver() {
		return errHanded
	}
	return nil
}

// receive reads in the midst of a request, which is finished whatever else is
// to happen.
func (s *session) receive(a, b []byte) (int, error) {
	s.stopFetching()
	n, err := s.out.t.read(a, b)
	if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || !s.mayHandOver() {
		return n, err
	}
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, err
	}
	return s.out.t.read(a, b)
}

// leaveOpen ends transmission for errHanded.
func (s *session) leaveOpen() error {
	l := &s.line
	h := Handed{s.conn, slices.Clone(l.in[l.r:l.w])}
	s.srv.mu.Lock()
	defer s.srv.mu.Unlock()
	s.srv.handed = append(s.srv.handed, h)
	return errHanded
}
