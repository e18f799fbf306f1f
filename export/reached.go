package export

import (
	"context"
	"log/slog"
)

// A limit is one that clients reach, by number.
type limit int

const (
	limitClients limit = iota
	limitDescriptors
	limitRefused
	limitHandshake
	limitOption
	limitMemory
	limitPayload
	limits // how many there are
)

// limitTexts say what has happened, and how loud that is said for the first
// time. What is only slower for it is not worth a warning.
var limitTexts = [limits]struct {
	text  string
	level slog.Level
}{
	limitClients:     {"times that as many clients were there as are served at once", slog.LevelInfo},
	limitDescriptors: {"connections that could not be accepted", slog.LevelWarn},
	limitRefused:     {"clients that may not come in", slog.LevelWarn},
	limitHandshake:   {"handshakes that took too long", slog.LevelWarn},
	limitOption:      {"clients with too many or too long options", slog.LevelWarn},
	limitMemory:      {"requests served piece by piece, for want of memory", slog.LevelInfo},
	limitPayload:     {"clients cut off for too long a payload", slog.LevelWarn},
}

// A Count is how often a limit was reached.
type Count struct {
	What string
	N    int64
}

// Reached tells how often clients have reached which limit, of those that have
// been reached at all.
func (s *Server) Reached() []Count {
	var list []Count
	for i := range limits {
		if n := s.reachedCounts[i].Load(); n > 0 {
			list = append(list, Count{limitTexts[i].text, n})
		}
	}
	return list
}

// reached counts that a client has reached a limit, and logs it once: who
// reaches limits on purpose must not fill the log.
func (s *Server) reached(l limit, args ...any) {
	if s.reachedCounts[l].Add(1) == 1 {
		s.Log.Log(context.Background(), limitTexts[l].level, "limit reached, told once and counted: "+limitTexts[l].text, args...)
	}
}
