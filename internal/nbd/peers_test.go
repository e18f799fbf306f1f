package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A peer is another project's server over a raw image.
type peer struct {
	name     string
	tool     func(t testing.TB) string
	args     func(t testing.TB, socket, image string) []string
	tcp      bool // the socket is host:port
	once     bool // ends after its first connection
	protocol Protocol
	refuses  TransmissionFlags // offered, and then refused
	contexts bool              // lists base:allocation, and selects it where replies are not simple
}

func older(tool string) func(testing.TB) string {
	return func(t testing.TB) string { return qemu.Require(t, tool) }
}

func newer(tool string) func(testing.TB) string {
	return func(t testing.TB) string { return qemu.Newer(t, tool) }
}

func qemuNBD(t testing.TB, socket, image string) []string {
	return []string{"-k", socket, "-t", "-e", "0", "-f", "raw", "-x", "disk", "-D", "a disk", "--discard=unmap", image}
}

func nbdkit(options ...string) func(t testing.TB, socket, image string) []string {
	return func(t testing.TB, socket, image string) []string {
		return append(options, "-f", "-U", socket, "file", image)
	}
}

func nbdServer(nofork string) func(t testing.TB, socket, image string) []string {
	return func(t testing.TB, socket, image string) []string {
		return []string{nofork, "-C", nbdServerConfig(t, socket, image)}
	}
}

func nbdServerConfig(t testing.TB, socket, image string) string {
	file := filepath.Join(t.TempDir(), "nbd-server.conf")
	host, port, err := net.SplitHostPort(socket)
	if err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf("[generic]\nlistenaddr = %s\nport = %s\nallowlist = true\n[disk]\nexportname = %s\nflush = true\nfua = true\ntrim = true\n", host, port, image)
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

var peers = []peer{
	{name: "qemu-nbd", tool: older("qemu-nbd"), args: qemuNBD, protocol: Structured, contexts: true},
	{name: "qemu-nbd newer", tool: newer("qemu-nbd"), args: qemuNBD, protocol: Extended, contexts: true},
	{name: "nbdkit", tool: older("nbdkit"), args: nbdkit(), protocol: Structured, contexts: true},
	{name: "nbdkit newer", tool: newer("nbdkit"), args: nbdkit(), protocol: Structured, contexts: true},
	{name: "nbdkit without structured replies", tool: older("nbdkit"), args: nbdkit("--no-sr"), protocol: Simple, contexts: true},
	{name: "nbd-server", tool: older("nbd-server"), args: nbdServer("-d"), once: true, tcp: true, protocol: Simple},
	{name: "nbd-server newer", tool: newer("nbd-server"), args: nbdServer("-n"), tcp: true, protocol: Structured, refuses: FlagSendDF},
}

// start runs the peer over an image and returns how to reach it.
func (p peer) start(t testing.TB, image string) (dial func() net.Conn) {
	t.Helper()
	network, address := "unix", filepath.Join(t.TempDir(), "s")
	run := func() {
		if p.tcp {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			network, address = "tcp", l.Addr().String()
			l.Close()
		}
		qemu.Start(t, p.tool(t), p.args(t, address, image)...)
	}
	if !p.once {
		run()
	}
	dial = func() net.Conn {
		t.Helper()
		if p.once {
			run() // on a port of its own: the last one may still listen
		}
		var conn net.Conn
		var err error
		for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if conn, err = net.Dial(network, address); err == nil {
				return conn
			}
		}
		t.Fatalf("%s does not listen: %v", p.name, err)
		return nil
	}
	return dial
}

// patience bounds a hang, no more.
func patience(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

const diskSize = 8 << 20

// newImage makes a raw image of which the first half is data.
func newImage(t testing.TB) (file string, contents []byte) {
	t.Helper()
	contents = make([]byte, diskSize)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(contents[:diskSize/2])
	file = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(contents[:diskSize/2]); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(diskSize); err != nil {
		t.Fatal(err)
	}
	return file, contents
}

func TestPeers(t *testing.T) {
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			image, contents := newImage(t)
			dial := p.start(t, image)
			for protocol := Extended; protocol <= Simple; protocol++ {
				t.Run("at most "+protocol.String(), func(t *testing.T) {
					opt := Options{Export: "disk", Contexts: []string{ContextBaseAllocation, "no:such"}, Protocol: protocol, Timeout: 5 * time.Minute}
					c, err := Connect(patience(t), dial(), opt)
					if err != nil {
						t.Fatal(err)
					}
					s := c.Session()
					if want := max(protocol, p.protocol); s.Protocol != want {
						t.Errorf("%v replies, want %v", s.Protocol, want)
					}
					if s.Size != diskSize {
						t.Errorf("size %d, want %d", s.Size, diskSize)
					}
					if want := p.contexts && s.Protocol != Simple; want != (len(s.Contexts) == 1 && s.Contexts[0].Name == ContextBaseAllocation) {
						t.Errorf("contexts %v, want base:allocation %v", s.Contexts, want)
					}
					exercise(t, c, contents, s.Flags&^p.refuses)
					if err := c.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
					got, err := os.ReadFile(image)
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, contents) {
						t.Errorf("the image differs from what was written")
					}
				})
			}
		})
	}
}

// exercise runs random requests, of those that offered allows, from several
// goroutines, each in a part of the disk that it owns, and keeps contents up to
// date.
func exercise(t *testing.T, c *Client, contents []byte, offered TransmissionFlags) {
	t.Helper()
	s := c.Session()
	has := func(f TransmissionFlags) bool { return offered&f != 0 }
	const workers = 8
	part := len(contents) / workers
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			mine := contents[w*part : (w+1)*part]
			buf := make([]byte, part)
			for range 40 {
				at := rng.IntN(part)
				n := 1 + rng.IntN(part-at)
				off := int64(w*part + at)
				var err error
				var did string
				switch op := rng.IntN(8); {
				case op < 2:
					did = "write"
					fill := buf[:n]
					for i := range fill {
						fill[i] = byte(rng.Uint32())
					}
					var flags CommandFlags
					if op == 1 && has(FlagSendFUA) {
						flags = CmdFlagFUA
					}
					err = c.Write(fill, off, flags)
					copy(mine[at:], fill)
				case op == 2 && has(FlagSendWriteZeroes):
					did = "write zeroes"
					err = c.WriteZeroes(off, int64(n), CmdFlagNoHole)
					clear(mine[at : at+n])
				case op == 3 && has(FlagSendTrim):
					did = "trim"
					if err = c.Trim(off, int64(n), 0); err == nil {
						err = c.Read(mine[at:at+n], off, 0) // whatever it is now
					}
				case op == 4 && has(FlagSendFlush):
					did = "flush"
					err = c.Flush()
				case op == 5 && has(FlagSendCache):
					did = "cache"
					err = c.Cache(off, int64(n))
				case op == 6 && len(s.Contexts) > 0:
					did = "block status"
					err = checkStatus(c, off, mine[at:at+n])
				default:
					did = "read"
					var flags CommandFlags
					if has(FlagSendDF) && op%2 == 0 {
						flags = CmdFlagDF
					}
					err = c.Read(buf[:n], off, flags)
					if err == nil && !bytes.Equal(buf[:n], mine[at:at+n]) {
						err = errors.New("other bytes than were written")
					}
				}
				if err != nil {
					t.Errorf("%s at %d of %d: %v", did, off, n, err)
					return
				}
			}
		})
	}
	group.Wait()
	if has(FlagSendFlush) {
		if err := c.Flush(); err != nil {
			t.Errorf("flush: %v", err)
		}
	}
}

// checkStatus holds what the server calls zero against the contents.
func checkStatus(c *Client, off int64, contents []byte) error {
	status, err := c.BlockStatus(off, int64(len(contents)), 0)
	if err != nil {
		return err
	}
	if len(status) != 1 || status[0].Context != ContextBaseAllocation || len(status[0].Extents) == 0 {
		return fmt.Errorf("status %v", status)
	}
	for _, e := range status[0].Extents {
		if e.Length < 1 || e.Length > int64(len(contents)) {
			return fmt.Errorf("extent of %d with %d left", e.Length, len(contents))
		}
		run := contents[:e.Length]
		if e.Flags&StateZero != 0 && bytes.Count(run, []byte{0}) != len(run) {
			return errors.New("data is called zero")
		}
		contents = contents[e.Length:]
	}
	return nil
}

func TestPeersList(t *testing.T) {
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			image, _ := newImage(t)
			dial := p.start(t, image)
			conn := dial()
			defer conn.Close()
			l, err := List(patience(t), conn)
			if err != nil {
				t.Fatal(err)
			}
			if l.Protocol != p.protocol || len(l.Exports) != 1 {
				t.Fatalf("%+v", l)
			}
			e := l.Exports[0]
			if e.Err != nil {
				t.Fatal(e.Err)
			}
			// nbd-server answers INFO with a size of 0.
			if e.Size != diskSize && !strings.HasPrefix(p.name, "nbd-server") {
				t.Errorf("size %d", e.Size)
			}
			if e.Flags&FlagHasFlags == 0 {
				t.Errorf("flags %#x", e.Flags)
			}
			if has := len(e.Contexts) > 0 && e.Contexts[0] == ContextBaseAllocation; has != p.contexts {
				t.Errorf("contexts %q", e.Contexts)
			}
			if strings.HasPrefix(p.name, "qemu-nbd") && (e.Name != "disk" || e.Description != "a disk") {
				t.Errorf("export %q, description %q", e.Name, e.Description)
			}
		})
	}
}

func TestPeersUnknownExport(t *testing.T) {
	for _, p := range peers {
		if strings.HasPrefix(p.name, "nbdkit") {
			continue // its file serves every name
		}
		t.Run(p.name, func(t *testing.T) {
			image, _ := newImage(t)
			conn := p.start(t, image)()
			_, err := Connect(patience(t), conn, Options{Export: "other", Contexts: []string{ContextBaseAllocation}})
			if !refused(err, RepErrUnknown) {
				t.Errorf("%v, want that there is no such export", err)
			}
		})
	}
}

// A server of before the fixed newstyle protocol has EXPORT_NAME only; one of
// before that describes its export in the greeting.
func TestPeersOldHandshakes(t *testing.T) {
	for name, options := range map[string][]string{
		"oldstyle":           {"-o"},
		"newstyle not fixed": {"--mask-handshake=0"},
		"no zeroes only":     {"--mask-handshake=2"},
		"fixed with zeroes":  {"--mask-handshake=1"},
	} {
		t.Run(name, func(t *testing.T) {
			image, contents := newImage(t)
			p := peer{name: "nbdkit " + name, tool: older("nbdkit"), args: nbdkit(options...)}
			dial := p.start(t, image)
			c, err := Connect(patience(t), dial(), Options{Contexts: []string{ContextBaseAllocation}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if c.Session().Size != diskSize {
				t.Errorf("size %d", c.Session().Size)
			}
			offered := c.Session().Flags
			if name == "oldstyle" {
				// nbdkit offers more there, and then refuses it.
				offered = FlagHasFlags
			}
			exercise(t, c, contents, offered)
			conn := dial()
			defer conn.Close()
			if _, err = List(patience(t), conn); errors.Is(err, ErrNoList) == (name == "fixed with zeroes") {
				t.Errorf("List: %v", err)
			}
		})
	}
}

func TestPeersRefusals(t *testing.T) {
	image, _ := newImage(t)
	dial := peers[0].start(t, image)
	c, err := Connect(patience(t), dial(), Options{Export: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// What check would refuse is sent all the same, to see the server's words.
	err = c.do(request{command: CmdRead, offset: diskSize, length: 512, data: make([]byte, 512)})
	var e *Error
	if !errors.As(err, &e) || e.Errno != EINVAL || e.Message == "" {
		t.Errorf("read past the end: %v", err)
	}
	if err := c.Read(make([]byte, 512), 0, 0); err != nil {
		t.Errorf("read after a refusal: %v", err)
	}
	if _, err := c.BlockStatus(0, 512, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("block status without a context: %v", err)
	}
}
