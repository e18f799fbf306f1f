package connect

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// A fakeKernel keeps in files what the kernel shows in files, and notes what
// it is asked for.
type fakeKernel struct {
	t    *testing.T
	host *host

	table      []int  // partitions that are found when the table is read
	grows      uint64 // what it adds to sizes: somebody else's change
	noNodes    bool   // nothing appears in /dev
	claimed    bool   // exclusive opens fail
	claims     int    // so many of them
	going      int    // connects that fail because a device is being destroyed
	transients int    // connects that fail because somebody looks at the device
	scanErrs   []error
	deaf       int  // reconfigurations that are ignored, since no connection has ended
	places     int  // connections that a reconfiguration replaces; 0: all
	ends       int  // reconfigurations before which all connections have ended
	detached   bool // reconfigurations are refused: it stays only because it is open

	unmounted, released func() // what follows that, unless nil
	connecting          func() // what comes before that
	syncing             func() error
	killed              func()

	mu      sync.Mutex
	config  *config          // of the last connect
	reconf  *reconfiguration // the last with connections that was accepted
	keeps   map[net.Conn]bool
	lines   fakeLines
	watched int // connections, at the last
	log     []string
	nodes   map[string]string // numbers of nodes, by path
}

// newFake returns a host with devices nbd0 to nbd3.
func newFake(t *testing.T) (*host, *fakeKernel) {
	dir := t.TempDir()
	k := &fakeKernel{t: t, nodes: map[string]string{}, keeps: map[net.Conn]bool{}, lines: make(fakeLines, 100)}
	k.host = &host{kernel: k, sys: dir + "/sys", dev: "/dev", proc: dir + "/proc", run: dir + "/run"}
	for i := range 4 {
		k.device(i)
	}
	k.file("proc/self/mountinfo", "")
	k.file("proc/swaps", "Filename Type Size Used Priority\n")
	if err := os.MkdirAll(dir+"/proc/self/ns", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("mnt:[1]", dir+"/proc/self/ns/mnt"); err != nil {
		t.Fatal(err)
	}
	return k.host, k
}

// device makes a free device, as new.
func (k *fakeKernel) device(i int) {
	k.write(name(i), "size", "0")
	k.write(name(i), "dev", fmt.Sprintf("43:%d", 32*i))
	k.write(name(i), "queue/io_timeout", "30000")
	k.write(name(i), "queue/write_zeroes_max_bytes", "0")
	k.nodes[k.host.path(i)] = fmt.Sprintf("43:%d", 32*i)
}

func (k *fakeKernel) write(dev, attribute, text string) {
	k.put(filepath.Join(k.host.sys, dev, attribute), text+"\n")
}

// file writes a file below the folder of everything.
func (k *fakeKernel) file(path, text string) { k.put(filepath.Join(k.host.sys, "..", path), text) }

func (k *fakeKernel) put(path, text string) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		k.t.Fatal(err)
	}
}

// opened has a process have a file open.
func (k *fakeKernel) opened(pid int, path string) {
	dir := fmt.Sprintf("%s/%d/fd", k.host.proc, pid)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Symlink(path, dir+"/3"); err != nil {
		k.t.Fatal(err)
	}
}

// namespace gives a process mounts of its own.
func (k *fakeKernel) namespace(pid int, mounts string) {
	k.file(fmt.Sprintf("proc/%d/mountinfo", pid), mounts)
	dir := fmt.Sprintf("%s/%d/ns", k.host.proc, pid)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Symlink(fmt.Sprintf("mnt:[%d]", pid), dir+"/mnt"); err != nil {
		k.t.Fatal(err)
	}
}

func (k *fakeKernel) note(format string, args ...any) {
	k.log = append(k.log, fmt.Sprintf(format, args...))
}

// partition makes a partition, as of a table that was read.
func (k *fakeKernel) partition(index, n int) {
	p := fmt.Sprintf("%s/%sp%d", name(index), name(index), n)
	k.write(p, "dev", fmt.Sprintf("43:%d", 32*index+n))
	k.write(p, "start", "2048")
	k.write(p, "size", "100")
	if !k.noNodes {
		k.nodes[fmt.Sprintf("%sp%d", k.host.path(index), n)] = fmt.Sprintf("43:%d", 32*index+n)
	}
}

func (k *fakeKernel) connect(c *config) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.connecting != nil {
		k.connecting()
	}
	index := c.index
	if index == anyIndex {
		for index = 0; k.host.connected(index); index++ {
		}
	}
	if k.transients > 0 {
		k.transients--
		return 0, syscall.EBUSY
	}
	if k.host.connected(index) {
		return 0, syscall.EBUSY
	}
	if index > 3 {
		return 0, syscall.EINVAL
	}
	if k.going > 0 {
		k.going--
		return 0, syscall.EINVAL
	}
	k.config = c
	k.note("connect %d", index)
	if _, err := os.Stat(filepath.Join(k.host.sys, name(index))); err != nil {
		k.device(index) // it was destroyed
	}
	if c.flags&uint64(nbd.FlagSendWriteZeroes) != 0 {
		k.write(name(index), "queue/write_zeroes_max_bytes", "4294966784")
	}
	k.write(name(index), "pid", strconv.Itoa(os.Getpid()))
	k.write(name(index), "backend", c.backend)
	k.write(name(index), "size", strconv.FormatUint((c.size+k.grows)/sector, 10))
	return index, nil
}

func (k *fakeKernel) reconfigure(r *reconfiguration) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.detached || !k.host.connected(r.index) || k.host.read(r.index, name(r.index), "backend") != r.backend {
		return syscall.EINVAL
	}
	if len(r.conns) == 0 {
		return nil
	}
	k.note("reconfigure %d", r.index)
	if k.deaf--; k.deaf >= 0 {
		return nil
	}
	if k.reconf != nil && k.ends > 0 {
		k.ends--
		clear(k.keeps)
	}
	k.reconf = r
	for i, c := range r.conns {
		k.keeps[c] = k.places == 0 || i < k.places
	}
	return nil
}

func (k *fakeKernel) kill(p *os.Process) error {
	k.note("kill %d", p.Pid)
	if k.killed != nil {
		k.killed()
	}
	return nil
}

func (k *fakeKernel) kept(conns []net.Conn) ([]net.Conn, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var kept []net.Conn
	for _, c := range conns {
		if k.keeps[c] {
			kept = append(kept, c)
		}
	}
	return kept, nil
}

// fakeLines are the places of connections that have ended.
type fakeLines chan int

func (k *fakeKernel) watch(conns []net.Conn) (lines, error) {
	k.watched = len(conns)
	return k.lines, nil
}

func (l fakeLines) wait(ctx context.Context) ([]int, error) {
	select {
	case i := <-l:
		return []int{i}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (l fakeLines) set(int, net.Conn) error { return nil }
func (l fakeLines) close()                  {}

func (k *fakeKernel) detachOnClose(index int, backend string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.host.connected(index) || k.host.backend(index) != backend {
		return syscall.EINVAL
	}
	k.note("detach on close %d", index)
	return nil
}

func (k *fakeKernel) setTimeout(index int, backend string, timeout, deadTimeout time.Duration) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.detached || !k.host.connected(index) || k.host.backend(index) != backend {
		return syscall.EINVAL
	}
	k.note("timeout %d %v %v", index, timeout, deadTimeout)
	k.write(name(index), "queue/io_timeout", milliseconds(cmp.Or(timeout, 30*time.Second)))
	return nil
}

func (k *fakeKernel) disconnect(index int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.note("disconnect %d", index)
	k.table = nil
	k.lines <- 0
	k.free(index)
	if k.config != nil && k.config.index == index && k.config.destroy {
		k.going = 2
		os.RemoveAll(filepath.Join(k.host.sys, name(index)))
	}
	return nil
}

// free makes a device one that nothing is attached to.
func (k *fakeKernel) free(index int) {
	os.Remove(filepath.Join(k.host.sys, name(index), "pid"))
	os.Remove(filepath.Join(k.host.sys, name(index), "backend"))
	k.write(name(index), "size", "0")
}

func (k *fakeKernel) number(path string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if n, ok := k.nodes[path]; ok {
		return n, nil
	}
	return "", os.ErrNotExist
}

func (k *fakeKernel) syncFS(path string) error {
	k.note("syncfs %s", path)
	return nil
}

func (k *fakeKernel) open(path string, exclusive bool) (block, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if exclusive && k.claims > 0 {
		k.claims--
		return nil, syscall.EBUSY
	}
	if exclusive && k.claimed {
		return nil, syscall.EBUSY
	}
	if exclusive {
		k.note("claim %s", path)
	}
	return &fakeBlock{k, path, exclusive}, nil
}

type fakeBlock struct {
	k         *fakeKernel
	path      string
	exclusive bool
}

func (b *fakeBlock) sync() error {
	b.k.note("sync %s", b.path)
	if b.k.syncing != nil {
		return b.k.syncing()
	}
	return nil
}

func (b *fakeBlock) endReadOnly() error {
	b.k.mu.Lock()
	defer b.k.mu.Unlock()
	index, err := b.k.host.index(b.path)
	if err != nil {
		return err
	}
	b.k.write(name(index), "ro", "0")
	return nil
}

func (b *fakeBlock) Close() error {
	if b.exclusive {
		b.k.note("release %s", b.path)
		if b.k.released != nil {
			b.k.released()
		}
	}
	return nil
}

func (b *fakeBlock) rescan() error {
	k := b.k
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.scanErrs) > 0 {
		err := k.scanErrs[0]
		k.scanErrs = k.scanErrs[1:]
		return err
	}
	index, err := k.host.index(b.path)
	if err != nil {
		return err
	}
	k.note("scan %d", index)
	for _, p := range k.host.partitions(index) {
		os.RemoveAll(filepath.Join(k.host.sys, name(index), p))
		delete(k.nodes, filepath.Join(k.host.dev, p))
	}
	for _, n := range k.table {
		k.partition(index, n)
	}
	return nil
}

func (k *fakeKernel) logged() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.log)
}

// A peer is a server up to the end of the handshake.
type peer struct {
	size  uint64
	flags nbd.TransmissionFlags
	block uint32 // minimum block size
}

// dial returns a connection to the peer.
func (p peer) dial() net.Conn {
	client, server := net.Pipe()
	go func() {
		defer server.Close()
		b := binary.BigEndian.AppendUint64(nil, nbd.Magic)
		b = binary.BigEndian.AppendUint64(b, nbd.MagicOption)
		b = binary.BigEndian.AppendUint16(b, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
		server.Write(b)
		head := make([]byte, 4+16)
		if _, err := io.ReadFull(server, head); err != nil {
			return
		}
		io.CopyN(io.Discard, server, int64(binary.BigEndian.Uint32(head[16:])))
		reply := func(rep nbd.OptionReply, data []byte) {
			b := binary.BigEndian.AppendUint64(nil, nbd.MagicOptionReply)
			b = append(b, head[12:16]...)
			b = binary.BigEndian.AppendUint32(b, uint32(rep))
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			server.Write(append(b, data...))
		}
		info := binary.BigEndian.AppendUint16(nil, nbd.InfoExport)
		info = binary.BigEndian.AppendUint64(info, p.size)
		info = binary.BigEndian.AppendUint16(info, uint16(p.flags))
		reply(nbd.RepInfo, info)
		if p.block > 0 {
			info = binary.BigEndian.AppendUint16(nil, nbd.InfoBlockSize)
			for _, n := range []uint32{p.block, max(p.block, 4096), 32 << 20} {
				info = binary.BigEndian.AppendUint32(info, n)
			}
			reply(nbd.RepInfo, info)
		}
		reply(nbd.RepAck, nil)
		io.Copy(io.Discard, server)
	}()
	return client
}
