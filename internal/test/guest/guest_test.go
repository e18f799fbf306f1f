//go:build linux && !race

// Package guest runs the program with stock kernels: file systems on images
// that it serves, and images that it attaches as /dev/nbdX. It has tests only.
package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// imgnbd is the program as it is released, built once for all tests.
var imgnbd string

// full has the tests run the whole of what they can.
var full = os.Getenv("IMGNBD_GUESTS") == "full"

// kernels returns the one that is enough in short, or all.
func kernels(one string) []string {
	if full {
		return []string{"6.1", "6.12"}
	}
	return []string{one}
}

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	imgnbd = filepath.Join(dir, "imgnbd")
	cmd := exec.Command("go", "build", "-o", imgnbd, "../../../cmd/imgnbd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// run runs a script in a guest. In it, imgnbd is the program, and what
// prelude.sh has is there.
func run(t *testing.T, opt vm.Options, tools ...string) string {
	t.Helper()
	for _, tool := range tools {
		qemu.Require(t, tool)
	}
	prelude, err := os.ReadFile("testdata/prelude.sh")
	if err != nil {
		t.Fatal(err)
	}
	opt.Script = "PATH=" + filepath.Dir(imgnbd) + ":$PATH\n" + string(prelude) + opt.Script
	return vm.Run(t, opt)
}
