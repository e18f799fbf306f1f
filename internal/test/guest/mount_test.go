//go:build linux && !race

package guest

import (
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// An image is mounted and unmounted in one step each, and nothing of it is
// left, whoever unmounts it and whatever dies.
const mounting = `
freed() {
    eventually absent /sys/block/nbd0/pid
    eventually absent /run/imgnbd/nbd0.json
    free /dev/nbd0
}
mkdir m
truncate -s 300M disk.raw
printf 'label: gpt\n,80M\n,100M\n,\n' | sfdisk -q disk.raw
imgnbd -c /dev/nbd0 -f raw disk.raw
mkfs.ext4 -q /dev/nbd0p1
mkfs.vfat /dev/nbd0p2 >/dev/null
imgnbd -d /dev/nbd0
imgnbd partitions -f raw disk.raw
refused 'disk.raw has several partitions with a file system: 1 (80 MiB, ext4), 2 (100 MiB, vfat), 3 (' \
    'hint: choose with --partition=NUM' -- imgnbd mount -f raw disk.raw m
refused 'there is no partition 4, only 1, 2, 3' -- imgnbd mount -f raw -P 4 disk.raw m
refused 'use --rw' -- imgnbd mount -f raw -P 1 -o noatime,rw disk.raw m
refused 'not a directory' -- imgnbd mount -f raw disk.raw disk.raw
refused 'nothing is mounted there' -- imgnbd umount m
refused 'no device of imgnbd' 'use umount' -- imgnbd umount /scratch

for n in 1 2; do
    imgnbd mount --rw -f raw --partition=$n disk.raw m
    imgnbd devices
    [ "$(stat -f -c %T m)" != tmpfs ]
    fill m
    imgnbd umount m
    free /dev/nbd0
    md5sum disk.raw >sum
    imgnbd mount -f raw -P $n disk.raw m
    verify m
    refused 'Read-only file system' -- touch m/new
    grep -q ' /scratch/m ro,nosuid,nodev,relatime ' /proc/self/mountinfo
    imgnbd umount m
    free /dev/nbd0
    md5sum --quiet -c sum
done
`

func TestMount(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Memory: 1536, Script: mounting + `
imgnbd mount -f raw -P 1 disk.raw m
# Others do not take it for one whose server is dead.
chmod 755 "$(dirname "$(command -v imgnbd)")"
refused 'only root can unmount it' -- setpriv --reuid=1000 --clear-groups imgnbd umount m
# By plain umount.
umount m
freed

# Somebody else uses it too.
imgnbd mount -f raw -P 1 disk.raw m
mkdir other
mount --bind m other
refused 'm is unmounted, but /dev/nbd0 is mounted on /scratch/other' -- imgnbd umount m
umount other
freed

# What is not a file system leaves nothing attached.
refused 'mount: ' -- imgnbd mount -f raw -P 1 -t xfs disk.raw m
freed
head -c 1M /dev/urandom >noise
refused 'noise has no partition table and no file system that is known here' -- imgnbd mount -f raw noise m

# An end in the middle, too.
cat >mount <<'END'
#!/bin/sh
echo "$@" >mounting
exec sleep 1000
END
chmod +x mount
PATH=$PWD:$PATH setsid imgnbd mount -f raw -P 1 disk.raw m &
eventually test -s mounting
grep -q '^-o ro,nosuid,nodev -- /dev/nbd0 m$' mounting
kill -KILL $!
freed
kill "$(pgrep -f 'sleep 1000')"
rm mounting

# Or by a signal: what was begun is undone before it ends, wherever it waits.
signalled() { # signalled PID COMMAND...: once that succeeds
    eventually "${@:2}"
    kill -TERM $1
    local code=0
    wait $1 || code=$?
    [ $code = 143 ] || fail "it ends with $code: $(cat said)"
    grep -q 'ended by a signal' said || fail "$(cat said)"
    freed
    rm -f mounting
}
interrupted() { PATH=$PWD:$PATH exec imgnbd mount -f raw -P 1 disk.raw m 2>said; }
interrupted &
signalled $! test -s mounting
quiet() { ! pgrep -f 'sleep 1000' >/dev/null; }
eventually quiet
printf '#!/bin/sh\n/bin/mount "$@"\ntouch mounting\nexec sleep 1000\n' >mount
interrupted &
signalled $! test -e mounting
# Nor does it wait for ever to undo that.
stays() { # stays PID: it ends by a signal although umount(8) does not
    eventually gone $1
    local code=0
    wait $1 || code=$?
    [ $code = 143 ] || fail "it ends with $code: $(cat said)"
    eventually quiet
    mountpoint -q m
}
printf '#!/bin/sh\nexec sleep 1000\n' >umount
chmod +x umount
printf '#!/bin/sh\n/bin/mount "$@"\ntouch mounting\nwhile :; do sleep 0.1; done\n' >mount
interrupted &
eventually test -e mounting
kill -TERM $!
stays $!
rm mount
interruptedUmount() { PATH=$PWD:$PATH exec imgnbd umount m 2>said; }
interruptedUmount &
eventually pgrep -f 'sleep 1000' >/dev/null
kill -TERM $!
stays $!
rm umount
umount m
freed
mkdir -p /run/imgnbd
flock /run/imgnbd/nbd0.json sleep 1000 & # as a server that has yet to end
eventually test -e /run/imgnbd/nbd0.json
interrupted &
eventually test -e /sys/block/nbd0/pid
kill -TERM $!
code=0
wait $! || code=$?
[ $code = 143 ] || fail "it ends with $code: $(cat said)"
eventually absent /sys/block/nbd0/pid
kill "$(pgrep -f '^sleep 1000')"
eventually flock -n /run/imgnbd/nbd0.json rm /run/imgnbd/nbd0.json
free /dev/nbd0

# The server dies.
imgnbd mount -f raw -P 1 disk.raw m
kill -KILL "$(server /dev/nbd0)"
eventually sh -c "imgnbd devices | grep -q ' dead '"
imgnbd umount m
freed
imgnbd mount -f raw -P 1 disk.raw m
kill -KILL "$(server /dev/nbd0)"
umount m
eventually absent /sys/block/nbd0/pid

imgnbd mount --rw -f raw -P 1 disk.raw m
echo kept >m/kept
sync -f m
head -c 5M /dev/urandom >m/lost
kill -KILL "$(server /dev/nbd0)"
eventually sh -c "imgnbd devices | grep -q ' dead '"
refused '/dev/nbd0 on /scratch/m: its server has ended' -- imgnbd umount m
# It says how to lose nothing.
md5sum m/lost >sum
again=$(imgnbd umount m 2>&1 | sed -n 's/.*start a server again: //p')
[ "$again" = "imgnbd -c /dev/nbd0 -f raw -P 1 $PWD/disk.raw" ] || fail "$again"
$again
imgnbd umount m
freed
imgnbd mount --rw -f raw -P 1 disk.raw m
md5sum --quiet -c sum
head -c 5M /dev/urandom >m/lost
kill -KILL "$(server /dev/nbd0)"
eventually sh -c "imgnbd devices | grep -q ' dead '"
imgnbd umount --force m
freed
imgnbd mount -f raw -P 1 disk.raw m
[ "$(cat m/kept)" = kept ]
verify m
imgnbd umount m
freed
`}, "sfdisk", "mkfs.ext4", "mkfs.vfat", "pgrep", "setpriv")
}

func TestMountOlder(t *testing.T) {
	run(t, vm.Options{Kernel: "6.1", Memory: 1536, Script: mounting + `
imgnbd mount -f raw -P 2 disk.raw m
umount m
freed
`}, "sfdisk", "mkfs.ext4", "mkfs.vfat")
}

// A file system that was not unmounted is shown as it is once its journal has
// been replayed, and not a byte of the image is written for that.
func TestMountJournal(t *testing.T) {
	systems := "ext4 xfs"
	if full {
		systems += " btrfs"
	}
	run(t, vm.Options{Kernel: "6.12", Memory: 2048, Env: []string{"SYSTEMS=" + systems}, Script: `
mkdir m n
for fs in $SYSTEMS; do
    case $fs in ext4) make="mkfs.ext4 -q" ;; *) make="mkfs.$fs -q" ;; esac
    rm -f disk.*
    truncate -s 320M disk.live
    imgnbd -c /dev/nbd0 -f raw disk.live
    $make /dev/nbd0
    mount /dev/nbd0 m
    for i in $(seq 20); do
        seq $i 1000 >m/$i
        sync m/$i
    done
    # As if the power had failed: what is in the image at one moment.
    pid=$(server /dev/nbd0)
    kill -STOP $pid
    cp --sparse=always disk.live disk.raw
    kill -CONT $pid
    umount m
    imgnbd -d /dev/nbd0
    md5sum disk.raw >sum
    # On a device that is read-only the kernel cannot do it.
    imgnbd -r -c /dev/nbd0 -f raw disk.raw
    refused 'mount: ' -- mount -o ro /dev/nbd0 n
    imgnbd -d /dev/nbd0
    imgnbd mount -f raw disk.raw n
    for i in $(seq 20); do
        seq $i 1000 | cmp - n/$i
    done
    imgnbd umount n
    free /dev/nbd0
    md5sum --quiet -c sum
done
`}, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
}
