package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
)

// logger returns what the server logs to: messages like all others. Without
// verbose only what needs attention is said.
func (u *ui) logger(verbose bool) *slog.Logger {
	h := &logHandler{ui: u, level: slog.LevelWarn}
	if verbose {
		h.level = slog.LevelDebug
	}
	return slog.New(h)
}

type logHandler struct {
	ui    *ui
	level slog.Level
	attrs string // of WithAttrs, as text
}

func (h *logHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	if r.Level >= slog.LevelWarn {
		b.WriteString("warning: ")
	}
	b.WriteString(r.Message)
	b.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(attrText(a))
		return true
	})
	h.ui.message(b.String())
	return nil
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	for _, a := range attrs {
		n.attrs += attrText(a)
	}
	return &n
}

func (h *logHandler) WithGroup(string) slog.Handler { return h }

// attrText quotes what a client may have chosen, and keeps a record on its line.
func attrText(a slog.Attr) string {
	switch v := a.Value.Any().(type) {
	case string:
		return fmt.Sprintf(", %s %q", a.Key, v)
	case nil:
		return ""
	case *net.UnixAddr:
		if v.Name == "" || v.Name == "@" { // clients seldom have one
			return ""
		}
		return fmt.Sprintf(", %s %q", a.Key, v.Name)
	default:
		return fmt.Sprintf(", %s %s", a.Key, printable(fmt.Sprint(v)))
	}
}
