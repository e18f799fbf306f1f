package main

import (
	"context"
	"net/url"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// A failingStore is whatever fails to be synced.
type failingStore struct {
	storage.Store
	opt storage.Options
}

func (failingStore) Info() storage.Info { return storage.Info{ID: "file 1:2"} }

// Whose image fails to be synced knows whose device it is by then or later, and
// hears of it once.
func TestSyncFailureIsNoted(t *testing.T) {
	t.Parallel()
	var s failingStore
	open := func(_ context.Context, _ *url.URL, opt storage.Options) (storage.Store, error) {
		s.opt = opt
		return s, nil
	}
	for _, early := range []bool{false, true} {
		o := &origin{}
		chain := &image.Chain{Protocols: []storage.Protocol{{Name: "file", Open: open}}}
		o.watch(chain)
		if _, err := chain.Protocols[0].Open(context.Background(), &url.URL{Path: "/disk"}, storage.Options{}); err != nil {
			t.Fatal(err)
		}
		noted := 0
		note := func() { noted++ }
		if early {
			s.opt.SyncFailed()
		}
		o.follow(note)
		if noted > 0 != early || o.isLost() != early {
			t.Errorf("noted %d times before anything failed", noted)
		}
		s.opt.SyncFailed() // of another store
		s.opt.SyncFailed()
		if noted != 1 || !o.isLost() {
			t.Errorf("noted %d times", noted)
		}
	}
}
