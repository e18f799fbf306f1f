package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/storage"
)

func checkFixedSize(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if !m.s.Info().FixedSize {
		return
	}
	const size = 64 * kib
	p := random(1000)
	for _, off := range []int64{size, size + 1, size + 1<<40} {
		m.fail("WriteAt past the end", m.s.WriteAt(p, off, 0), syscall.ENOSPC)
		m.fail("WriteZeroes past the end", m.s.WriteZeroes(off, 1000, 0), syscall.ENOSPC)
		m.fail("WriteZeroes past the end", m.s.WriteZeroes(off, 1000, storage.MayUnmap), syscall.ENOSPC)
	}
	// Across the end, the part before it may be done.
	m.fail("WriteAt across the end", m.s.WriteAt(p, size-10, 0), syscall.ENOSPC)
	m.fail("WriteZeroes across the end", m.s.WriteZeroes(size-10, 1000, 0), syscall.ENOSPC)
	m.write(random(10), size-10, 0)
	m.pass(m.s.Truncate(size))
	m.fail("Truncate to more", m.s.Truncate(size+512), errors.ErrUnsupported)
	m.fail("Truncate to less", m.s.Truncate(size-512), errors.ErrUnsupported)
	m.verify("what must not change the size")
}

func checkTruncate(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if m.s.Info().FixedSize {
		return // it cannot grow
	}
	for _, size := range []int64{64 * kib, 64*kib - 1, 70001, 5001, 5000, 9000, 513, 4096, 0, 1, 64 * kib} {
		m.pass(m.s.Truncate(size))
		m.want = m.want[:min(size, int64(len(m.want)))]
		m.grow(size)
		m.verify(fmt.Sprintf("Truncate to %d", size))
		if size > 600 { // so that the next one has something to cut
			m.write(random(500), size-500, 0)
		}
	}
}

var zeroFlags = []storage.WriteFlags{
	0, storage.MayUnmap, storage.FUA, storage.FUA | storage.MayUnmap,
	storage.FastOnly, storage.FastOnly | storage.MayUnmap, storage.FastOnly | storage.FUA,
}

func checkWriteZeroes(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	data := random(2 * mib)
	for i, r := range spans(140) {
		flags := zeroFlags[i%len(zeroFlags)]
		err := m.s.WriteZeroes(r.off, r.n, flags)
		switch {
		case err == nil:
			m.zero(r.off, r.n)
		case flags&storage.FastOnly == 0 || !errors.Is(err, errors.ErrUnsupported):
			t.Fatalf("WriteZeroes of %d at %d, flags %d: %v", r.n, r.off, flags, err)
		}
		p := make([]byte, r.n)
		if _, err := m.s.ReadAt(p, r.off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if j := firstDifference(p, m.want[r.off:r.off+r.n]); j >= 0 {
			t.Fatalf("after WriteZeroes of %d at %d, flags %d, error %v: byte %d is %#x, want %#x",
				r.n, r.off, flags, err, r.off+int64(j), p[j], m.want[r.off+int64(j)])
		}
		if i%7 == 6 {
			m.verify("WriteZeroes")
			m.write(bytes.Clone(data[i:i+300000]), 12345, 0)
			m.write(bytes.Clone(data[i:i+500000]), 500000, 0)
		}
	}
	m.pass(m.s.Sync())
	m.verify("WriteZeroes")
}

func checkWriteZeroesGrows(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	if m.s.Info().FixedSize {
		return // it cannot grow
	}
	for i, step := range []struct{ back, n int64 }{
		{0, 4096}, {10, 4096}, {0, 1}, {511, 513}, {-1000, 3}, {-5000, 50000}, {64 * kib, 64*kib + 1},
	} {
		for _, flags := range zeroFlags {
			off := int64(len(m.want)) - step.back
			err := m.s.WriteZeroes(off, step.n, flags)
			switch {
			case err == nil:
				m.zero(off, step.n)
			case flags&storage.FastOnly == 0 || !errors.Is(err, errors.ErrUnsupported):
				t.Fatalf("WriteZeroes past the end, flags %d: %v", flags, err)
			}
			m.verify(fmt.Sprintf("WriteZeroes of %d past the end, flags %d, error %v", step.n, flags, err))
			m.write(random(777), int64(len(m.want)-i), 0)
		}
	}
}

func checkDiscard(t testing.TB, target Target) {
	m := newModel(t, target, mib)
	for i, r := range spans(100) {
		n := r.n
		if i%10 == 0 {
			n = 2 * mib // past the end
		}
		m.pass(m.s.Discard(r.off, n))
		end := min(r.off+n, mib)
		p := make([]byte, end-r.off)
		if k, err := m.s.ReadAt(p, r.off); k != len(p) {
			t.Fatal(err)
		}
		for j, b := range p {
			if at := r.off + int64(j); b == 0 {
				m.want[at] = 0
			} else if b != m.want[at] {
				t.Fatalf("after Discard of %d at %d: byte %d is %#x, want %#x or 0", n, r.off, at, b, m.want[at])
			}
		}
		if i%10 == 9 {
			m.verify("Discard")
			m.write(random(400000), 100001, 0)
		}
	}
}

func checkReopen(t testing.TB, target Target) {
	m := newModel(t, target, 64*kib)
	m.pass(m.s.WriteZeroes(5000, 20000, storage.MayUnmap))
	m.zero(5000, 20000)
	if !m.s.Info().FixedSize {
		m.write(random(1234), 64*kib+77, 0)
	}
	m.pass(m.s.Sync())
	id := m.s.Info().ID
	m.pass(m.s.Close())
	m.s = target.Reopen(t, m.s)
	defer m.s.Close()
	m.verify("opening again")
	if again := m.s.Info().ID; again != id {
		t.Errorf("the identity was %q and is %q", id, again)
	}
}

func checkReadOnly(t testing.TB, target Target) {
	content := random(70001)
	clear(content[10000:40000])
	m := &model{TB: t, s: target.NewReadOnly(t, content), want: content}
	defer m.s.Close()
	if !m.s.Info().ReadOnly {
		t.Error("Info does not say ReadOnly")
	}
	m.verify("opening")
	m.fail("WriteAt", m.s.WriteAt(content[:10], 0, 0), storage.ErrReadOnly)
	m.fail("WriteAt past the end", m.s.WriteAt(content[:10], 1<<20, 0), storage.ErrReadOnly)
	m.fail("WriteZeroes", m.s.WriteZeroes(0, 512, storage.MayUnmap), storage.ErrReadOnly)
	m.fail("Discard", m.s.Discard(0, 512), storage.ErrReadOnly)
	m.fail("Truncate", m.s.Truncate(5), storage.ErrReadOnly)
	m.pass(m.s.Sync())
	m.verify("refused writes")
	m.walkExtents(0, int64(len(content)))
	m.walkExtents(9999, 5000)
	tryRead(m, 100)
}

func checkReadOnlyClosed(t testing.TB, target Target) {
	s := target.NewReadOnly(t, random(5000))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
}
