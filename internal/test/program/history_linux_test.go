package program

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/history"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// Several clients work on one export, whose server is killed again and again,
// and connect anew: what they were told fits together from beginning to end,
// and with what the image holds then.
func TestKilledUnderClients(t *testing.T) {
	const size = 256 << 10
	bin := build(t)
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	base := filepath.Join(t.TempDir(), "base")
	full := make([]byte, size)
	for i := range full {
		full[i] = history.Initial
	}
	if err := os.WriteFile(base, full, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, format, options string
		unit                  int64
		first                 byte
	}{
		{"raw", "raw", "", 4096, 0},
		{"512", "qcow2", "cluster_size=512", 512, 0},
		{"64k backing", "qcow2", "backing_fmt=raw,backing_file=" + base, 8192, history.Initial},
		{"subclusters backing", "qcow2", "extended_l2=on,cluster_size=16k,backing_fmt=raw,backing_file=" + base, 4096, history.Initial},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := qemu.Create(t, tt.format, tt.options, fmt.Sprint(size))
			args := []string{"--discard=unmap", "--format=" + tt.format, file}
			if tt.format == "qcow2" {
				args = append(args, "--journal="+journals(t))
			}
			p := &patient{t: t, bin: bin, socket: filepath.Join(t.TempDir(), "s"), args: args}
			p.start()
			var now atomic.Int64
			h := history.New(size, tt.first, func() int { return int(now.Add(1)) })
			stop := make(chan struct{})
			clients := history.Clients{
				History: h, Conns: 3, Depth: 3, Unit: tt.unit, Seed: 7, Patience: hang, Stop: stop,
				Dial: func(ctx context.Context) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", p.socket)
				},
			}
			ended := make(chan error, 1)
			go func() { ended <- clients.Run(t.Context()) }()
			for round := range rounds + 1 {
				for end := time.Now().Add(hang); now.Load() < int64(500*(round+1)); time.Sleep(time.Millisecond) {
					if len(ended) > 0 || time.Now().After(end) {
						p.kill()
						t.Fatalf("the clients get no further: %v\n%s", <-ended, &p.stderr)
					}
				}
				if round < rounds {
					p.kill()
					p.start()
				}
			}
			close(stop)
			if err := <-ended; err != nil {
				p.kill()
				t.Fatalf("%v\n%s", err, &p.stderr)
			}
			p.connect().Close()
			p.end()
			if tt.format == "qcow2" {
				qemu.CheckLeaks(t, file)
			}
			whole := file + ".raw"
			qemu.Img(t, "convert", "-f", tt.format, "-O", "raw", file, whole)
			b, err := os.ReadFile(whole)
			if err != nil {
				t.Fatal(err)
			}
			_ = h.Read(b, 0, func() error { return nil })
			if err := h.Check(); err != nil {
				t.Error(err)
			}
		})
	}
}
