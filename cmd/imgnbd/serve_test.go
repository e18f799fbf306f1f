package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// A recorder notes what reaches an image.
type recorder struct {
	image.Device
	calls []string
}

func (r *recorder) Info() image.Info { return image.Info{Size: 1 << 20, Discard: true, FastZero: true} }

func (r *recorder) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func (r *recorder) WriteAt(_ []byte, _ int64, flags image.WriteFlags) error {
	r.calls = append(r.calls, fmt.Sprintf("write %d", flags))
	return nil
}

func (r *recorder) WriteZeroes(_, _ int64, flags image.WriteFlags) error {
	r.calls = append(r.calls, fmt.Sprintf("zero %d", flags))
	return nil
}

func (r *recorder) Discard(_, n int64) error {
	if n > 0 {
		r.calls = append(r.calls, "discard")
	}
	return nil
}

func (r *recorder) Flush() error {
	r.calls = append(r.calls, "flush")
	return nil
}

// What the options make of a write, a zeroing that may unmap, a trim and a
// flush. 1 is FUA, 2 MayUnmap. Writing through flushes after a trim.
func TestImageOptions(t *testing.T) {
	for options, want := range map[string]string{
		"":                                      "write 0, zero 0, flush",
		"--cache=writeback":                     "write 0, zero 0, flush",
		"--cache=none":                          "write 0, zero 0, flush",
		"-n":                                    "write 0, zero 0, flush",
		"--cache=writethrough":                  "write 1, zero 1, flush, flush",
		"--cache=directsync":                    "write 1, zero 1, flush, flush",
		"--cache=unsafe":                        "write 0, zero 0",
		"--discard=ignore":                      "write 0, zero 0, flush",
		"--discard=unmap":                       "write 0, zero 2, discard, flush",
		"--detect-zeroes=on":                    "zero 0, zero 0, flush",
		"--discard=unmap --detect-zeroes=unmap": "zero 2, zero 2, discard, flush",
		"--discard=unmap --cache=writethrough":  "write 1, zero 3, discard, flush, flush",
	} {
		o := newServeOptions()
		if _, err := scan(o.flags, strings.Fields(options)); err != nil {
			t.Fatal(err)
		}
		r := &recorder{}
		d := o.wrap(r)
		for _, err := range []error{
			d.WriteAt(make([]byte, 4096), 0, 0),
			d.WriteZeroes(0, 4096, image.MayUnmap),
			d.Discard(0, 4096),
			d.Flush(),
		} {
			if err != nil {
				t.Error(err)
			}
		}
		if got := strings.Join(r.calls, ", "); got != want {
			t.Errorf("%q: %s, want %s", options, got, want)
		}
	}
}

// A signal is honoured while the image is being opened, however long that
// takes.
func TestSignalWhileOpening(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signals <- syscall.SIGTERM
	forever := make(chan struct{})
	defer close(forever)
	d, err := unlessSignalled(signals, func(context.Context) (image.Device, error) {
		<-forever
		return nil, nil
	})
	if d != nil || err != nil {
		t.Errorf("%v, %v", d, err)
	}
}

// Who says nothing is cut off after --handshake-limit, and 0 is no limit.
func TestHandshakeLimit(t *testing.T) {
	dir, err := os.MkdirTemp("", "h")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(disk, make([]byte, 512), 0o644); err != nil {
		t.Fatal(err)
	}
	for limit, cut := range map[string]bool{"1": true, "0": false} {
		cmd := exec.Command("imgnbd", "-v", "-r", "-f", "raw", "--handshake-limit="+limit, "-k", socket, disk)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
		}()
		var conn net.Conn
		for end := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
			if conn, err = net.Dial("unix", socket); err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		defer conn.Close()
		wait := deadline
		if !cut {
			wait = 1500 * time.Millisecond
		}
		conn.SetReadDeadline(time.Now().Add(wait))
		_, err := io.Copy(io.Discard, conn)
		if (err == nil) != cut {
			t.Errorf("--handshake-limit=%s: %v", limit, err)
		}
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if strings.Contains(stderr.String(), "handshake took longer than 1s") != cut {
			t.Errorf("--handshake-limit=%s:\n%s", limit, &stderr)
		}
		os.Remove(socket)
	}
}

// What lies behind an offset is shown to its last byte.
func TestOddOffset(t *testing.T) {
	o := newServeOptions()
	if _, err := scan(o.flags, []string{"-o", "513"}); err != nil {
		t.Fatal(err)
	}
	e, err := o.export("disk", &recorder{})
	if err != nil || e.Offset != 513 || e.Length != 0 {
		t.Errorf("%+v, %v", e, err)
	}
}

// A daemon that ends without a word is no success.
func TestSilentDaemon(t *testing.T) {
	var stderr bytes.Buffer
	u := newUI("imgnbd", nil, io.Discard, &stderr)
	// Standard output is not what a daemon speaks on.
	if err := startDaemon(context.Background(), u, []string{"--version"}, nil, false); !errors.Is(err, errSilent) {
		t.Errorf("%v, %s", err, &stderr)
	}
}

// Who gives up waiting for a daemon leaves none behind.
func TestDaemonIsToldToEnd(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("not any more")
	reading := make(chan *os.File, 1)
	go func() {
		f, err := os.OpenFile(fifo, os.O_WRONLY, 0) // once the daemon reads
		if err != nil {
			t.Error(err)
		}
		reading <- f
		cancel(why)
	}()
	u := newUI("imgnbd", nil, io.Discard, io.Discard)
	err := startDaemon(ctx, u, []string{"--object=authz-list-file,id=a,filename=" + fifo, "-f", "raw", fifo}, nil, false)
	if !errors.Is(err, why) {
		t.Fatal(err)
	}
	f := <-reading
	defer f.Close()
	for err = nil; err == nil; { // until nobody reads any more
		_, err = f.WriteString(" ")
		time.Sleep(10 * time.Millisecond)
	}
	if !errors.Is(err, syscall.EPIPE) {
		t.Error(err)
	}
}
