package program

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A model knows what a disk may hold. The disk is cut into stripes, each of
// which one worker changes, and whose words all have the same value but while
// it is being changed. Stripes of different workers share clusters in the
// first half of the disk; in the second each worker has a range of its own.
type model struct {
	stripes [][]uint64 // the values that words of a stripe may have
	workers int
	value   uint64 // the last that was written, by any worker
	mu      sync.Mutex
}

const stripeSize = 1536 // bytes; neither a cluster nor a part of one

func newModel(size, workers int, begin func(stripe int) uint64) *model {
	m := &model{stripes: make([][]uint64, size/stripeSize), workers: workers}
	for i := range m.stripes {
		m.stripes[i] = []uint64{begin(i)}
	}
	return m
}

// word is what a stripe holds after write number id.
func word(id uint64, stripe int) uint64 { return id<<24 | uint64(stripe) }

// choose returns a run of stripes that a worker may change.
func (m *model) choose(worker int, rng *rand.Rand) (first, n int) {
	half := len(m.stripes) / 2
	if rng.IntN(2) == 0 {
		return rng.IntN(half/m.workers)*m.workers + worker, 1
	}
	own := half / m.workers
	first = rng.IntN(own)
	return half + worker*own + first, 1 + rng.IntN(min(own-first, 200))
}

// begin notes that a run is about to become value, 0 for zeros.
func (m *model) begin(first, n int, id uint64) {
	for i := first; i < first+n; i++ {
		v := uint64(0)
		if id != 0 {
			v = word(id, i)
		}
		// Last, for done: it may be there from a change that was cut short.
		m.stripes[i] = append(slices.DeleteFunc(m.stripes[i], func(old uint64) bool { return old == v }), v)
	}
}

// begun returns how many writes have begun.
func (m *model) begun() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.value
}

// done notes that the change begun last was acknowledged.
func (m *model) done(first, n int) {
	for i := first; i < first+n; i++ {
		s := m.stripes[i]
		m.stripes[i] = s[len(s)-1:]
	}
}

// check compares the disk, and holds it to what it says from now on.
func (m *model) check(disk []byte) error {
	for i := range m.stripes {
		b := disk[i*stripeSize:][:stripeSize]
		one := binary.LittleEndian.Uint64(b)
		for at := 0; at < len(b); at += 8 {
			v := binary.LittleEndian.Uint64(b[at:])
			if !slices.Contains(m.stripes[i], v) {
				return fmt.Errorf("at %d (stripe %d): %#x, which is none of %#x", i*stripeSize+at, i, v, m.stripes[i])
			}
			if v != one {
				one = 1 // a change that was never acknowledged is there in part
			}
		}
		if one != 1 {
			m.stripes[i] = append(m.stripes[i][:0], one)
		}
	}
	return nil
}

// work changes the disk until that fails.
func (m *model) work(c *nbd.Client, worker int, rng *rand.Rand) {
	var buf []byte
	for {
		first, n := m.choose(worker, rng)
		off, length := int64(first)*stripeSize, int64(n)*stripeSize
		var err error
		switch k := rng.IntN(100); {
		case k < 3:
			if c.Flush() != nil {
				return
			}
			continue
		case k < 15:
			m.begin(first, n, 0)
			flags := nbd.CommandFlags(0)
			if k < 9 {
				flags = nbd.CmdFlagNoHole
			}
			err = c.WriteZeroes(off, length, flags)
		case k < 25:
			// Afterwards each byte is as before, or zero.
			m.begin(first, n, 0)
			if c.Trim(off, length, 0) != nil {
				return
			}
			continue
		default:
			m.mu.Lock()
			m.value++
			id := m.value
			m.mu.Unlock()
			m.begin(first, n, id)
			buf = buf[:0]
			for i := first; i < first+n; i++ {
				for range stripeSize / 8 {
					buf = binary.LittleEndian.AppendUint64(buf, word(id, i))
				}
			}
			err = c.Write(buf, off, 0)
		}
		if err != nil {
			return
		}
		m.done(first, n)
	}
}

// A patient is the program, serving an image until it dies.
type patient struct {
	t      *testing.T
	bin    string
	args   []string
	socket string
	cmd    *exec.Cmd
	stderr strings.Builder

	hurried bool // the time for a handshake is short: one that fails is tried again
}

// start starts it at its socket, or where the options say.
func (p *patient) start(where ...string) {
	p.t.Helper()
	p.stderr.Reset()
	if where == nil {
		where = []string{"--socket=" + p.socket}
	}
	p.cmd = exec.Command(p.bin, slices.Concat([]string{"--persistent", "--shared=0"}, where, p.args)...)
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *patient) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

func (p *patient) end() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("the end: %v\n%s", err, &p.stderr)
	}
}

// connect waits for the program to serve.
func (p *patient) connect() *nbd.Client {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", p.socket)
		if err == nil {
			c, err := nbd.Connect(ctx, conn, nbd.Options{InFlight: 64})
			if err == nil {
				return c
			}
			if p.hurried && ctx.Err() == nil {
				continue
			}
			p.kill()
			p.t.Fatalf("the handshake: %v\n%s", err, &p.stderr)
		}
		if ctx.Err() != nil {
			p.kill()
			p.t.Fatalf("no server: %v\n%s", err, &p.stderr)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// journals returns a directory for journals.
func journals(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "imgnbd-test-")
	if err != nil {
		qemu.Missing(t, "/dev/shm")
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// loop returns a block device of that size, whose blocks are not zeros.
func loop(t *testing.T, size int) string {
	t.Helper()
	if os.Getuid() != 0 {
		qemu.Missing(t, "root for loop devices")
	}
	file := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(file, []byte(strings.Repeat("foreign\n", size/8)), 0o644); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(qemu.Run(t, "losetup", "--show", "--find", file))
	t.Cleanup(func() { qemu.Run(t, "losetup", "--detach", device) })
	return device
}

// Killed at any moment, under load and while it takes over from one that was
// killed, the program loses nothing that it acknowledged, flushed or not; what
// is left of the image is sound.
func TestKilled(t *testing.T) {
	const (
		size    = 24 << 20
		workers = 16
	)
	bin := build(t)
	zeros := func(int) uint64 { return 0 }
	base := func(stripe int) uint64 { return word(1<<30, stripe) }
	filled := func(t *testing.T) string {
		t.Helper()
		var b []byte
		for i := range size / stripeSize {
			for range stripeSize / 8 {
				b = binary.LittleEndian.AppendUint64(b, base(i))
			}
		}
		file := filepath.Join(t.TempDir(), "base")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	create := func(options string) func(*testing.T) string {
		return func(t *testing.T) string { return qemu.Create(t, "qcow2", options, fmt.Sprint(size)) }
	}
	convert := func(args ...string) func(*testing.T) string {
		return func(t *testing.T) string {
			raw := filled(t)
			file := raw + ".qcow2"
			qemu.Img(t, slices.Concat([]string{"convert", "-f", "raw", "-O", "qcow2"}, args, []string{raw, file})...)
			return file
		}
	}
	for _, tt := range []struct {
		name  string
		make  func(*testing.T) string
		begin func(int) uint64
		args  []string
	}{
		{"plain", create(""), zeros, nil},
		{"version 2", create("compat=0.10"), zeros, []string{"--cache=unsafe"}},
		{"clusters of 4k", create("cluster_size=4k"), zeros, []string{"--discard=unmap"}},
		{"clusters of 512", create("cluster_size=512"), zeros, nil},
		{"subclusters", create("extended_l2=on,cluster_size=16k"), zeros, []string{"--discard=unmap"}},
		{"counts of 1 bit", create("refcount_bits=1"), zeros, []string{"--cache=none", "--discard=unmap"}},
		{"data file", func(t *testing.T) string {
			data := filepath.Join(t.TempDir(), "data")
			return qemu.Create(t, "qcow2", "data_file="+data, fmt.Sprint(size))
		}, zeros, []string{"--discard=unmap"}},
		{"raw data file", func(t *testing.T) string {
			data := filepath.Join(t.TempDir(), "data")
			return qemu.Create(t, "qcow2", "data_file_raw=on,data_file="+data, fmt.Sprint(size))
		}, zeros, nil},
		{"backing", func(t *testing.T) string {
			return qemu.Create(t, "qcow2", "backing_fmt=raw,backing_file="+filled(t), fmt.Sprint(size))
		}, base, []string{"--discard=unmap", "--cache=writethrough"}},
		{"backing and subclusters", func(t *testing.T) string {
			return qemu.Create(t, "qcow2", "extended_l2=on,backing_fmt=raw,backing_file="+filled(t), fmt.Sprint(size))
		}, base, nil},
		{"block device", func(t *testing.T) string {
			device := loop(t, 2*size)
			qemu.Img(t, "create", "-q", "-f", "qcow2", device, fmt.Sprint(size))
			return device
		}, zeros, []string{"--cache=directsync", "--discard=unmap"}},
		{"compressed", convert("-c"), base, []string{"--discard=unmap"}},
		{"snapshots", func(t *testing.T) string {
			file := convert()(t)
			qemu.Img(t, "snapshot", "-c", "s", file)
			return file
		}, base, []string{"--discard=unmap"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %#x", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			image := tt.make(t)
			dir := journals(t)
			p := &patient{
				t: t, bin: bin, socket: filepath.Join(t.TempDir(), "s"),
				args: append(tt.args, "--detect-zeroes=on", "--journal="+dir, "--format=qcow2", image),
			}
			m := newModel(size, workers, tt.begin)
			disk := make([]byte, size)
			left := 0
			for round := range 4 {
				for range round { // killed while it starts and takes over
					p.start()
					time.Sleep(time.Duration(rng.IntN(25_000)) * time.Microsecond)
					p.kill()
				}
				p.start()
				c := p.connect()
				if err := c.Read(disk, 0, 0); err != nil {
					t.Fatal(err)
				}
				if err := m.check(disk); err != nil {
					p.kill()
					t.Fatalf("round %d, %v", round, err)
				}
				var working sync.WaitGroup
				before := m.begun()
				for w := range workers {
					r := rand.New(rand.NewPCG(seed, uint64(round*workers+w+1)))
					working.Go(func() { m.work(c, w, r) })
				}
				// Some is acknowledged each time, on a slow machine too.
				eventually(t, "nothing is acknowledged", func() bool { return m.begun() >= before+workers+4 })
				time.Sleep(time.Duration(rng.IntN(200_000)) * time.Microsecond)
				p.kill()
				working.Wait()
				c.Close()
				if files, _ := filepath.Glob(dir + "/*"); len(files) == 1 {
					left++
				}
				qemu.CheckLeaks(t, image)
			}
			if left == 0 {
				t.Error("no journal was ever left: nothing was tested")
			}
			if m.value < 20 {
				t.Errorf("only %d writes", m.value)
			}

			// The image alone has all of it, after an orderly end.
			p.start()
			if err := p.connect().Close(); err != nil {
				t.Fatal(err)
			}
			p.end()
			qemu.CheckLeaks(t, image)
			raw := filepath.Join(t.TempDir(), "raw")
			qemu.Img(t, "convert", "-f", "qcow2", "-O", "raw", image, raw)
			disk, err := os.ReadFile(raw)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.check(disk); err != nil {
				t.Error(err)
			}
			if files, _ := filepath.Glob(dir + "/*"); len(files) > 0 {
				t.Errorf("%q are left after an orderly end", files)
			}
		})
	}
}
