package connect

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

const mountLine = "36 35 43:0 / /mnt ro,nosuid shared:1 - ext4 /dev/nbd0 ro,seclabel\n"

// The device is told which attachment is meant.
func TestDetachWhenClosed(t *testing.T) {
	h, k := newFake(t)
	if _, err := h.detachWhenClosed("/dev/nbd0"); err == nil {
		t.Error("a free device")
	}
	a := attach(t, h, to(Auto, disk))
	k.log = nil
	hold, err := h.detachWhenClosed("/dev/nbd0")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(k.logged(), []string{"detach on close 0"}) {
		t.Error(k.logged())
	}
	if err := errors.Join(hold.Close(), a.Detach(limited(t), false), a.Close()); err != nil {
		t.Error(err)
	}
}

// Whatever state the device is in, it is free afterwards, and a file system
// that could lose something is left alone.
func TestUnmount(t *testing.T) {
	writable := strings.Replace(mountLine, "/dev/nbd0 ro", "/dev/nbd0 rw", 1)
	for name, test := range map[string]struct {
		mounts  string
		prepare func(h *host, k *fakeKernel, a *Attachment)
		force   bool
		want    string // of the error
		log     []string
	}{
		"the kernel detaches": {mounts: mountLine, log: []string{"umount /mnt"},
			prepare: func(_ *host, k *fakeKernel, a *Attachment) { k.unmounted = func() { k.free(0); a.Close() } }},
		"it does not": {mounts: mountLine, prepare: func(_ *host, k *fakeKernel, a *Attachment) { k.released = func() { a.Close() } },
			log: []string{"umount /mnt", "claim /dev/nbd0", "sync /dev/nbd0", "disconnect 0", "release /dev/nbd0"}},
		"somebody attaches at once": {mounts: mountLine, log: []string{"umount /mnt"},
			prepare: func(_ *host, k *fakeKernel, a *Attachment) {
				k.unmounted = func() { k.write(name(0), "backend", "imgnbd:OTHER"); a.Close() }
			}},
		"dead": {mounts: mountLine, prepare: func(_ *host, _ *fakeKernel, a *Attachment) { a.record.f.Close() },
			log: []string{"disconnect 0", "umount /mnt"}},
		"no record": {mounts: mountLine, prepare: func(_ *host, _ *fakeKernel, a *Attachment) { a.Close() },
			log: []string{"disconnect 0", "umount /mnt"}},
		"dead, writable": {mounts: writable, prepare: func(_ *host, _ *fakeKernel, a *Attachment) { a.record.f.Close() },
			want: "/dev/nbd0 on /mnt: its server has ended"},
		"dead, writable, by force": {mounts: writable, force: true, prepare: func(_ *host, _ *fakeKernel, a *Attachment) { a.record.f.Close() },
			log: []string{"disconnect 0", "umount /mnt"}},
		"not ours": {mounts: mountLine, want: "/mnt is /dev/nbd0, which is no device of imgnbd's",
			prepare: func(_ *host, k *fakeKernel, _ *Attachment) { k.write(name(0), "backend", "somebody") }},
		"another disk": {mounts: strings.ReplaceAll(mountLine, "43:0", "8:1"), want: "",
			prepare: func(_ *host, k *fakeKernel, a *Attachment) { k.unmounted = func() { k.free(0); a.Close() } },
			log:     []string{"umount /mnt"}}, // btrfs has a number of its own
		"covered":      {mounts: mountLine + "40 36 8:1 / /mnt rw - ext4 /dev/sda1 rw\n", want: "/mnt is /dev/sda1"},
		"not mounted":  {mounts: "", want: "/mnt: nothing is mounted there"},
		"umount fails": {mounts: mountLine, want: "target is busy", log: []string{"umount /mnt"}},
	} {
		h, k := newFake(t)
		a := attach(t, h, to(Auto, disk))
		k.file("proc/self/mountinfo", test.mounts)
		if test.prepare != nil {
			test.prepare(h, k, a)
		}
		k.log = nil
		err := h.unmount(limited(t), "/mnt", test.force, func(dir string) error {
			k.note("umount %s", dir)
			if test.want == "target is busy" {
				return errors.New(test.want)
			}
			if k.unmounted != nil {
				k.unmounted()
			}
			return nil
		})
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if log := k.logged(); !slices.Equal(log, test.log) {
			t.Errorf("%s: %q", name, log)
		}
	}
}
