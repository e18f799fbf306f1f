package export

import (
	"bytes"
	"testing"
)

// TestPackerBounded: a packer copies no more than it has room for, whatever the
// pieces of a reply are, and loses none.
func TestPackerBounded(t *testing.T) {
	var p packer
	var want []byte
	for _, size := range []int{1, packSmall, packSmall + 1, packSmall - 1} {
		reply := &task{}
		for i := range maxRuns {
			part := bytes.Repeat([]byte{byte(i)}, size)
			reply.parts = append(reply.parts, part)
			want = append(want, part...)
		}
		p.take(&taskList{reply, reply})
	}
	var got []byte
	sent := 0
	for p.pack(func(*task) { sent++ }) {
		got = append(got, bytes.Join(p.iov, nil)...)
		p.iov = nil
	}
	same(t, "replies", got, want)
	if sent != 4 {
		t.Errorf("%d replies were sent", sent)
	}
	if n := cap(p.small); n > packCopy {
		t.Errorf("%d bytes are kept", n)
	}
}
