//go:build linux && !race

package guest

import (
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// systemd itself runs the unit that is shipped: it starts a server that died
// again, which takes the device over, replaces one without a stall, and does
// not end one whose device is in use.
func TestUnit(t *testing.T) {
	unit, err := filepath.Abs("../../../dist/imgnbd@.service")
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.Options{Kernel: "6.12", Memory: 1024, Env: []string{"UNIT=" + unit}, Script: `
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cp "$(command -v imgnbd)" /usr/bin/imgnbd
cp "$UNIT" /etc/systemd/system/
# Systemd has nothing to say of it.
cp "$UNIT" imgnbd@nbd7.service
said=$(systemd-analyze verify --man=no ./imgnbd@nbd7.service 2>&1) && [ -z "$said" ] || fail "$said"
printf '[Unit]\nDefaultDependencies=no\n' >/etc/systemd/system/only.target
mkdir -p /etc/imgnbd m
imgnbd create -q -f qcow2 disk.qcow2 200M
printf 'IMAGE=%s\nOPTIONS=-f qcow2\n' "$PWD/disk.qcow2" >/etc/imgnbd/nbd0.conf
modprobe nbd
unshare --pid --fork --mount-proc env container=test /lib/systemd/systemd --system --unit=only.target --log-target=console >systemd.log 2>&1 &
eventually test -S /run/systemd/private
init=$(cat /proc/$!/task/$!/children)
init=${init// }
inside() { nsenter -t $init -m -p "$@"; }
main() { inside systemctl show -P MainPID imgnbd@nbd0; }
eventually inside systemctl is-active -q only.target

inside systemctl start imgnbd@nbd0 || fail "$(inside systemctl status --no-pager imgnbd@nbd0; cat systemd.log)"
pid=$(server /dev/nbd0)
[ "$(main)" = $pid ]
[ "$(inside cat /proc/$pid/cmdline | tr '\0' ' ')" = "@imgnbd -v -c /dev/nbd0 -f qcow2 -- $PWD/disk.qcow2 " ]
[ "$(inside cat /proc/$pid/oom_score_adj)" = -1000 ]
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
fill m

taken() { [ "$(server /dev/nbd0)" != $pid ] && [ "$(main)" = "$(server /dev/nbd0)" ]; }
inside kill -KILL $pid
eventually taken
echo 3 >/proc/sys/vm/drop_caches
verify m

pid=$(server /dev/nbd0)
inside systemctl reload imgnbd@nbd0
eventually taken
[ "$(inside cat /proc/$(main)/cmdline | tr '\0' ' ')" = "@imgnbd -c /dev/nbd0 --replace -f qcow2 -- $PWD/disk.qcow2 " ]
[ "$(inside systemctl is-active imgnbd@nbd0)" = active ]
echo 3 >/proc/sys/vm/drop_caches
verify m

# The one that a reload has brought is looked after as well.
pid=$(server /dev/nbd0)
inside kill -KILL $pid
eventually taken
echo more >m/more
sync -f m

inside systemctl stop --no-block imgnbd@nbd0
stopping() { [ "$(inside systemctl show -P SubState imgnbd@nbd0)" != running ]; }
eventually stopping
echo 3 >/proc/sys/vm/drop_caches
verify m
umount m
eventually absent /sys/block/nbd0/pid
eventually absent /run/imgnbd/nbd0.json
free /dev/nbd0
eventually inside sh -c '! systemctl is-active -q imgnbd@nbd0'
imgnbd check -q -f qcow2 disk.qcow2
`}, "mkfs.ext4", "nsenter", "systemd-analyze", "/lib/systemd/systemd")
}
