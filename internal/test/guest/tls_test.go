//go:build linux && !race

package guest

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// nbd-client attaches an export of a confined server over TLS, and who has no
// certificate gets none.
func TestClientOverTLS(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Env: pkiEnv(t), Script: `
modprobe nbd
qemu-img create -q -f qcow2 disk.qcow2 64M
imgnbd --untrusted -t -e 0 -f qcow2 -b 127.0.0.1 -p 10811 --pid-file pid \
    --object "tls-creds-x509,id=t,endpoint=server,dir=$SERVER" --tls-creds t disk.qcow2 &
eventually test -s pid
over() { # [OPTION...]
    timeout 20 nbd-client -N '' localhost 10811 /dev/nbd0 "$@"
}
if over; then fail 'attached in the clear'; fi
if over -x -cacertfile "$CLIENT/ca-cert.pem"; then fail 'attached without a certificate'; fi
over -x -cacertfile "$CLIENT/ca-cert.pem" -certfile "$CLIENT/client-cert.pem" -keyfile "$CLIENT/client-key.pem"
mkfs.ext4 -q /dev/nbd0
mkdir m
mount /dev/nbd0 m
fill m
umount m
fsck.ext4 -f -n /dev/nbd0
mount -o ro /dev/nbd0 m
verify m
umount m
nbd-client -d /dev/nbd0
kill "$(cat pid)"
wait
qemu-img check disk.qcow2
`}, "nbd-client", "mkfs.ext4", "qemu-img")
}
