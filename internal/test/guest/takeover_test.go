//go:build linux && !race

package guest

import (
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// Only the image that a device waits for takes it over, and only when its
// server is gone for good. Where answered writes may be lost, the device
// fails instead.
func TestTakeoverRefused(t *testing.T) {
	for _, kernel := range kernels("6.12") {
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
refused 'with connections 1' -- imgnbd -c /dev/nbd0 -f raw --connections=2 disk.raw
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
    eventually absent /sys/block/${dev##*/}/pid
    free $dev
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
imgnbd -c /dev/nbd1 -f qcow2 --journal=off --cache=writethrough other.qcow2
die /dev/nbd1
imgnbd -c /dev/nbd1 -f qcow2 --journal=off other.qcow2
die /dev/nbd1
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
refused 'in use' -- imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
umount m
eventually absent /sys/block/nbd0/pid
free /dev/nbd0

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

// Killed again and again under heavy writing, and taken over each time: no
// program sees an error, and every file is whole, on the device and in the
// image.
func TestTakeover(t *testing.T) {
	const script = `
truncate -s 300M disk.raw
imgnbd create -q -f qcow2 disk.qcow2 300M
truncate -s 300M lowest.raw
imgnbd create -q -f qcow2 -b lowest.raw -F raw base.qcow2
imgnbd create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
head -c 2M /dev/urandom >pool
mkdir m

# write N: file after file, each with its checksum once it is durable.
write() {
    local i
    for ((i = 0; i < 100; i++)); do
        [ ! -e stop ] || return 0
        dd if=pool of=data.$1 bs=4k skip=$((RANDOM % 256)) count=$((RANDOM % 200 + 1)) status=none
        echo "$1 $i" >>data.$1
        dd if=data.$1 of=m/file.$1.$i bs=64k conv=fsync status=none || { echo "write $1" >>failed; return; }
        echo "$(md5sum <data.$1 | cut -d' ' -f1)  file.$1.$i" >>sums.$1
    done
}
verify_files() {
    echo 3 >/proc/sys/vm/drop_caches
    (cd m && cat ../sums.* | md5sum --quiet -c) || fail 'files'
}
# survive FORMAT IMAGE KILLS
survive() {
    local pid i writers=() dev=/dev/nbd0
    rm -f sums.* failed stop fio.runs
    imgnbd -c $dev -f $1 --discard=unmap $2
    mkfs.ext4 -q $dev
    mount $dev m
    fill m
    for i in 1 2; do
        write $i &
        writers+=($!)
    done
    # Many requests at once, past the page cache, read back and verified.
    head -c 16M /dev/zero >m/fio
    while [ ! -e stop ]; do
        fio --name=w --filename=m/fio --size=16M --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=32 --direct=1 \
            --verify=crc32c --verify_fatal=1 --randseed=$RANDOM >fio.log 2>&1 || { cp fio.log failed; break; }
        echo >>fio.runs
    done &
    writers+=($!)
    for ((i = 0; i < $3; i++)); do
        sleep 0.$((RANDOM % 7 + 2))
        pid=$(server $dev)
        kill -KILL $pid
        eventually gone $pid
        imgnbd -c $dev -f $1 --discard=unmap $2
    done
    touch stop
    wait "${writers[@]}"
    [ ! -e failed ] || fail "$(cat failed)"
    [ -s sums.1 ] && [ -s sums.2 ] && [ -s fio.runs ] || fail "nothing was written"
    echo "$1 $2: $(cat sums.* | wc -l) files, $(wc -l <fio.runs) runs of fio, $3 kills"
    sync -f m
    verify_files
    verify m
    umount m
    e2fsck -fn $dev >/dev/null || fail "e2fsck on the device: $?"
    imgnbd -d $dev
    free $dev
    imgnbd check -q -f $1 $2 || [ $1 = raw ]
    [ $1 = raw ] || qemu-img check -q -f $1 $2
    imgnbd -c $dev -r -f $1 $2
    e2fsck -fn $dev >/dev/null || fail "e2fsck on the image: $?"
    mount -o ro $dev m
    verify_files
    verify m
    umount m
    imgnbd -d $dev
    if dmesg | grep -E 'I/O error|EXT4-fs error'; then fail 'the kernel saw errors'; fi
}
modprobe nbd
`
	all := "survive raw disk.raw 10\nsurvive qcow2 disk.qcow2 10\nsurvive qcow2 overlay.qcow2 10\n"
	for _, test := range []struct{ kernel, short string }{
		{"6.12", "survive qcow2 overlay.qcow2 10\n"},
		{"6.1", "survive raw disk.raw 3\n"},
	} {
		t.Run(test.kernel, func(t *testing.T) {
			what := test.short
			if full {
				what = all
			}
			t.Log(run(t, vm.Options{Kernel: test.kernel, Memory: 1536, Limit: 10 * time.Minute, Script: script + what},
				"mkfs.ext4", "e2fsck", "fio", "qemu-img"))
		})
	}
}

// Who waits too long for a server gets an error and goes on with it.
func TestDeadTimeout(t *testing.T) {
	for _, kernel := range kernels("6.1") {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
truncate -s 64M disk.raw
imgnbd -c /dev/nbd0 -f raw --dead-timeout=3 disk.raw
pid=$(server /dev/nbd0)
kill -KILL $pid
eventually gone $pid
began=$(date +%s)
if dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct 2>err; then fail 'a write that nobody took'; fi
grep -q 'Input/output error' err
waited=$(($(date +%s) - began))
[ $waited -ge 2 ] || fail "an error after $waited s, not 3"
# It is not too late for a server. The error was told.
imgnbd -c /dev/nbd0 -f raw disk.raw
dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct status=none
imgnbd -d /dev/nbd0
free /dev/nbd0
`})
		})
	}
}

// What the server had read, or its socket held, and nobody has answered when it
// dies waits no longer than all the rest.
func TestUnanswered(t *testing.T) {
	for _, kernel := range kernels("6.12") {
		t.Run(kernel, func(t *testing.T) {
			run(t, vm.Options{Kernel: kernel, Script: `
write() { dd if=/dev/zero of=/dev/nbd0 bs=4k seek=$1 count=1 oflag=direct; }
sent() { [[ $(cat /sys/block/nbd0/inflight) =~ ^\ *0\ *$1$ ]]; }
blocked() { [ "$(sed 's/.*) //' /proc/$1/stat | cut -c1)" = D ]; }
# die WHAT: with requests under way, which fail.
die() {
    local pid i waiting=()
    pid=$(server /dev/nbd0)
    kill -STOP $pid
    if [ $1 = flush ]; then
        sync /dev/nbd0 2>told.1 &
        waiting=($!)
        eventually blocked $!
    else
        for i in 1 2 3; do
            write $((100 * i)) 2>told.$i &
            waiting+=($!)
        done
        eventually sent 3
    fi
    kill -KILL $pid
    eventually gone $pid
    for i in "${!waiting[@]}"; do
        eventually gone ${waiting[i]}
        if wait ${waiting[i]}; then fail "a $1 that nobody took"; fi
        grep -q 'Input/output error' told.$((i + 1)) || fail "$(cat told.$((i + 1)))"
    done
}
truncate -s 64M disk.raw
for timeout in 0 1; do
    for what in write flush; do
        imgnbd -c /dev/nbd0 -f raw --dead-timeout=$timeout disk.raw
        eventually guardians 1
        die $what
        eventually guardians 0
        # It is not too late for a server, and this one may be slow.
        imgnbd -c /dev/nbd0 -f raw --dead-timeout=$timeout disk.raw
        pid=$(server /dev/nbd0)
        kill -STOP $pid
        write 0 2>told &
        sleep 3
        kill -CONT $pid
        wait $! || fail "a slow request: $(cat told)"
        imgnbd -d /dev/nbd0
        eventually guardians 0
        free /dev/nbd0
    done
    for what in write flush; do
        imgnbd -c /dev/nbd0 -f raw --connections=3 --dead-timeout=$timeout disk.raw
        die $what
        eventually guardians 0
        free /dev/nbd0
    done
done
`}, "pgrep")
		})
	}
}

// A server is replaced by another while its device is written to: no request
// waits for a timer, and nobody sees an error. What the successor cannot take
// stays where it is.
func TestReplace(t *testing.T) {
	for _, kernel := range kernels("6.12") {
		t.Run(kernel, func(t *testing.T) {
			connections := "1"
			if full {
				connections = "1 3"
			}
			run(t, vm.Options{Kernel: kernel, Memory: 1024, Env: []string{"CONNECTIONS=" + connections}, Script: `
imgnbd create -q -f qcow2 disk.qcow2 200M
imgnbd create -q -f qcow2 other.qcow2 200M
mkdir m
replace() { # CONNECTIONS
local first fio old new i
rm -f stop fio.runs failed
imgnbd -v -c /dev/nbd0 --connections=$1 -f qcow2 --pid-file=$PWD/pid disk.qcow2 2>log &
first=$!
eventually grep -q 'is now connected' log
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 m
fill m
head -c 16M /dev/zero >m/fio
(
    while [ ! -e stop ]; do
        fio --name=w --filename=m/fio --size=16M --rw=randwrite --bsrange=4k-256k --ioengine=libaio --iodepth=32 --direct=1 \
            --verify=crc32c --verify_fatal=1 >fio.log 2>&1 || { cp fio.log failed; break; }
        echo >>fio.runs
    done
) &
fio=$!
sleep 1
refused 'in use' -- imgnbd -c /dev/nbd0 -f qcow2 disk.qcow2
refused 'which' -- imgnbd -c /dev/nbd0 --replace -f qcow2 other.qcow2
refused 'with offset 0' -- imgnbd -c /dev/nbd0 --replace -f qcow2 -o 512 disk.qcow2
for i in 1 2 3; do
    old=$(server /dev/nbd0)
    imgnbd -c /dev/nbd0 --replace -f qcow2 --pid-file=$PWD/pid disk.qcow2
    new=$(server /dev/nbd0)
    [ $new != $old ] && [ "$(cat pid)" = $new ] || fail "$old, $new, $(cat pid)"
    eventually gone $old
    eventually guardians 1
    [ $i != 1 ] || wait $first || fail "the first ends with $?: $(cat log)"
    if [ $i = 2 ]; then # it fails late, and the old server goes on
        imgnbd -c /dev/nbd1 -f raw other.qcow2
        refused 'no journal' -- imgnbd -c /dev/nbd0 --replace --journal=/nonexistent -f qcow2 disk.qcow2
        [ "$(server /dev/nbd0)" = $new ] || fail "$(cat /run/imgnbd/nbd0.json), not $new"
        imgnbd -d /dev/nbd1
        refused 'Could not create' -- imgnbd -c /dev/nbd0 --replace --pid-file=/nonexistent/pid -f qcow2 disk.qcow2
        [ "$(server /dev/nbd0)" = $new ] || fail "$(cat /run/imgnbd/nbd0.json), not $new"
        # What fails when it has the device is told, and the device is served.
        imgnbd -f raw --fork -t -k $PWD/s --pid-file=$PWD/other.pid other.qcow2
        imgnbd -c /dev/nbd0 --replace --pid-file=$PWD/other.pid -f qcow2 disk.qcow2 2>said
        grep -q 'warning: Cannot lock pid file' said || fail "$(cat said)"
        eventually gone $new
        [ "$(server /dev/nbd0)" != $new ]
        kill $(cat other.pid)
    fi
    if [ $i$1 = 31 ]; then # both die while nobody has the image
        python3 -c '
import os, signal, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect("/run/imgnbd/nbd0.sock")
socket.recv_fds(s, 1, 253)
os.kill(int(sys.argv[1]), signal.SIGKILL)' $new
        eventually gone $new
        imgnbd -c /dev/nbd0 --replace -f qcow2 --pid-file=$PWD/pid disk.qcow2
    fi
    sleep 0.3
done
touch stop
wait $fio
[ ! -e failed ] || fail "$(cat failed)"
[ -s fio.runs ]
umount m
e2fsck -fn /dev/nbd0 >/dev/null
mount /dev/nbd0 m
verify m
umount m
imgnbd -d /dev/nbd0
eventually guardians 0
free /dev/nbd0
}
for n in $CONNECTIONS; do replace $n; done

# An image that has grown is another one to a successor, and its device keeps its size.
truncate -s 32M grown.raw
imgnbd -c /dev/nbd0 -f raw grown.raw
old=$(server /dev/nbd0)
truncate -s 48M grown.raw
refused 'with size 33554432' -- imgnbd -c /dev/nbd0 --replace -f raw grown.raw
[ "$(server /dev/nbd0)" = $old ]
[ "$(blockdev --getsize64 /dev/nbd0)" = 33554432 ]
echo still served | dd of=/dev/nbd0 bs=512 seek=65535 conv=sync oflag=direct status=none
imgnbd -d /dev/nbd0
[ "$(dd if=grown.raw bs=512 skip=65535 count=1 status=none | tr -d '\0')" = 'still served' ]
free /dev/nbd0

[ -z "$(ls /run/imgnbd)" ] || fail "$(ls /run/imgnbd)"
imgnbd check -q -f qcow2 disk.qcow2
if dmesg | grep -E 'I/O error|EXT4-fs error'; then fail 'the kernel saw errors'; fi
`}, "mkfs.ext4", "e2fsck", "fio", "python3")
		})
	}
}
