//go:build linux && !race

package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// The kernel's file systems on images that are served: made with their
// trims, filled, half emptied, trimmed, mounted again and checked. The judges
// of the images have nothing to complain of afterwards, and the space that was
// trimmed is back.
func TestFileSystems(t *testing.T) {
	qemu.Require(t, "qemu-img")
	var disks []string
	var images []image
	for _, i := range []struct{ name, format, options string }{
		{"ext4", "qcow2", ""},
		{"xfs", "qcow2", "extended_l2=on,cluster_size=128k"},
		{"btrfs", "qcow2", "backing"},
		{"raw", "raw", ""},
	} {
		img := newImage(t, i.name, i.format, i.options)
		disks = append(disks, "nbd:unix:"+img.serve(t))
		images = append(images, img)
	}
	run(t, vm.Options{Kernel: "6.12", Disks: disks, Script: `
modprobe ext4; modprobe xfs; modprobe btrfs
use() { # use DISK CHECK MKFS...
    local disk=$1 check=$2
    shift 2
    "$@" $disk
    mkdir -p m
    mount $disk m
    fill m
    head -c 60M /dev/urandom >m/much
    sync -f m
    rm m/much m/dir/?
    sed -i '/ dir\/.$/d' m/sums
    sync -f m
    fstrim -v m
    umount m
    $check $disk
    echo 3 >/proc/sys/vm/drop_caches
    mount $disk m
    verify m
    umount m
}
use /dev/vda 'e2fsck -fn' mkfs.ext4 -q
use /dev/vdb 'xfs_repair -n' mkfs.xfs -q
use /dev/vdc 'btrfs check -q' mkfs.btrfs -q
use /dev/vdd 'e2fsck -fn' mkfs.ext4 -q
`}, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "fstrim")
	for _, img := range images {
		img.stop(t)
		img.judge(t)
		var st syscall.Stat_t
		if err := syscall.Stat(img.file, &st); err != nil {
			t.Fatal(err)
		}
		if used := st.Blocks * 512; used > 60<<20 {
			t.Errorf("%s takes %d MiB: what was trimmed is not back", img.file, used>>20)
		}
	}
}

// An image that is served to a guest.
type image struct {
	file, format string
	server       *exec.Cmd
}

const imageSize = "400M"

func newImage(t *testing.T, name, format, options string) image {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	args := []string{"create", "-q", "-f", format}
	if options == "backing" {
		base := file + ".base"
		qemu.Img(t, "create", "-q", "-f", "qcow2", base, imageSize)
		args = append(args, "-b", base, "-F", "qcow2")
	} else if options != "" {
		args = append(args, "-o", options)
	}
	qemu.Img(t, append(args, file, imageSize)...)
	return image{file: file, format: format}
}

// serve starts the program and returns its socket.
func (i *image) serve(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	socket, pid := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	i.server, _ = qemu.Start(t, imgnbd, "-f", i.format, "--discard=unmap", "-t", "-k", socket, "--pid-file="+pid, i.file)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(pid); err == nil {
			return socket
		}
		if time.Now().After(end) {
			t.Fatal("the server does not become ready")
		}
	}
}

// stop ends the server in good order.
func (i *image) stop(t *testing.T) {
	t.Helper()
	if err := i.server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := i.server.Wait(); err != nil {
		t.Errorf("the server of %s: %v", i.file, err)
	}
}

// judge checks the structure of the image.
func (i *image) judge(t *testing.T) {
	t.Helper()
	if i.format != "qcow2" {
		return
	}
	for _, check := range [][]string{
		{"qemu-img", "check", "-f", "qcow2", i.file},
		{imgnbd, "check", "-f", "qcow2", i.file},
	} {
		if r := qemu.Try(t, check[0], check[1:]...); r.Code != 0 {
			t.Errorf("%q: status %d\n%s%s", check, r.Code, r.Stdout, r.Stderr)
		}
	}
}
