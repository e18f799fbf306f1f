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
	fd     int
	at     unsafe.Pointer
	length uintptr // bytes that are mapped
	page   int64   // of memory, in bytes

	asker atomic.Int64 // who was looked at: 2 times its number, and 1 if it may ask; -1: nobody

	skips, left atomic.Int32 // of reads that were slow
}

// residenceMore is how many bytes behind the end of a file that may grow are mapped,
// too. They are addresses only.
const residenceMore = 64 << 30

// newResidence returns nil where there is none.
func newResidence(fd int, size int64, grows bool) *residence {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		return nil
	}
	r := &residence{fd: fd, page: int64(os.Getpagesize())}
	r.asker.Store(-1)
	if grows {
		size += residenceMore
	}
	r.length = uintptr(roundUp(size, r.page) + r.page) // one at least behind the end
	var err error
	if r.at, err = unix.MmapPtr(fd, 0, nil, r.length, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_NORESERVE); err != nil {
		return nil
	}
	// Who locks all memory does not mean this.
	_, _, _ = unix.Syscall(unix.SYS_MUNLOCK, uintptr(r.at), r.length, 0)
	return r
}

func (r *residence) close() { _ = unix.MunmapPtr(r.at, r.length) }

// mayAsk reports whether the kernel answers. Since Linux 5.2 it looks at who asks, and
// tells others than the owner that all is there, or asks the server of the file first,
// while the memory of this process is locked.
func (r *residence) mayAsk() bool {
	user := int64(os.Geteuid())
	asker := r.asker.Load()
	if asker>>1 != user {
		asker = user << 1
		if r.owned(user) || mayActAsOwner() && !r.told(int64(r.length)-r.page, r.page) {
			asker |= 1 // in a user namespace the capability may not count: then all is there
		}
		r.asker.Store(asker)
	}
	return asker&1 != 0
}

func (r *residence) owned(user int64) bool {
	var st unix.Stat_t
	return unix.Fstat(r.fd, &st) == nil && int64(st.Uid) == user
}

// mayActAsOwner reports whether this thread has CAP_FOWNER.
func mayActAsOwner() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&head, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_FOWNER) != 0
}

// has reports whether [off, off+n) is in the page cache, and reading it is worth a try.
func (r *residence) has(off, n int64) bool {
	if off+n > int64(r.length) || r.left.Load() > 0 && r.left.Add(-1) >= 0 {
		return false
	}
	return r.mayAsk() && r.told(off, n)
}

// told reports whether the kernel says that [off, off+n) is in the page cache.
func (r *residence) told(off, n int64) bool {
	var store [64]byte
	end := roundUp(off+n, r.page)
	for off -= off % r.page; off < end; {
		there := store[:min((end-off)/r.page, int64(len(store)))]
		_, _, errno := unix.RawSyscall(unix.SYS_MINCORE, uintptr(r.at)+uintptr(off), uintptr(len(there))*uintptr(r.page), uintptr(unsafe.Pointer(unsafe.SliceData(there))))
		if errno != 0 {
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

// atOnce is how long a read of what is in the page cache does not take, but where the
// file system asks its server whether it is still good.
const atOnce = time.Millisecond

// mostSkips bounds how many tries are left out.
const mostSkips = 1 << 12

// took says how long a read took of what was there. After a slow one some are not
// tried, after each further twice as many.
func (r *residence) took(d time.Duration) {
	if d <= atOnce {
		if r.skips.Load() > 0 {
			r.skips.Store(0)
		}
		return
	}
	n := min(max(2*r.skips.Load(), 1), mostSkips)
	r.skips.Store(n)
	r.left.Store(n)
}
