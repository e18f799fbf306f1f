//go:build linux && !race

package guest

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// An image goes out and in over AF_VSOCK, which the kernels of hosts seldom
// loop back.
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
refused 'already in use' -- imgnbd --vsock -p 77777 -f raw -r want
kill $(cat pid)
eventually gone $(cat pid)
qemu-img check -q disk.qcow2
qemu-img compare -q -f raw -F qcow2 want disk.qcow2
[ "$(imgnbd --vsock -p 77778 --run 'nbdcopy "$uri" - | cmp - want && echo "$uri"' disk.qcow2)" = nbd+vsock://1:77778/ ]
`}, "nbdinfo", "nbdcopy", "qemu-img")
}
