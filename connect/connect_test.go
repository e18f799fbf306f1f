package connect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

const writable = nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendTrim | nbd.FlagSendWriteZeroes

// to returns options for a device and one peer after the other.
func to(device string, peers ...peer) Options {
	return Options{Device: device, Image: "/disk", Connections: len(peers), MaxPart: -1, DeadTimeout: 90 * time.Second,
		Dial: func(context.Context) (net.Conn, error) {
			p := peers[0]
			if len(peers) > 1 {
				peers = peers[1:]
			}
			return p.dial(), nil
		}}
}

var disk = peer{size: 1 << 20, flags: writable}

// limited bounds what would otherwise hang.
func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func attach(t *testing.T, h *host, opt Options) *Attachment {
	t.Helper()
	a, err := h.attach(limited(t), opt)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAttach(t *testing.T) {
	h, k := newFake(t)
	k.partition(1, 7) // of what was attached before
	k.table = []int{1, 2}
	k.scanErrs = []error{syscall.EBUSY} // udev
	k.write(name(1), "ro", "1")         // by somebody before
	p := peer{size: 1<<20 + 4095, flags: writable | nbd.FlagRotational | nbd.FlagSendDF | nbd.FlagCanMultiConn | nbd.FlagSendCache, block: 4096}
	opt := to("/dev/nbd1", p, p)
	opt.Partition = 3
	a := attach(t, h, opt)
	if a.Path() != "/dev/nbd1" {
		t.Error(a.Path())
	}
	want := config{index: 1, size: 1 << 20, blockSize: 4096, maxPart: -1, backend: a.backend, deadTimeout: 90 * time.Second,
		flags: uint64(writable | nbd.FlagRotational | nbd.FlagCanMultiConn)}
	got := *k.config
	if len(got.conns) != 2 {
		t.Errorf("%d connections", len(got.conns))
	}
	got.conns = nil
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(config{})); diff != "" {
		t.Error(diff)
	}
	if !slices.Equal(h.partitions(1), []string{"nbd1p1", "nbd1p2"}) {
		t.Error(h.partitions(1))
	}
	if got := h.read(1, "nbd1", "queue/io_timeout"); got != "300000" {
		t.Errorf("io_timeout %s", got)
	}
	if got := h.read(1, "nbd1", "queue/rotational"); got != "1" {
		t.Errorf("rotational %s", got)
	}
	d := Device{Path: "/dev/nbd1", Size: 1 << 20, Image: "/disk", Partition: 3, Connections: 2, PID: os.Getpid(), State: Live,
		Partitions: []Partition{{"/dev/nbd1p1", 1 << 20, 51200}, {"/dev/nbd1p2", 1 << 20, 51200}}}
	if diff := cmp.Diff([]Device{d}, h.devices()); diff != "" {
		t.Error(diff)
	}
	if err := a.Detach(limited(t), false); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	wantLog := []string{"connect 1", "scan 1", "claim /dev/nbd1", "sync /dev/nbd1p1", "sync /dev/nbd1p2", "sync /dev/nbd1",
		"disconnect 1", "release /dev/nbd1", "scan 1"}
	if diff := cmp.Diff(wantLog, k.logged()); diff != "" {
		t.Error(diff)
	}
	if len(h.devices()) > 0 || len(h.partitions(1)) > 0 {
		t.Errorf("left: %v, %v", h.devices(), h.partitions(1))
	}
	// Another attachment of the same device is not ours to detach.
	b := attach(t, h, to("/dev/nbd1", disk))
	if err := a.Detach(limited(t), false); err != nil || !h.connected(1) {
		t.Errorf("%v, connected %v", err, h.connected(1))
	}
	if err := errors.Join(b.Detach(limited(t), false), b.Close()); err != nil {
		t.Error(err)
	}
}

func TestAttachAny(t *testing.T) {
	h, k := newFake(t)
	k.transients = 3 // merely open somewhere
	first := attach(t, h, to("/dev/nbd0", disk))
	second := attach(t, h, to(Auto, disk))
	if first.Path() != "/dev/nbd0" || second.Path() != "/dev/nbd1" {
		t.Error(first.Path(), second.Path())
	}
	if got := h.read(1, "nbd1", "queue/io_timeout"); got != "1000" {
		t.Errorf("io_timeout %s", got)
	}
	if got := h.read(1, "nbd1", "queue/rotational"); got != "0" {
		t.Errorf("rotational %s", got)
	}
	_, err := h.attach(limited(t), to("/dev/nbd0", disk))
	if err == nil || !strings.Contains(err.Error(), "/dev/nbd0 is in use: /disk") {
		t.Error(err)
	}
	// A server that has ended without a word.
	first.record.f.Close()
	_, err = h.attach(limited(t), to("/dev/nbd0", disk))
	if err == nil || !strings.Contains(err.Error(), "whose server has ended") {
		t.Error(err)
	}
	if d := h.devices(); len(d) != 2 || d[0].State != Dead || d[1].State != Live {
		t.Errorf("%+v", d)
	}
}

// A device that asks for zeroing, because what was attached before offered it,
// is made anew for what does not.
func TestForgetZeroing(t *testing.T) {
	for _, device := range []string{"/dev/nbd1", Auto} {
		h, k := newFake(t)
		plain := peer{size: 1 << 20, flags: writable &^ nbd.FlagSendWriteZeroes}
		first := attach(t, h, to("/dev/nbd0", disk))
		a := attach(t, h, to("/dev/nbd1", disk))
		if err := errors.Join(a.Detach(limited(t), false), a.Close()); err != nil {
			t.Fatal(err)
		}
		k.log = nil
		// Who cannot write asks for nothing.
		a = attach(t, h, to(device, peer{size: 1 << 20, flags: nbd.FlagHasFlags | nbd.FlagReadOnly}))
		if err := errors.Join(a.Detach(limited(t), false), a.Close()); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time there is nothing to forget
			a = attach(t, h, to(device, plain))
			if a.Path() != "/dev/nbd1" {
				t.Error(a.Path())
			}
			if got := h.read(1, "nbd1", "queue/write_zeroes_max_bytes"); got != "0" {
				t.Error(got)
			}
			if err := errors.Join(a.Detach(limited(t), false), a.Close()); err != nil {
				t.Error(err)
			}
		}
		var got []string
		for _, l := range k.logged() {
			if strings.Contains(l, "connect") {
				got = append(got, l)
			}
		}
		want := []string{"connect 1", "disconnect 1", "connect 1", "disconnect 1", "connect 1", "disconnect 1", "connect 1", "disconnect 1"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", device, diff)
		}
		if err := errors.Join(first.Detach(limited(t), false), first.Close()); err != nil {
			t.Error(err)
		}
	}
}

// A device that somebody else attaches meanwhile is no free one.
func TestForgetZeroingElsewhere(t *testing.T) {
	h, k := newFake(t)
	k.write("nbd0", "queue/write_zeroes_max_bytes", "4294966784")
	k.connecting = func() {
		k.connecting = nil
		k.write("nbd0", "pid", "1")
		k.write("nbd0", "backend", "somebody's")
	}
	opt := to(Auto, peer{size: 1 << 20, flags: writable &^ nbd.FlagSendWriteZeroes})
	if a := attach(t, h, opt); a.Path() != "/dev/nbd1" {
		t.Error(a.Path())
	}
	k.free(0)
	k.going = 1 // somebody else has it made anew
	if a := attach(t, h, opt); a.Path() != "/dev/nbd2" {
		t.Error(a.Path())
	}
	// By name it is in use.
	k.connecting = func() { k.write("nbd0", "pid", "1") }
	opt.Device = "/dev/nbd0"
	if _, err := h.attach(limited(t), opt); err == nil || !strings.Contains(err.Error(), "/dev/nbd0 is in use") {
		t.Error(err)
	}
}

// Nor is a device that somebody keeps open, which is only known after a while.
func TestForgetZeroingKeptOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, k := newFake(t)
		k.write("nbd0", "queue/write_zeroes_max_bytes", "4294966784")
		h.kernel = keptOpen{k}
		index, err := h.connectFresh(limited(t), &config{index: anyIndex, flags: uint64(writable &^ nbd.FlagSendWriteZeroes)})
		if index != 1 || err != nil {
			t.Errorf("%d, %v", index, err)
		}
		// By name it is in use.
		_, err = h.connectFresh(limited(t), &config{index: 0, flags: uint64(writable &^ nbd.FlagSendWriteZeroes)})
		if _, busy := errors.AsType[*BusyError](err); !busy {
			t.Error(err)
		}
	})
}

// The first device is kept open.
type keptOpen struct{ *fakeKernel }

func (k keptOpen) connect(c *config) (int, error) {
	if c.index == 0 {
		return 0, syscall.EBUSY
	}
	return k.fakeKernel.connect(c)
}

func TestAttachRefused(t *testing.T) {
	for _, test := range []struct {
		opt  Options
		want string
	}{
		{to("/dev/sda", disk), "/dev/sda is not the name of a device as /dev/nbd0"},
		{to("/dev/nbd1p1", disk), "is not the name"},
		{to("/dev/nbd01", disk), "is not the name"},
		{to("/tmp/nbd1", disk), "is not the name"},
		{to("nbd1", disk), "is not the name"},
		{to("/dev/nbd99", disk), "no device of that number"},
		{to(Auto, peer{size: 511, flags: writable}), "has 511 bytes, less than a block"},
		{to(Auto, peer{size: 1 << 20, flags: writable, block: 8192}), "blocks of 8192 bytes"},
		{to(Auto, disk, disk), "allows one connection, not 2"},
		{to(Auto, peer{size: 512, flags: writable | nbd.FlagCanMultiConn}, peer{size: 1024, flags: writable}), "changed between two connections"},
		{Options{Device: Auto, Dial: func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }}, "no route"},
	} {
		h, k := newFake(t)
		_, err := h.attach(limited(t), test.opt)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v", test.want, err)
		}
		if len(k.logged()) > 0 {
			t.Errorf("%q: %q", test.want, k.logged())
		}
	}
}

// What fails after the kernel has the device takes it from the kernel again.
func TestAttachFails(t *testing.T) {
	for want, spoil := range map[string]func(k *fakeKernel){
		"somebody else has changed it":               func(k *fakeKernel) { k.grows = 512 },
		"nbd0p1, which the kernel has, is not in":    func(k *fakeKernel) { k.table, k.noNodes = []int{1}, true },
		"/dev/nbd0: partitions: no such device":      func(k *fakeKernel) { k.scanErrs = []error{syscall.ENODEV} },
		"nbd0, which the kernel has, is not in /dev": func(k *fakeKernel) { delete(k.nodes, "/dev/nbd0") },
		"it is device 8:0, not 43:0":                 func(k *fakeKernel) { k.nodes["/dev/nbd0"] = "8:0" },
		"run: not a directory":                       func(k *fakeKernel) { k.file("run", "") },
	} {
		// Some are waited for, as long as one may wait: so long that they are met.
		var h *host
		var k *fakeKernel
		var err error
		for limit := time.Second / 2; limit < 5*time.Minute; limit *= 2 {
			h, k = newFake(t)
			spoil(k)
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			_, err = h.attach(ctx, to(Auto, disk))
			cancel()
			if err == nil || strings.Contains(err.Error(), want) {
				break
			}
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
		if log := k.logged(); log[len(log)-1] != "disconnect 0" {
			t.Errorf("%q: %q", want, log)
		}
		if _, err := os.Stat(h.recordPath(0)); err == nil {
			t.Errorf("%q: the record stays", want)
		}
	}
}

// A table that cannot be read has no partitions.
func TestUnreadableTable(t *testing.T) {
	h, k := newFake(t)
	k.scanErrs = []error{syscall.EIO}
	attach(t, h, to(Auto, disk))
}

func TestBusy(t *testing.T) {
	h, k := newFake(t)
	k.table = []int{1, 2, 3}
	a := attach(t, h, to(Auto, disk))
	k.claimed = true
	k.file("proc/self/mountinfo", "36 35 43:1 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/nbd0p1 rw\n"+
		"37 35 0:50 / /btr rw - btrfs /dev/nbd0p3 rw\n38 35 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n")
	k.file("proc/swaps", "Filename Type Size Used Priority\n/dev/nbd0p2 partition 1 0 -2\n/dev/sda2 partition 1 0 -2\n")
	k.file("sys/nbd0/nbd0p2/holders/dm-3", "")
	k.write("dm-3", "dm/name", "vg-lv")
	want := []Holder{
		{"/dev/nbd0p2", Claimed, "/dev/mapper/vg-lv"},
		{"/dev/nbd0p1", Mounted, "/mnt/a b"},
		{"/dev/nbd0p3", Mounted, "/btr"},
		{"/dev/nbd0p2", Swap, ""},
	}
	err := a.Detach(limited(t), false)
	busy, ok := errors.AsType[*BusyError](err)
	if !ok {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, busy.Holders); diff != "" {
		t.Error(diff)
	}
	const text = "/dev/nbd0p2 is part of /dev/mapper/vg-lv, /dev/nbd0p1 is mounted on /mnt/a b, " +
		"/dev/nbd0p3 is mounted on /btr, /dev/nbd0p2 is swapped to"
	if err.Error() != text {
		t.Error(err)
	}
	if slices.Contains(k.logged(), "disconnect 0") {
		t.Error("it is detached")
	}
	k.log = nil
	if err := a.Detach(limited(t), true); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"syncfs /mnt/a b", "syncfs /btr", "sync /dev/nbd0p1", "sync /dev/nbd0p2", "sync /dev/nbd0p3",
		"sync /dev/nbd0", "disconnect 0", "scan 0"}, k.logged()); diff != "" {
		t.Error(diff)
	}
}

// Where a file system comes from, and where it is, is what whoever mounts it
// says: in a namespace of his own, or by FUSE, that may be anybody. Of btrfs it is
// root.
func TestHolderByNameAlone(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to(Auto, disk))
	k.file("proc/self/mountinfo", "35 1 0:50 / /home/fuse rw - fuse.any /dev/nbd0 rw\n"+
		"36 1 43:0 / /mnt rw - ext4 /dev/nbd0 rw\n37 1 0:51 / /btr rw - btrfs /dev/nbd0 rw\n")
	k.namespace(123, "38 1 0:52 / /tmp/fifo rw - tmpfs /dev/nbd0 rw\n39 1 43:0 / /elsewhere rw - ext4 /dev/nbd0 rw\n"+
		"40 1 0:53 / /tmp/up rw - overlay /dev/nbd0 rw\n41 1 0:54 / /tmp/fuse rw - fuseblk /dev/nbd0 rw\n42 1 0:55 / /data rw - btrfs /dev/nbd0 rw\n")
	want := []Holder{{"/dev/nbd0", Mounted, "/mnt"}, {"/dev/nbd0", Mounted, "/btr"}, {"/dev/nbd0", Mounted, "/elsewhere"}, {"/dev/nbd0", Mounted, "/data"}}
	if diff := cmp.Diff(want, a.Holders()); diff != "" {
		t.Error(diff)
	}
	if _, _, err := h.mountAt("/home/fuse"); err == nil {
		t.Error("it is unmounted as a device")
	}
	k.claimed, k.log = true, nil
	if err := a.Detach(limited(t), true); err != nil {
		t.Error(err)
	}
	// What is mounted elsewhere has no name here.
	if diff := cmp.Diff([]string{"syncfs /mnt", "syncfs /btr", "sync /dev/nbd0", "disconnect 0"}, k.logged()); diff != "" {
		t.Error(diff)
	}
}

// A claim by nobody who can be seen may pass.
func TestPassingClaim(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to(Auto, disk))
	k.claims = 1
	if err := a.Detach(limited(t), false); err != nil {
		t.Error(err)
	}
}

// Who detaches a device waits for its server; so does who attaches it next.
func TestRecord(t *testing.T) {
	h, _ := newFake(t)
	a := attach(t, h, to(Auto, disk))
	s := h.server(0)
	if !s.known() || !s.alive() || s.PID != os.Getpid() || s.Image != "/disk" {
		t.Fatalf("%+v", s)
	}
	if err := a.Detach(limited(t), false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.newRecord(ctx, 0, Record{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a record of a server that is there: %v", err)
	}
	next, waited := make(chan error, 1), make(chan error, 1)
	go func() {
		b, err := h.attach(limited(t), to("/dev/nbd0", disk))
		if err == nil {
			err = b.Close()
		}
		next <- err
	}()
	go func() { waited <- s.wait(limited(t)) }()
	select {
	case err := <-next:
		t.Errorf("attached before the server has finished: %v", err)
	case err := <-waited:
		t.Errorf("did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	for _, c := range []chan error{next, waited} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
}

// Nobody else can open a record: who could might lock it, and so be taken for
// its server. That also goes for a directory that was open to all before.
func TestRecordPrivate(t *testing.T) {
	private := func(h *host) {
		t.Helper()
		if st, err := os.Stat(h.run); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", st.Mode(), err)
		}
	}
	h, _ := newFake(t)
	attach(t, h, offer("/dev/nbd0", disk))
	private(h)
	if st, err := os.Stat(h.recordPath(0)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	open := func() {
		if err := os.Chmod(h.run, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open()
	a := attach(t, h, offer("/dev/nbd1", disk))
	private(h)
	open()
	a.record.f.Close() // the server dies
	if p, err := h.findPredecessor(limited(t), "/dev/nbd1", "", false); p == nil || err != nil {
		t.Fatal(p, err)
	}
	private(h)
}

// A device whose server has died is detached without a flush, which nobody
// could take.
func TestDead(t *testing.T) {
	h, k := newFake(t)
	a := attach(t, h, to(Auto, disk))
	a.record.f.Close()
	k.log = nil
	if err := h.detachAndWait(limited(t), 0, false); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"claim /dev/nbd0", "disconnect 0", "release /dev/nbd0"}, k.logged()); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(h.recordPath(0)); err == nil {
		t.Error("the record stays")
	}
}

// A record that is not about this attachment says nothing.
func TestForeignRecord(t *testing.T) {
	h, k := newFake(t)
	k.write("nbd2", "pid", fmt.Sprint(os.Getpid()))
	k.write("nbd2", "size", "8")
	k.file("run/nbd2.json", `{"backend":"imgnbd:OLD","pid":1,"image":"/old","connections":1}`)
	k.file(fmt.Sprintf("proc/%d/comm", os.Getpid()), "qemu-nbd\n")
	want := []Device{{Path: "/dev/nbd2", Size: 4096, PID: os.Getpid(), Program: "qemu-nbd", State: Live}}
	if diff := cmp.Diff(want, h.devices()); diff != "" {
		t.Error(diff)
	}
	// A thread has attached it.
	k.write("nbd2", "pid", "77")
	k.file("proc/77/status", fmt.Sprintf("Name:\texe\nTgid:\t%d\nPid:\t77\n", os.Getpid()))
	k.file("proc/77/comm", "exe\n")
	k.file("run/nbd2.json", `garbage`)
	if diff := cmp.Diff(want, h.devices()); diff != "" {
		t.Error(diff)
	}
}

// A device that others have mounted the moment it was there is served, though whoever
// attaches it stops waiting for its partitions.
func TestAttachInUse(t *testing.T) {
	for _, mounted := range []bool{false, true} {
		h, k := newFake(t)
		k.table, k.noNodes = []int{1}, true
		if mounted {
			k.file("proc/self/mountinfo", "1 2 43:1 / /mnt rw - ext4 /dev/nbd0p1 rw\n")
		}
		ctx, cancel := context.WithCancel(limited(t))
		h.kernel = &unlisted{k, cancel}
		a, err := h.attach(ctx, to("/dev/nbd0", disk))
		if mounted != (err == nil) || mounted != h.connected(0) || mounted == slices.Contains(k.logged(), "disconnect 0") {
			t.Errorf("mounted %v: %v, %q", mounted, err, k.logged())
		}
		if err == nil {
			a.Close()
		}
	}
}

// Who has it mounted may be done with it at once.
func TestAttachInUseBriefly(t *testing.T) {
	h, k := newFake(t)
	k.table, k.noNodes = []int{1}, true
	k.file("proc/self/mountinfo", "1 2 43:1 / /mnt rw - ext4 /dev/nbd0p1 rw\n")
	// What is read after the mounts waits until they are no more.
	swaps := filepath.Join(h.proc, "swaps")
	if err := errors.Join(os.Remove(swaps), syscall.Mkfifo(swaps, 0o600)); err != nil {
		t.Fatal(err)
	}
	go func() {
		f, err := os.OpenFile(swaps, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		k.file("proc/self/mountinfo", "")
		if err := os.Remove(swaps); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithCancel(limited(t))
	h.kernel = &unlisted{k, cancel}
	a, err := h.attach(ctx, to("/dev/nbd0", disk))
	if err != nil {
		t.Fatal(err)
	}
	if !h.connected(0) {
		t.Errorf("%q", k.logged())
	}
	a.Close()
}

// Unlisted partitions are not in /dev, and who looks for them there is stopped.
type unlisted struct {
	*fakeKernel
	stop func()
}

func (k *unlisted) number(path string) (string, error) {
	n, err := k.fakeKernel.number(path)
	if err != nil {
		k.stop()
	}
	return n, err
}

// What was given up is not detached if it is somebody else's by then.
func TestAttachElsewhere(t *testing.T) {
	h, k := newFake(t)
	h.kernel = &attachedAnew{fakeKernel: k}
	k.grows = 512
	if _, err := h.attach(limited(t), to("/dev/nbd0", disk)); err == nil || !strings.Contains(err.Error(), "somebody else has changed it") {
		t.Error(err)
	}
	h.kernel, k.grows = k, 0
	p := orphan(t, h, disk)
	k.write("nbd1", "backend", "imgnbd:other")
	if err := p.GiveUp("there was no journal"); !errors.Is(err, ErrGivenUp) {
		t.Error(err)
	}
	for _, l := range k.logged() {
		if strings.HasPrefix(l, "disconnect") {
			t.Errorf("%q", k.logged())
		}
	}
}
