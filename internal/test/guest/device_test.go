//go:build linux && !race

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// The partitions of the image are there at once, and those of another image
// never, however the module was loaded. Nor does anything else stay of what was
// there before.
func TestPartitions(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
truncate -s 64M two.raw five.raw none.raw
printf ',10M\n,\n' | sfdisk -q two.raw
printf ',10M\n,10M\n,,E\n,10M\n,\n' | sfdisk -q five.raw
truncate -s 64M gpt.raw
printf 'label: gpt\n,10M\nstart=40000,size=1\n7: start=50000\n' | sfdisk -q gpt.raw
# What we take for partitions is what the kernel does, and each alone is what it
# is among the others.
for image in two.raw five.raw gpt.raw; do
    imgnbd partitions -f raw $image | awk 'NR > 2 && !/logical ones/ { print $1, $2, $3 }' >ours
    while read -r n start size; do
        echo "partition $n" | dd of=$image seek=$start conv=notrunc status=none
    done <ours
    imgnbd -r -c /dev/nbd0 -f raw $image
    for dir in /sys/block/nbd0/nbd0p*; do
        [ $image-${dir##*p} = five.raw-3 ] || echo "${dir##*p} $(cat $dir/start) $(cat $dir/size)"
    done | sort -n >theirs
    [ -s theirs ]
    cmp ours theirs || fail "$image: we have $(cat ours), the kernel $(cat theirs)"
    while read -r n start size; do
        dev=$(imgnbd -r -c auto --partition=$n -f raw $image)
        [ "$(blockdev --getsz $dev)" = $size ]
        imgnbd devices | grep -q "^$dev .* $PWD/$image, partition $n$"
        [ "$(head -n 1 $dev)" = "partition $n" ]
        cmp -n 4096 $dev /dev/nbd0p$n || [ $size -lt 8 ]
        imgnbd -d $dev >/dev/null
    done <ours
    imgnbd -d /dev/nbd0
done
# What protects a GPT elsewhere than where that begins has none.
truncate -s 1M displaced.raw
printf '\x83\0\0\0\x64\0\0\0\x64\0\0\0\0\0\0\0\xee\0\0\0\x02\0\0\0\x64\0\0\0' |
    dd of=displaced.raw bs=1 seek=450 conv=notrunc status=none
printf '\x55\xaa' | dd of=displaced.raw bs=1 seek=510 conv=notrunc status=none
refused 'not from sector 1 on' -- imgnbd partitions -f raw displaced.raw
imgnbd -r -c /dev/nbd0 -f raw displaced.raw
nodes /dev/nbd0
imgnbd -d /dev/nbd0
rmmod nbd
for max in default 0 8 16; do
    options=
    [ $max = default ] || options=--max-part=$max
    for i in 1 2 3; do
        for image in 'two.raw 1 2' 'none.raw' 'five.raw 1 2 3 4 5'; do
            set -- $image
            # The table's third partition is the extended one, whose logical
            # ones are 5 and 6.
            [ $1 != five.raw ] || set -- five.raw 1 2 3 5 6
            imgnbd -c /dev/nbd0 $options -f raw $1
            shift
            nodes /dev/nbd0 "$@"
            imgnbd -d /dev/nbd0
            free /dev/nbd0
        done
    done
    have=$(cat /sys/module/nbd/parameters/max_part)
    case $max in # the kernel rounds up to 2^n-1
    0) [ $have = 0 ] ;;
    8) [ $have = 15 ] ;;
    16) [ $have = 31 ] ;;
    esac || fail "max_part is $have, not $max"
    rmmod nbd
done

imgnbd -c /dev/nbd0 -f raw none.raw
blockdev --setro /dev/nbd0
echo 1 >/sys/block/nbd0/queue/rotational
imgnbd -d /dev/nbd0
imgnbd -c /dev/nbd0 -f raw none.raw
[ "$(blockdev --getro /dev/nbd0)" = 0 ] || fail 'it is still read-only'
[ "$(cat /sys/block/nbd0/queue/rotational)" = 0 ] || fail 'it still turns'
imgnbd -d /dev/nbd0
imgnbd -r -c /dev/nbd0 -f raw none.raw
[ "$(blockdev --getro /dev/nbd0)" = 1 ] || fail 'it can be written to'
imgnbd -d /dev/nbd0
`}, "sfdisk")
		})
	}
}

// Of eight at once each gets a device of its own, which is the image that it
// was asked for.
func TestParallel(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
modprobe nbd
for i in 1 2 3 4 5 6 7 8; do
    truncate -s "${i}M" $i.raw
    echo "image $i" | dd of=$i.raw conv=notrunc status=none
    printf ',\n' | sfdisk -q $i.raw
    imgnbd -c auto -f raw $i.raw >$i.device &
done
wait
[ "$(cat *.device | sort -u | wc -l)" = 8 ] || fail "$(cat *.device)"
for i in 1 2 3 4 5 6 7 8; do
    dev=$(cat $i.device)
    [ "$(blockdev --getsize64 $dev)" = $((i << 20)) ]
    [ "$(head -c 7 $dev)" = "image $i" ]
    nodes $dev 1
done
imgnbd devices | tee list
[ "$(grep -c ' live .* imgnbd .* /scratch/.\.raw$' list)" = 8 ]
for i in 1 2 3 4 5 6 7 8; do
    imgnbd -d "$(cat $i.device)" &
done
wait
for i in 1 2 3 4 5 6 7 8; do
    free "$(cat $i.device)"
done
[ -z "$(imgnbd devices)" ]
`}, "sfdisk")
}

// What is in use is not detached, and who uses it is named. By force it is,
// after a flush.
func TestBusy(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
truncate -s 64M disk.raw
printf ',20M\n,20M\n,\n' | sfdisk -q disk.raw
imgnbd -c /dev/nbd0 -f raw disk.raw
mkswap -q /dev/nbd0p1
swapon /dev/nbd0p1
refused '/dev/nbd0p1 is swapped to' -- imgnbd -d /dev/nbd0
swapoff /dev/nbd0p1

echo "0 1000 linear /dev/nbd0p2 0" | dmsetup create part --noudevsync
refused '/dev/nbd0p2 is part of /dev/mapper/part' -- imgnbd -d /dev/nbd0
dmsetup remove part --noudevsync

mkfs.ext4 -q /dev/nbd0p3
mkdir m 'a mount'
mount /dev/nbd0p3 'a mount'
refused "/dev/nbd0p3 is mounted on $PWD/a mount" 'hint: umount' -- imgnbd -d /dev/nbd0
imgnbd -d /dev/nbd0 2>err && fail 'detached' || [ $? = 2 ]
imgnbd devices --output json | tee list
grep -q '"use": "mount"' list
umount 'a mount'

# In a mount namespace of somebody else.
unshare -m sh -c 'mount /dev/nbd0p3 m; touch ready; while [ ! -e done ]; do sleep 0.1; done' &
eventually test -e ready
refused "/dev/nbd0p3 is mounted on $PWD/m" -- imgnbd -d /dev/nbd0
touch done
wait

mount /dev/nbd0p3 m
echo kept >m/file
refused 'stays until all have closed it' "mounted on $PWD/m" -- imgnbd -d --force /dev/nbd0
eventually absent /run/imgnbd/nbd0.json
umount m
# What it left goes when the device is attached again.
imgnbd -c /dev/nbd0 -f raw disk.raw
nodes /dev/nbd0 1 2 3
mount /dev/nbd0p3 m
[ "$(cat m/file)" = kept ]
umount m
imgnbd -d /dev/nbd0
free /dev/nbd0

refused 'not attached' -- imgnbd -d /dev/nbd0
refused '/dev/nbd0p1' -- imgnbd -d /dev/nbd0p1
refused 'is not the name of a device' -- imgnbd -c /dev/null -f raw disk.raw
truncate -s 0 empty.raw
refused 'less than a block' -- imgnbd -c /dev/nbd0 -f raw empty.raw
truncate -s 512 small.raw
imgnbd -c /dev/nbd0 -f raw small.raw
nodes /dev/nbd0
imgnbd -d /dev/nbd0
chmod 755 "$(dirname "$(command -v imgnbd)")"
refused 'attaching needs root' -- setpriv --bounding-set -sys_admin imgnbd -c /dev/nbd0 -f raw disk.raw
free /dev/nbd0
`}, "sfdisk", "mkfs.ext4", "dmsetup", "setpriv")
}

// A signal has the server detach its device: what was written to it, and
// not flushed by anybody, is in the image.
func TestSignals(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
truncate -s 32M disk.raw
for signal in TERM INT HUP; do
    imgnbd -v -c /dev/nbd0 -f raw disk.raw --pid-file=$PWD/pid 2>log &
    eventually grep -q '^NBD device /dev/nbd0 is now connected to disk.raw$' log
    pid=$(cat pid)
    rm pid
    head -c 20M /dev/urandom >data
    # Somebody else has the device open, so that no close writes it back.
    exec 9</dev/nbd0
    dd if=data of=/dev/nbd0 bs=1M status=none
    kill -$signal $pid
    sleep 0.5
    exec 9<&-
    wait $pid || fail "status $? after $signal: $(cat log)"
    cmp -n 20971520 data disk.raw
    free /dev/nbd0
done

# While it is mounted it goes on being served.
mkfs.ext4 -q disk.raw
imgnbd -v -c /dev/nbd0 -f raw disk.raw 2>log &
eventually grep -q 'is now connected' log
pid=$(server /dev/nbd0)
[ "$(cat /proc/$pid/comm)" = imgnbd ]
mkdir m
mount /dev/nbd0 m
waits() { grep -q 'is detached as soon as it is free' log; }
kill $pid
eventually waits
for again in 1 2 3; do
    kill $pid
    fill m
    sync -f m
    rm -r m/*
done
fill m
sync -f m
umount m
eventually gone $pid
free /dev/nbd0
mount -o ro,loop disk.raw m 2>/dev/null || { imgnbd -r -c /dev/nbd0 -f raw disk.raw; mount -o ro /dev/nbd0 m; }
verify m
umount m

# Nobody has to ask the server.
[ ! -e /run/imgnbd/nbd0.json ] || imgnbd -d /dev/nbd0

# Nor does it go by force because whoever is to detach it is killed.
imgnbd -v -c /dev/nbd0 -f raw disk.raw 2>log &
eventually grep -q 'is now connected' log
server=$!
python3 -c '
import os, time
os.open("/dev/nbd0", os.O_RDONLY | os.O_EXCL)
open("claimed", "w")
while not os.path.exists("done"): time.sleep(0.1)' &
eventually test -e claimed
kill $server
for signal in TERM KILL; do
    eventually pkill -$signal -f '^imgnbd --disconnect /dev/nbd0'
    eventually pgrep -f '^imgnbd --disconnect /dev/nbd0$' >/dev/null
    dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct status=none
done
touch done
wait $server
free /dev/nbd0

imgnbd -v -c auto --connections=4 -f raw disk.raw >device 2>log &
pid=$!
eventually test -s device
[ "$(cat device)" = /dev/nbd0 ]
mount /dev/nbd0 m
verify m
umount m
grep -q '"connections":4' /run/imgnbd/nbd0.json
imgnbd -d /dev/nbd0
wait $pid
free /dev/nbd0

# A server from before the switch of root may see nothing of the kernel's. It does
# not take its device for detached, or for one that nobody uses.
for hidden in "/sys /proc" /sys; do
    rm -f hidden hiding
    unshare -m --propagation private sh -c "
    imgnbd -v -c /dev/nbd0 -f raw disk.raw 2>hiding &
    until grep -q 'is now connected' hiding; do sleep 0.1; done
    for d in $hidden; do mount -t tmpfs none \$d; done
    touch hidden
    wait" &
    eventually test -e hidden
    pid=$(server /dev/nbd0)
    mount /dev/nbd0 m
    kill $pid
    eventually grep -q '/dev/nbd0 is not detached: .*: it is served on' hiding
    kill $pid
    kill -0 $pid || fail "it has ended: $(cat hiding)"
    echo 3 >/proc/sys/vm/drop_caches
    verify m
    if [ "$hidden" = /sys ]; then
        imgnbd -c /dev/nbd0 --replace -f raw disk.raw
    else
        kill -KILL $pid
        eventually gone $pid
        imgnbd -c /dev/nbd0 -f raw disk.raw
    fi
    eventually gone $pid
    umount m
    imgnbd -d /dev/nbd0
    free /dev/nbd0
done
`}, "mkfs.ext4", "python3", "pkill", "pgrep")
}

// A server that is killed with writes under way leaves a device that fails, and
// hangs nobody, and that is detached as any other.
func TestKilled(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
truncate -s 64M disk.raw other.raw
printf ',\n' | sfdisk -q disk.raw
mkdir m
busy() { [[ ! $(cat /sys/block/nbd0/inflight) =~ ^\ *0\ *0$ ]]; }
for connections in 1 3; do
    imgnbd -c /dev/nbd0 --connections=$connections --dead-timeout=0 -f raw disk.raw
    mkfs.ext4 -q -F /dev/nbd0p1
    mount /dev/nbd0p1 m
    fill m
    sync -f m
    head -c 10M /dev/urandom >m/dirty
    pid=$(server /dev/nbd0)
    kill -STOP $pid
    sync m/dirty 2>/dev/null &
    syncing=$!
    eventually busy
    kill -KILL $pid
    eventually gone $pid
    eventually gone $syncing
    if wait $syncing; then fail 'a write that nobody took'; fi
    imgnbd devices
    imgnbd devices | grep -q '^/dev/nbd0 .* dead .*disk.raw'
    refused 'waits for' -- imgnbd -c /dev/nbd0 -f raw other.raw
    refused 'is mounted on' -- imgnbd -d /dev/nbd0
    umount m
    # With several connections nobody can have it any more.
    if [ $connections = 1 ]; then imgnbd -d /dev/nbd0; fi
    eventually guardians 0
    free /dev/nbd0
    imgnbd -c /dev/nbd0 -f raw disk.raw
    e2fsck -fy /dev/nbd0p1 >/dev/null || [ $? = 1 ]
    mount /dev/nbd0p1 m
    verify m
    umount m
    imgnbd -d /dev/nbd0
done
`}, "sfdisk", "mkfs.ext4", "e2fsck")
		})
	}
}

// A server that hangs holds up who uses its device, until that is detached by
// force. Nobody who hangs is left.
func TestHungServer(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
truncate -s 64M disk.raw
imgnbd -c /dev/nbd0 -f raw disk.raw
pid=$(server /dev/nbd0)
mkfs.ext4 -q -F /dev/nbd0
mkdir m
mount /dev/nbd0 m
head -c 8M /dev/urandom >m/dirty
sync m/dirty
# What is sent fills the socket.
(while dd if=/dev/zero of=m/dirty bs=4M count=2 oflag=direct conv=notrunc 2>/dev/null; do :; done; exit 1) &
kill -STOP $pid
refused 'stays until all have closed it' "mounted on $PWD/m" -- imgnbd -d --force /dev/nbd0
! wait $! || fail 'a write that nobody took'
eventually gone $pid
umount m
absent /sys/block/nbd0/pid || fail 'it is attached'
`}, "mkfs.ext4")
}

// Devices that others have attached are listed and detached, and others
// detach ours.
func TestOthers(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
modprobe nbd
truncate -s 32M disk.raw
printf ',\n' | sfdisk -q disk.raw
attach() {
    case $1 in
    qemu-nbd) qemu-nbd -c /dev/nbd0 -f raw disk.raw ;;
    nbd-client)
        imgnbd -f raw -k "$PWD/s" --fork disk.raw
        nbd-client -unix "$PWD/s" /dev/nbd0 >/dev/null ;;
    imgnbd) imgnbd -c /dev/nbd0 -f raw disk.raw ;;
    esac
    eventually test -e /sys/block/nbd0/pid
}
detach() {
    case $1 in
    qemu-nbd) qemu-nbd -d /dev/nbd0 ;;
    nbd-client) nbd-client -d /dev/nbd0 ;;
    imgnbd) imgnbd -d /dev/nbd0 ;;
    esac >/dev/null
}
for by in qemu-nbd nbd-client imgnbd; do
    for of in qemu-nbd nbd-client imgnbd; do
        echo "$by detaches what $of attached"
        attach $of
        eventually sh -c ': </dev/nbd0; test -b /dev/nbd0p1'
        imgnbd devices
        [ "$(imgnbd devices | grep -c '^/dev/nbd0 * 32 MiB  rw')" = 1 ]
        head -c 1M /dev/urandom >data
        dd if=data of=/dev/nbd0p1 status=none
        detach $by
        [ $by != imgnbd ] || free /dev/nbd0
        eventually absent /sys/block/nbd0/pid
        eventually absent /run/imgnbd/nbd0.json
        dd if=disk.raw bs=1M skip=1 count=1 status=none | cmp - data
    done
done
`}, "sfdisk", "qemu-nbd", "nbd-client")
		})
	}
}

// With udev all of it is the same, though udev looks at each device too.
func TestUdev(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add --subsystem-match=block
udevadm settle
truncate -s 64M two.raw none.raw
printf 'label: gpt\n,10M\n,\n' | sfdisk -q two.raw
for i in $(seq 10); do
    imgnbd -c /dev/nbd0 -f raw two.raw
    nodes /dev/nbd0 1 2
    # mkfs needs the device for itself.
    mkfs.ext4 -q -F /dev/nbd0p2
    imgnbd -d /dev/nbd0
    free /dev/nbd0
    imgnbd -c /dev/nbd0 -f raw none.raw
    nodes /dev/nbd0
    imgnbd -d /dev/nbd0
done
imgnbd -c /dev/nbd0 -f raw two.raw
udevadm settle
[ "$(ls /dev/disk/by-partuuid | wc -l)" = 2 ]
imgnbd -d /dev/nbd0
`}, "sfdisk", "mkfs.ext4", "/lib/systemd/systemd-udevd")
}

// A machine with little memory writes much to a device whose image is on a
// disk of its own. What is to be written back needs the server, which
// therefore never waits for memory that only writing back can free.
func TestLittleMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 3<<30); err != nil {
		t.Fatal(err)
	}
	run(t, vm.Options{Kernel: "6.12", Memory: 256, Disks: []string{file}, Script: `
mkfs.ext4 -q /dev/vda
mkdir disk m
mount /dev/vda disk
imgnbd create -q -f qcow2 disk/image 2G
imgnbd -c /dev/nbd0 -f qcow2 disk/image
pid=$(server /dev/nbd0)
[ "$(cat /proc/$pid/oom_score_adj)" = -1000 ]
grep -q -E '^VmLck:\s+[1-9]' /proc/$pid/status
for task in /proc/$pid/task/*; do
    # PF_MEMALLOC_NOIO
    flags=$(sed 's/.*) //' $task/stat | cut -d' ' -f7)
    [ $((flags & 0x80000)) != 0 ] || fail "$task may wait for writes: $flags"
done
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
dd if=/dev/zero bs=1M count=1024 status=none | tr '\0' x >m/much
sync -f m
[ "$(stat -c %s m/much)" = 1073741824 ]
grep -E 'VmHWM|VmLck' /proc/$pid/status
umount m
imgnbd -d /dev/nbd0
imgnbd check -q -f qcow2 disk/image
`}, "mkfs.ext4")
}

// What the README shows is run as it stands there.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(readme), "An image as a block device")
	var commands string
	for range 2 {
		var block string
		var ok bool
		_, after, _ = strings.Cut(after, "```sh\n")
		if block, after, ok = strings.Cut(after, "```"); !ok {
			t.Fatal("README.md shows no commands")
		}
		commands += block
	}
	out := run(t, vm.Options{Kernel: "6.12", Script: "sudo() { \"$@\"; }\n" + commands + "free /dev/nbd0\n"}, "sfdisk", "mkfs.ext4")
	for _, want := range []string{"hello\n", "  /scratch/disk.qcow2\n", "  mounted on /mnt\n", "/dev/nbd0 disconnected\n",
		"disk.qcow2: 1 GiB, dos table", " ext4 "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Count(out, "hello\n") != 2 {
		t.Errorf("the file was not read back:\n%s", out)
	}
}

// By the name of qemu-nbd, scripts that know what it prints go on.
func TestAsQEMUNBD(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: `
ln -s "$(command -v imgnbd)" qemu-nbd
truncate -s 1M disk.raw
[ "$(./qemu-nbd -c /dev/nbd0 -f raw disk.raw 2>&1)" = '' ]
[ "$(./qemu-nbd -d /dev/nbd0 2>&1)" = '/dev/nbd0 disconnected' ]
[ "$(./qemu-nbd -d /dev/nbd0 2>err)" = '/dev/nbd0 disconnected' ]
[ "$(cat err)" = 'qemu-nbd: warning: /dev/nbd0: not attached' ]

refused 'WARNING: Image format was not specified' -- ./qemu-nbd -c /dev/nbd0 disk.raw
eventually test -e /sys/block/nbd0/pid
[ "$(cat /proc/$(server /dev/nbd0)/comm)" = qemu-nbd ]
imgnbd -d /dev/nbd0
imgnbd -c /dev/nbd0 disk.raw
imgnbd -d /dev/nbd0
free /dev/nbd0

# It does not look whether a device is in use. We do, save what can be, and say
# so.
truncate -s 32M disk.raw
./qemu-nbd -c /dev/nbd0 -f raw disk.raw
mkfs.ext4 -q /dev/nbd0
mkdir m
mount /dev/nbd0 m
echo kept >m/file
[ "$(./qemu-nbd -d /dev/nbd0 2>err)" = '/dev/nbd0 disconnected' ]
grep -q '^qemu-nbd: warning: /dev/nbd0 is mounted on .*: what is written to it from now on is lost$' err
grep -q '^qemu-nbd: warning: .* stays until all have closed it' err
umount m
eventually absent /sys/block/nbd0/pid
imgnbd -c /dev/nbd0 -f raw disk.raw
mount /dev/nbd0 m
[ "$(cat m/file)" = kept ]
umount m
imgnbd -d /dev/nbd0

# A machine without the module.
rmmod nbd
echo 'install nbd /bin/false' >/etc/modprobe.d/none.conf
refused 'no NBD devices here: the kernel does not offer nbd' 'hint: serve with --socket=PATH' -- imgnbd -c /dev/nbd0 -f raw disk.raw
refused 'Cannot open /dev/nbd0: No such file or directory' -- imgnbd -d /dev/nbd0
`}, "mkfs.ext4")
}
