//go:build linux && !race

package guest

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// Only the image that a device waits for takes it over, and only when its
// server is gone for good. Where answered writes may be lost, the device
// fails instead.
func TestTakeoverRefused(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
die() {
    local pid
    pid=$(server $1)
    kill -KILL $pid
    eventually gone $pid
}
waits() { imgnbd devices | grep -q ' dead ' || fail "$(imgnbd devices)"; }
truncate -s 64M disk.raw same.raw
imgnbd create -q -f qcow2 disk.qcow2 64M
imgnbd create -q -f qcow2 other.qcow2 64M
imgnbd create -q -f qcow2 -b disk.raw -F raw top.qcow2
cp same.raw above.raw
mkdir m

# A raw image.
imgnbd -c /dev/nbd0 -f raw disk.raw
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
fill m
sync -f m
refused '/dev/nbd0 is in use' -- imgnbd -c /dev/nbd0 -f raw disk.raw
pid=$(server /dev/nbd0)
kill -STOP $pid
refused '/dev/nbd0 is in use' -- imgnbd -c /dev/nbd0 -f raw disk.raw
kill -CONT $pid
die /dev/nbd0
refused "/dev/nbd0 waits for $PWD/disk.raw (file " "), which $PWD/same.raw (file " 'hint: attach' -- imgnbd -c /dev/nbd0 -f raw same.raw
refused 'which' -- imgnbd -c /dev/nbd0 -f qcow2 other.qcow2
refused 'not in qcow2 format' -- imgnbd -c /dev/nbd0 -f qcow2 disk.raw
refused 'with offset 0' 'has 512' -- imgnbd -c /dev/nbd0 -f raw -o 512 disk.raw
refused 'with read-only false' -- imgnbd -c /dev/nbd0 -f raw -r disk.raw
refused 'with temporary overlay false' -- imgnbd -c /dev/nbd0 -f raw -s disk.raw
refused 'with options none' -- imgnbd -c /dev/nbd0 --image-opts driver=raw,file.filename=disk.raw
refused 'had 1 connections, not 2' -- imgnbd -c /dev/nbd0 -f raw --connections=2 disk.raw
truncate -s 65M disk.raw
refused 'with size 67108864' 'has 68157440' -- imgnbd -c /dev/nbd0 -f raw disk.raw
truncate -s 64M disk.raw
waits
imgnbd -c /dev/nbd0 -f raw ./disk.raw
verify m
umount m
imgnbd -d /dev/nbd0
free /dev/nbd0
e2fsck -fn disk.raw >/dev/null

# A qcow2 image. That of another device that waits is not touched.
imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
imgnbd -c /dev/nbd1 -f qcow2 other.qcow2
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
fill m
# Answered, and flushed by nobody.
dd if=/dev/urandom of=data bs=64k count=100 status=none
dd if=data of=/dev/nbd1 bs=64k oflag=direct status=none
die /dev/nbd0
die /dev/nbd1
refused 'which' -- imgnbd -c /dev/nbd0 -f qcow2 other.qcow2
refused 'which' -- imgnbd -c /dev/nbd1 -f qcow2 disk.qcow2
imgnbd -c /dev/nbd1 -f qcow2 other.qcow2
imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
cmp -n 6553600 data /dev/nbd1
verify m

# Somebody else has used the image meanwhile: nobody can go on.
lost() {
    local dev=$1
    shift
    refused "$dev is given up, and fails from now on" "$1" -- imgnbd -c $dev -f qcow2 "${@:2}"
    eventually free $dev
}
die /dev/nbd1
imgnbd -f qcow2 -k "$PWD/s" --fork -t --pid-file=$PWD/pid other.qcow2
kill -KILL $(cat pid)
eventually gone $(cat pid)
lost /dev/nbd1 'somebody else has used the image' other.qcow2
imgnbd -c /dev/nbd1 -f qcow2 other.qcow2
die /dev/nbd1
rm /run/imgnbd/*%20$(stat -c %i other.qcow2).journal /dev/shm/imgnbd-0/*%20$(stat -c %i other.qcow2).journal 2>/dev/null || true
lost /dev/nbd1 'its journal is gone' other.qcow2
imgnbd -c /dev/nbd1 -f qcow2 --journal=off other.qcow2
die /dev/nbd1
refused 'with format qcow2' -- imgnbd -c /dev/nbd1 -f raw other.qcow2
lost /dev/nbd1 'its server kept no journal' other.qcow2
imgnbd -c /dev/nbd1 -f qcow2 -s other.qcow2
die /dev/nbd1
lost /dev/nbd1 'its overlay was temporary' -s other.qcow2

# What loses nothing needs no journal.
for options in '--journal=off --cache=writethrough' '-r --journal=off'; do
    imgnbd -c /dev/nbd1 -f qcow2 $options other.qcow2
    die /dev/nbd1
    imgnbd -c /dev/nbd1 -f qcow2 $options other.qcow2
    imgnbd -d /dev/nbd1
done

# A mounted file system is told; nothing hangs.
die /dev/nbd0
rm /run/imgnbd/*.journal /dev/shm/imgnbd-0/*.journal 2>/dev/null || true
refused 'is given up' 'its journal is gone' -- imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
head -c 1M /dev/urandom >m/dirty 2>/dev/null || true
if sync m/dirty 2>/dev/null; then fail 'a write that nobody took'; fi
refused '/dev/nbd0 is in use' -- imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
umount m
eventually free /dev/nbd0

# The layers below have to be the same, too.
imgnbd -c /dev/nbd0 -f qcow2 top.qcow2
die /dev/nbd0
mv disk.raw elsewhere.raw
cp elsewhere.raw disk.raw
refused 'which' -- imgnbd -c /dev/nbd0 -f qcow2 top.qcow2
mv elsewhere.raw disk.raw
imgnbd -c /dev/nbd0 -f qcow2 top.qcow2
imgnbd -d /dev/nbd0
free /dev/nbd0
`}, "mkfs.ext4", "e2fsck")
		})
	}
}
