//go:build linux && !race

package guest

import (
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// The root file system is on the device. systemd in an initial file system in
// memory attaches it at boot by the unit that is shipped, and leaves for it by
// its own units, which end all other processes and delete the program. The same
// server serves on, is replaced by a program that is on its own device, and
// lives until all has been written at shutdown.
func TestSwitchOfRoot(t *testing.T) {
	unit, err := filepath.Abs("../../../dist/imgnbd@.service")
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.Options{Kernel: "6.12", Memory: 1024, Env: []string{"UNIT=" + unit}, Script: `
mount -t cgroup2 cgroup2 /sys/fs/cgroup
modprobe -a nbd ext4

# What both file systems have: systemd, a shell, the program and its unit, and
# a process that has no mark.
units=tree/etc/systemd/system
mkdir -p tree/{usr/{bin,sbin,lib,lib64},etc/imgnbd,dev,proc,run,sys,sysroot,mnt} $units/imgnbd@.service.d
for d in bin sbin lib lib64; do ln -s usr/$d tree/$d; done
programs="/usr/bin/systemctl /lib/systemd/systemd /lib/systemd/systemd-shutdown"
more=/lib/systemd/systemd-executor # since version 255
[ ! -e $more ] || programs+=" $more"
cp --parents -L $programs $(ldd $programs | grep -o '/[^ :]* ' | sort -u) tree
cp "$(command -v busybox)" "$(command -v imgnbd)" tree/usr/bin
for c in cat md5sum mount sh sleep sync; do ln -s busybox tree/usr/bin/$c; done
(cd /lib/systemd/system && cp initrd-{switch-root,cleanup}.service initrd-{switch-root,root-fs,fs}.target \
    {poweroff,shutdown,umount,final}.target systemd-poweroff.service "$OLDPWD/$units")
cp "$UNIT" $units
cat >$units/unmarked.service <<'END'
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
[Service]
Restart=always
ExecStart=sleep infinity
END
printf '[Service]\nTimeoutStopSec=1\n' >$units/imgnbd@.service.d/root.conf
printf 'IMAGE=/run/disk.qcow2\nOPTIONS=-f qcow2\n' >tree/etc/imgnbd/nbd0.conf
printf '[Manager]\nDefaultStandardOutput=null\n' >tree/etc/systemd/system.conf
echo ID=test >tree/etc/os-release
: >tree/etc/machine-id

# The real one. What is last to run sees what systemd has left alive.
mkdir tree/lib/systemd/system-shutdown
cat >tree/lib/systemd/system-shutdown/last <<'END'
#!/bin/sh
{
    cat /proc/[0-9]*/comm
    echo 3 >/proc/sys/vm/drop_caches
    cd /home && md5sum -c -s sums && sync && echo sound
} >/run/last 2>&1
END
chmod +x tree/lib/systemd/system-shutdown/last
printf '[Unit]\nDefaultDependencies=no\nWants=unmarked.service\n' >$units/default.target
fill tree/mnt
imgnbd create -q -f qcow2 /run/disk.qcow2 300M
imgnbd -c /dev/nbd0 -f qcow2 /run/disk.qcow2
mkfs.ext4 -q -d tree /dev/nbd0
imgnbd -d /dev/nbd0
rm -r tree/mnt/*

# The initial one.
: >tree/etc/initrd-release
printf '[Unit]\nDefaultDependencies=no\nWants=imgnbd@nbd0.service root.service unmarked.service\n' >$units/initrd.target
cat >$units/root.service <<'END'
[Unit]
DefaultDependencies=no
Requires=imgnbd@nbd0.service
After=imgnbd@nbd0.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mount -t ext4 /dev/nbd0 /sysroot
END
mkdir initrd
mount -t tmpfs initrd initrd
cp -a tree/. initrd
for d in dev sys run; do mount --rbind /$d initrd/$d; done

trap 'cat systemd.log' EXIT
unshare --pid --fork --mount --propagation private sh -c '
cd initrd
mount -t proc proc proc
pivot_root . mnt
exec /bin/sh -c "busybox umount -l /mnt; exec /lib/systemd/systemd --system --log-target=console"' >systemd.log 2>&1 &
machine=$!
eventually test -S /run/systemd/private
init=$(cat /proc/$machine/task/$machine/children)
init=${init// }
root=/proc/$init/root
inside() { nsenter -t $init -m -p "$@"; }
main() { inside systemctl show -P MainPID $1.service; }
eventually inside systemctl is-active -q root.service
pid=$(server /dev/nbd0)
[ "$(main imgnbd@nbd0)" = $pid ]
unmarked=$(main unmarked)
guardian=$(pgrep -x nbd-guardian)
[ "$(tr '\0' ' ' </proc/$guardian/cmdline)" = "@imgnbd (guardian) " ]

inside systemctl start --no-block initrd-cleanup
eventually inside systemctl is-active -q default.target
eventually absent $root/proc/$unmarked
eventually absent initrd/usr/bin/imgnbd
[ "$(readlink /proc/$guardian/exe)" = "/usr/bin/imgnbd (deleted)" ]
[ "$(server /dev/nbd0)" = $pid ]
[ "$(main imgnbd@nbd0)" = $pid ]
[ "$(inside systemctl is-active imgnbd@nbd0)" = active ]
echo 3 >/proc/sys/vm/drop_caches
verify $root/mnt
mkdir $root/home
fill $root/home
inside sync
echo 3 >/proc/sys/vm/drop_caches
verify $root/home

# Nothing of the next one, which the device has, is in memory.
inside systemctl reload imgnbd@nbd0
[ "$(server /dev/nbd0)" != $pid ]
[ "$(main imgnbd@nbd0)" = "$(server /dev/nbd0)" ]
eventually guardians 1
[ "$(tr '\0' ' ' <$root/proc/$(main imgnbd@nbd0)/cmdline)" = "@imgnbd -c /dev/nbd0 --replace -f qcow2 -- /run/disk.qcow2 " ]
echo 3 >/proc/sys/vm/drop_caches
verify $root/mnt
rm -r $root/mnt/dir

eventually inside systemctl is-active -q unmarked
[ -d $root/proc/$(main unmarked) ]
inside systemctl poweroff --no-block
eventually absent /proc/$machine
cat /run/last
for line in imgnbd nbd-guardian sound; do grep -qx $line /run/last; done
if grep -x sleep /run/last; then fail "it has killed nobody"; fi

# What is left is what was written.
eventually imgnbd -d /dev/nbd0 # the kernel unmounts it when it finds the time
imgnbd check -q -f qcow2 /run/disk.qcow2
imgnbd -c /dev/nbd0 -r -f qcow2 /run/disk.qcow2
e2fsck -fn /dev/nbd0
mkdir m
mount -o ro /dev/nbd0 m
verify m/home
[ ! -e m/mnt/dir ]
umount m
imgnbd -d /dev/nbd0
`}, "mkfs.ext4", "nsenter", "pivot_root", "busybox", "/lib/systemd/systemd")
}
