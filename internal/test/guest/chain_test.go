//go:build linux && !race

package guest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// From an empty image to files and back, with every tool that a person would
// use, nothing waited for in between but udev: on raw, qcow2 and a backing chain, with
// udev and without, whatever the module was told of partitions, and with
// others' programs on the one side or the other.
const chain = `
attach() { # attach BY FORMAT IMAGE
    case $1 in
    imgnbd) imgnbd -c /dev/nbd0 $parts -f "$2" --discard=unmap "$3" ;;
    nbd-client)
        rm -f pid
        imgnbd -k "$PWD/s" --fork --pid-file="$PWD/pid" -f "$2" --discard=unmap "$3"
        nbd-client -unix "$PWD/s" /dev/nbd0 >/dev/null
        eventually test -e /sys/block/nbd0/pid ;;
    qemu-nbd)
        qemu-nbd -c /dev/nbd0 -f "$2" --discard=unmap "$3"
        eventually sh -c '[ "$(blockdev --getsize64 /dev/nbd0)" != 0 ]' ;;
    esac
    # Ours needs none of it.
    [ $1 = imgnbd ] || eventually blockdev --rereadpt /dev/nbd0
}

detach() { # detach BY
    [ "$(imgnbd -d /dev/nbd0)" = '/dev/nbd0 disconnected' ]
    free /dev/nbd0
    # The image is closed when -d returns, if the server is one that says so.
    case $1 in
    nbd-client) eventually gone "$(cat pid)" ;;
    qemu-nbd) eventually sh -c '! pgrep -x qemu-nbd' ;;
    esac
}

blocks() { sync "$1"; stat -c %b "$1"; }
smaller() { sync /dev/nbd0p1; [ "$(blocks "$1")" -lt $2 ]; }

# chain BY FORMAT IMAGE
chain() {
    attach "$1" "$2" "$3"
    [ "$(blockdev --getsize64 /dev/nbd0)" = 629145600 ] || fail "$(blockdev --getsize64 /dev/nbd0) bytes"
    nodes /dev/nbd0
    printf 'label: gpt\n,100M\n,350M\n,\n' | sfdisk -q /dev/nbd0
    # Udev reads the table once more after sfdisk, nodes go and come.
    ! pgrep -x systemd-udevd >/dev/null || udevadm settle
    nodes /dev/nbd0 1 2 3
    # To make a file system discards what was there.
    head -c 30M /dev/zero | tr '\000' x | dd of=/dev/nbd0p1 bs=1M conv=fsync status=none
    local before
    before=$(blocks "$3")
    mkfs.ext4 -q /dev/nbd0p1
    # Space comes back when no reader can know of it any more.
    eventually smaller "$3" $((before - 40000))
    mkfs.xfs -q /dev/nbd0p2
    mkfs.vfat /dev/nbd0p3 >/dev/null
    local i
    for i in 1 2 3; do
        mkdir -p m$i
        mount /dev/nbd0p$i m$i
        fill m$i
    done
    refused "/dev/nbd0p2 is mounted on $PWD/m2" -- imgnbd -d /dev/nbd0
    refused 'in use' -- imgnbd -c /dev/nbd0 -f raw other.raw
    umount m1 m2 m3
    detach "$1"
    [ "$2" = raw ] || qemu-img check -q -f "$2" "$3"
    [ "$2" = raw ] || imgnbd check -q -f "$2" "$3"

    local dev
    dev=$(imgnbd -c auto -r -f "$2" "$3")
    nodes $dev 1 2 3
    for i in 1 2 3; do
        mount -o ro $dev"p$i" m$i
        verify m$i
        umount m$i
    done
    [ "$(blockdev --getro $dev)" = 1 ] || fail "$dev is writable"
    imgnbd -d $dev
    free $dev
}

# try BY KIND UDEV MAX: the chain on a fresh image, with a fresh module.
try() {
    echo "--- $*"
    if [ $3 = udev ] && ! pgrep -x systemd-udevd >/dev/null; then
        /lib/systemd/systemd-udevd --daemon
        udevadm trigger --action=add --subsystem-match=block
        udevadm settle
    fi
    [ ! -e /sys/module/nbd ] || eventually rmmod nbd
    parts=
    [ $4 = default ] || parts=--max-part=$4
    [ $1 = imgnbd ] || modprobe nbd ${parts:+max_part=$4}
    rm -f disk base.qcow2
    truncate -s 1M other.raw
    case $2 in
    raw) truncate -s 600M disk ;;
    qcow2) imgnbd create -q -f qcow2 disk 600M ;;
    overlay)
        imgnbd create -q -f qcow2 base.qcow2 600M
        imgnbd create -q -f qcow2 -b base.qcow2 -F qcow2 disk ;;
    esac
    local format=qcow2
    [ $2 != raw ] || format=raw
    chain $1 $format disk
}
`

// Udev comes last: it stays.
var chainCases = map[string]string{
	"6.1": `
try qemu-nbd overlay none default
try nbd-client qcow2 none 8
try imgnbd raw udev 0
`,
	"6.12": `
try imgnbd qcow2 none default
try imgnbd overlay none 8
try nbd-client qcow2 none 8
try qemu-nbd raw none default
try imgnbd raw udev 0
`,
}

func TestChain(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			if !full {
				runChain(t, kernel, chainCases[kernel])
				return
			}
			// In one guest for each module and image, all who serve it.
			for _, udev := range []string{"none", "udev"} {
				for _, parts := range []string{"default", "0", "8"} {
					for _, kind := range []string{"raw", "qcow2", "overlay"} {
						t.Run(strings.Join([]string{udev, parts, kind}, "-"), func(t *testing.T) {
							var cases strings.Builder
							for _, by := range []string{"imgnbd", "nbd-client", "qemu-nbd"} {
								fmt.Fprintln(&cases, "try", by, kind, udev, parts)
							}
							runChain(t, kernel, cases.String())
						})
					}
				}
			}
		})
	}
}

func runChain(t *testing.T, kernel, cases string) {
	t.Helper()
	out := run(t, vm.Options{Kernel: kernel, Memory: 1536, Limit: 10 * time.Minute, Script: chain + cases},
		"sfdisk", "mkfs.ext4", "mkfs.xfs", "mkfs.vfat", "qemu-img", "qemu-nbd", "nbd-client", "pgrep", "/lib/systemd/systemd-udevd")
	t.Logf("%d cases", strings.Count(out, "--- "))
}
