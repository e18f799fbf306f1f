//go:build linux && !race

package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// The machine stops in the middle of writes to file systems on attached
// images. What had been synced is there afterwards, and the images are sound.
func TestPowerCut(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 2<<30); err != nil {
		t.Fatal(err)
	}
	share := t.TempDir()
	const images = `
modprobe nbd
mkdir -p disk
attach() {
    imgnbd -c /dev/nbd0 -f raw disk/raw
    imgnbd -c /dev/nbd1 -f qcow2 disk/qcow2
    imgnbd -c /dev/nbd2 -f qcow2 disk/overlay
}
`
	run(t, vm.Options{Kernel: "6.12", Memory: 1024, Disks: []string{disk}, Share: share, Script: images + `
mkfs.ext4 -q /dev/vda
mount /dev/vda disk
truncate -s 300M disk/raw
imgnbd create -q -f qcow2 disk/qcow2 300M
imgnbd create -q -f qcow2 disk/base 300M
imgnbd create -q -f qcow2 -b base -F qcow2 disk/overlay
sync
attach
mkfs.ext4 -q /dev/nbd0
mkfs.xfs -q /dev/nbd1
mkfs.ext4 -q /dev/nbd2
# work N: files that grow, each synced and then noted outside, among others
# that are not.
work() {
    mkdir m$1
    mount /dev/nbd$1 m$1
    local i
    for i in $(seq 1000); do
        head -c $((RANDOM * 8)) /dev/urandom >m$1/unsynced$((i % 7))
        head -c $((RANDOM * 4)) /dev/urandom >m$1/file$i
        sync m$1/file$i
        (cd m$1 && md5sum file$i) >>/share/synced$1
    done
}
for n in 0 1 2; do work $n & done
enough() { [ "$(cat /share/synced$1 | wc -l)" -ge 25 ]; }
for n in 0 1 2; do
    until enough $n; do sleep 0.1; done
done
# The test has its result; nothing else is written any more.
echo 0 >/share/.guest/status
sync -f /share/.guest/status
echo b >/proc/sysrq-trigger
sleep 100
`}, "mkfs.ext4", "mkfs.xfs")
	run(t, vm.Options{Kernel: "6.12", Memory: 1024, Disks: []string{disk}, Share: share, Script: images + `
mount /dev/vda disk
# Nothing worse than leaks.
for i in qcow2 overlay; do
    imgnbd check -q disk/$i || [ $? = 3 ]
    qemu-img check -q disk/$i || [ $? = 3 ]
done
attach
for n in 0 1 2; do
    mkdir m$n
    mount /dev/nbd$n m$n # which replays the journal
    # The last line may be half written.
    grep -E '^[0-9a-f]{32}  file[0-9]+$' /share/synced$n >sums || fail "nothing synced on nbd$n"
    [ "$(wc -l <sums)" -ge 24 ]
    (cd m$n && md5sum --quiet -c ../sums) || fail "nbd$n: what was synced is not there"
    umount m$n
done
e2fsck -fn /dev/nbd0
xfs_repair -n /dev/nbd1
e2fsck -fn /dev/nbd2
for n in 0 1 2; do imgnbd -d /dev/nbd$n; done
for i in qcow2 overlay; do qemu-img check -q disk/$i || [ $? = 3 ]; done
wc -l /share/synced?
`}, "qemu-img", "e2fsck", "xfs_repair")
}
