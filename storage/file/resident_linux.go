package file

import (
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A residence tells which bytes of a file are in the page cache, for file systems
// that cannot read without waiting: NFS, FUSE, SMB. The file is mapped, and never
// touched there. Its methods may be called concurrently.
type residence struct {
	at     unsafe.Pointer
	length uintptr     // bytes that are mapped
	lies   atomic.Bool // the kernel says of every page that it is there
	page   int64       // of memory, in bytes
}

// residenceMore is how many bytes behind the end of a file are mapped, too, for those
// that grow: addresses only.
const residenceMore = 1 << 40

// newResidence returns nil where there is none.
func newResidence(fd int, size int64) *residence {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		return nil
	}
	r := &residence{page: int64(os.Getpagesize())}
	r.length = uintptr(roundUp(size, r.page) + residenceMore)
	var err error
	if r.at, err = unix.MmapPtr(fd, 0, nil, r.length, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_NORESERVE); err != nil {
		return nil
	}
	// Who locks all memory does not mean this.
	_, _, _ = unix.Syscall(unix.SYS_MUNLOCK, uintptr(r.at), r.length, 0)
	r.check()
	return r
}

func (r *residence) close() { _ = unix.MunmapPtr(r.at, r.length) }

// check finds out whether the kernel answers: to who may not write to the file it
// says, since Linux 5.2, that all is there, also what lies behind the end.
func (r *residence) check() {
	var there [1]byte
	last := r.length - uintptr(r.page)
	r.lies.Store(!r.ask(last, there[:]) || there[0]&1 != 0)
}

// ask asks of the pages from at on.
func (r *residence) ask(at uintptr, there []byte) bool {
	_, _, errno := unix.RawSyscall(unix.SYS_MINCORE, uintptr(r.at)+at, uintptr(len(there))*uintptr(r.page), uintptr(unsafe.Pointer(unsafe.SliceData(there))))
	return errno == 0
}

// has reports whether [off, off+n) is in the page cache.
func (r *residence) has(off, n int64) bool {
	if r.lies.Load() {
		return false
	}
	if off+n > int64(r.length) {
		return false
	}
	var store [64]byte
	end := roundUp(off+n, r.page)
	for off -= off % r.page; off < end; {
		there := store[:min((end-off)/r.page, int64(len(store)))]
		if !r.ask(uintptr(off), there) {
			return false
		}
		for _, b := range there {
			if b&1 == 0 {
				return false
			}
		}
		off += int64(len(there)) * r.page
	}
	return true
}

// waited is how long a read of what is in the page cache does not take.
const waited = time.Millisecond

// took says how long a read took of what was there.
func (r *residence) took(d time.Duration) {
	if d > waited {
		r.check()
	}
}
