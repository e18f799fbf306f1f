package main

import (
	"net"
	"path/filepath"
	"testing"
)

// A server that ends leaves the socket of the one that has begun at the same
// place alone, however close the two are.
func TestSocketOfSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	rounds := 2000
	if testing.Short() {
		rounds = 200
	}
	old, err := listenUnix(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range rounds {
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			old.close()
		}()
		next, err := listenUnix(path, nil)
		<-closed
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		old = next
	}
	old.close()
}
