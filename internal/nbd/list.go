package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
)

// A Listed is an export in a server's list. Where the server would not
// describe it, Err says so and only Name and Description may be set.
type Listed struct {
	ExportInfo
	Sized    bool     // the server told BlockSize; otherwise it is the default
	Contexts []string // metadata contexts that it offers
	Err      error
}

// A Listing is what a server offers.
type Listing struct {
	Exports  []Listed
	Protocol Protocol // the newest form that the server speaks
}

// ErrNoList is wrapped by the error of listing the exports of a server too old
// to have a list.
var ErrNoList = errors.New("server does not support export lists")

// List asks the server at the other end of conn for its exports, with the
// information and the metadata contexts of each, and ends the session. Closing
// conn is the caller's.
func List(ctx context.Context, conn net.Conn) (*Listing, error) {
	var l *Listing
	err := bounded(ctx, conn, func() (err error) {
		h := &handshake{conn: conn, protocol: Simple}
		old, err := h.greet()
		if err != nil {
			return err
		}
		if old != nil || !h.fixed {
			return ErrNoList
		}
		if l, err = h.list(); err != nil {
			return h.abort(err)
		}
		return h.send(OptAbort, nil)
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

func (h *handshake) list() (*Listing, error) {
	if err := h.chooseProtocol(Extended); err != nil && !refused(err, RepErrTLSReqd) {
		return nil, err
	}
	exports, err := h.names() // where TLS is required, it is for this too: what the user asked for
	if err != nil {
		return nil, err
	}
	l := &Listing{Exports: exports, Protocol: h.protocol}
	for i := range l.Exports {
		e := &l.Exports[i]
		info, err := h.info(OptInfo, e.Name)
		if isOptionError(err) {
			e.Err = err
			continue
		}
		if err != nil {
			return nil, err
		}
		if info.Description == "" {
			info.Description = e.Description
		}
		e.ExportInfo, e.Sized = *info, h.sized
		contexts, err := h.metaContexts(OptListMetaContext, e.Name, nil)
		if err != nil && !isOptionError(err) {
			return nil, err
		}
		for _, c := range contexts {
			e.Contexts = append(e.Contexts, c.Name)
		}
	}
	return l, nil
}

// names asks for the list of exports; a server may add a description to each.
func (h *handshake) names() ([]Listed, error) {
	if err := h.send(OptList, nil); err != nil {
		return nil, err
	}
	var list []Listed
	for {
		rep, b, err := h.reply(OptList)
		if err != nil {
			return nil, err
		}
		if rep == RepAck {
			return list, nil
		}
		if rep != RepServer || len(b) < 4 || len(list) == maxExports {
			return nil, protocolError("reply %d of %d bytes after %d exports", uint32(rep), len(b), len(list))
		}
		n, b := uint64(binary.BigEndian.Uint32(b)), b[4:]
		if n > MaxString || n > uint64(len(b)) || uint64(len(b))-n > MaxString {
			return nil, protocolError("export name of %d bytes in a reply of %d", n, len(b))
		}
		list = append(list, Listed{ExportInfo: ExportInfo{Name: string(b[:n]), Description: string(b[n:])}})
	}
}
