//go:build linux && !race

package guest

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// An image goes out and in over AF_VSOCK, which the kernels of hosts seldom
// loop back, and is a device at the other end.
func TestVsock(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
modprobe vsock_loopback
imgnbd create -q -f qcow2 disk.qcow2 24M
head -c 24M /dev/urandom >want
imgnbd --vsock -p 77777 --fork -t -e 4 -f qcow2 --pid-file pid $PWD/disk.qcow2
uri=nbd+vsock://1:77777/
[ "$(nbdinfo --size $uri)" = 25165824 ]
nbdcopy --flush want $uri
nbdcopy $uri have
cmp want have
# Each client sees an orderly end.
for _ in {1..50}; do
    nbdcopy --connections=4 $uri null:
done
refused 'already in use' -- imgnbd --vsock -p 77777 -f raw -r want
kill $(cat pid)
eventually gone $(cat pid)
qemu-img check -q disk.qcow2
qemu-img compare -q -f raw -F qcow2 want disk.qcow2
# A device reaches its server so, too, and waits for it.
serve() { imgnbd --vsock -p 77777 --fork -t -e 4 -f qcow2 --pid-file pid $PWD/disk.qcow2; }
modprobe nbd
mkdir m
serve
imgnbd -c /dev/nbd0 $uri
imgnbd devices | grep -q "live .* imgnbd *$uri\$" || fail "$(imgnbd devices)"
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
seq 100000 >m/text
(cd m && md5sum text >sums)
pid=$(cat pid)
kill -KILL $pid
eventually gone $pid
eventually sh -c "imgnbd devices | grep -q ' away '"
sync -f m &
syncing=$!
serve
wait $syncing
verify m
umount m
imgnbd -d /dev/nbd0
free /dev/nbd0
kill $(cat pid)
eventually gone $(cat pid)
qemu-img check -q disk.qcow2
refused "Failed to connect to '1:77777'" -- imgnbd -c /dev/nbd0 $uri
cp want disk.raw
[ "$(imgnbd --vsock -p 77778 --run 'nbdcopy "$uri" - | cmp - want && echo "$uri"' -f raw disk.raw)" = nbd+vsock://1:77778/ ]
`}, "nbdinfo", "nbdcopy", "qemu-img", "mkfs.ext4")
}
