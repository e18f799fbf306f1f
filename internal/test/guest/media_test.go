//go:build linux && !race

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// Media that fail, stall and fill up under an export. Who asks for what cannot
// be done hears of it, everybody else is served; once the medium is well again
// so is the export. A server whose medium does not answer can be made to give up,
// and so can that of a device.
func TestMedia(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	out := run(t, vm.Options{Kernel: "6.12", Disks: []string{disk}, Script: `
modprobe dm-mod; modprobe ext4; modprobe loop
io() { qemu-io -f raw nbd:unix:"$1" -c "$2" 2>&1; }
fails() { # fails SOCKET COMMAND WORDS
    local text
    text=$(io "$1" "$2") || true
    [[ $text == *"$3"* ]] || fail "$2: no '$3' in: $text"
}
works() {
    local text
    text=$(io "$1" "$2") || fail "$2: $text"
    [[ $text != *failed* ]] || fail "$2: $text"
}

# The second half of the disk is on a device that can be broken and stopped.
table() { echo "0 65536 linear /dev/vda 65536"; }
dmsetup create half --table "$(table)"
dmsetup mknodes
dmsetup create whole --table "0 65536 linear /dev/vda 0
65536 65536 linear /dev/mapper/half 0"
dmsetup mknodes
S=$PWD/s
start() { # start OPTIONS
    rm -f pid
    imgnbd -f raw -t -e 0 "$@" -k "$S" --pid-file="$PWD/pid" /dev/mapper/whole 2>messages &
    eventually test -e pid
}
start --cache=none
works $S 'write -P 1 0 64M'

dmsetup suspend half
dmsetup load half --table "0 65536 error"
dmsetup resume half
fails $S 'read 40M 64k' 'Input/output error'
fails $S 'write -P 2 40M 64k' 'Input/output error'
works $S 'read -P 1 0 64k'
works $S 'write -P 3 1M 64k'
dmsetup suspend half
dmsetup load half --table "$(table)"
dmsetup resume half
works $S 'read -P 3 1M 64k'
works $S 'read -P 1 48M 64k'
works $S 'write -P 2 40M 64k'
kill $(cat pid)
wait $! || true
[ -s messages ] || fail 'nothing was said of the errors'

# One client waits, the others go on. Nobody flushes: that waits for all media.
start
server=$!
reader=
look() { qemu-io -r -f raw nbd:unix:"$S" -c "$1" 2>&1; }
whole=/sys/block/dm-$(dmsetup info -c --noheadings -o minor whole | tr -d " ")/inflight
waiting() { read -r n _ <$whole; [ $n -gt 0 ]; }
stall() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    dmsetup suspend --nolockfs half
    look "read -P $1 $2 64k" >stalled &
    reader=$!
    eventually waiting
}
stall 2 40M
[[ $(look 'read -P 3 1M 64k') == *'read 65536'* ]] || fail 'another client does not get what works'
kill -0 $reader || fail 'the medium does not stall'
dmsetup resume half
wait $reader
grep -q '^read 65536' stalled || fail "after the stall: $(cat stalled)"

# A server whose medium does not answer gives up when it is told so twice.
stall 1 48M
kill $server
closed() { [[ $(look 'read 0 512') == *'Failed to connect'* ]]; }
eventually closed
kill -0 $server || fail 'it does not wait for the medium'
kill $server
eventually grep -q 'does not answer' messages
dmsetup resume half # the kernel lets go of it only now
eventually gone $server
wait

# Nor does the server of a device wait for ever, or hang when it is killed
# meanwhile. The device goes to whoever serves it next, with all that was
# answered.
modprobe nbd
qemu-img create -q -f qcow2 empty 48M
for signal in TERM KILL; do
    dd if=empty of=/dev/mapper/whole conv=fsync status=none
    head -c 4M /dev/urandom >data
    imgnbd -v -c /dev/nbd0 -f qcow2 /dev/mapper/whole 2>attached &
    server=$!
    eventually grep -q 'is now connected' attached
    sync /dev/mapper/whole
    dmsetup suspend --nolockfs whole
    dd if=data of=/dev/nbd0 bs=1M status=none
    kill $server
    eventually pgrep -f '^imgnbd --disconnect /dev/nbd0' >/dev/null
    kill -0 $server || fail 'it does not wait for the medium'
    [ -e /sys/block/nbd0/pid ] || fail 'it is detached, and not flushed'
    kill -$signal $server
    [ $signal = KILL ] || eventually grep -q 'does not answer: /dev/nbd0 stays attached' attached
    dmsetup resume whole
    eventually gone $server
    imgnbd devices | grep -q ' dead '
    imgnbd -c /dev/nbd0 -f qcow2 /dev/mapper/whole
    imgnbd -d /dev/nbd0
    qemu-img convert -f qcow2 -O raw /dev/mapper/whole have
    cmp -n 4194304 data have
    qemu-img check -q -f qcow2 /dev/mapper/whole || [ $? = 3 ] # leaks, as after a kill
done

# Once a sync has failed, which the kernel tells once, nobody takes the device over: his
# would succeed, and what was answered may be gone. The server stays, if it is not
# that which finds out.
broken() {
    dmsetup suspend --nolockfs half
    dmsetup load half --table "$1"
    dmsetup resume half
}
for first in client server; do
    imgnbd -v -c /dev/nbd0 -f raw /dev/mapper/whole 2>attached &
    server=$!
    eventually grep -q 'is now connected' attached
    broken '0 65536 error'
    echo answered | dd of=/dev/nbd0 bs=4k seek=10240 conv=sync oflag=direct status=none
    [ $first = server ] || refused 'Input/output error' -- python3 -c 'import os; os.fsync(os.open("/dev/nbd0", os.O_RDWR))'
    replaced() { refused "$1" -- imgnbd -c /dev/nbd0 --replace -f raw /dev/mapper/whole; }
    if [ $first = server ]; then
        replaced 'has not handed it over'
    else
        replaced 'a sync of its image has failed, so no other server can have it'
        # Whoever asks all the same gets nothing.
        python3 -c '
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/imgnbd/nbd0.sock")
assert s.recv(1) == b""'
        grep -q 'which nobody can have any more: a sync of its image has failed' attached
        kill -KILL $server
    fi
    eventually gone $server
    broken "$(table)"
    refused 'is given up, and fails from now on: a sync of its image has failed' -- imgnbd -c /dev/nbd0 -f raw /dev/mapper/whole
    eventually absent /sys/block/nbd0/pid
    free /dev/nbd0
done

# Nor does one who finds out while he opens the image for a takeover.
dd if=empty of=/dev/mapper/whole conv=fsync status=none
imgnbd -v -c /dev/nbd0 -f qcow2 /dev/mapper/whole 2>attached &
server=$!
eventually grep -q 'is now connected' attached
dd if=/dev/zero of=/dev/nbd0 bs=1M count=36 oflag=direct status=none
sync /dev/nbd0
broken '0 65536 error'
dd if=data of=/dev/nbd0 bs=1M seek=40 count=2 oflag=direct status=none
kill -KILL $server
eventually gone $server
refused 'Input/output error' 'is given up, and fails from now on: a sync of its image has failed' -- imgnbd -c /dev/nbd0 -f qcow2 /dev/mapper/whole
broken "$(table)"
eventually absent /sys/block/nbd0/pid
free /dev/nbd0

# A file system that is full, and has room again.
truncate -s 24M fs
mkfs.ext4 -q fs
mkdir m
mount -o loop fs m
imgnbd create -f qcow2 m/image 64M >/dev/null
rm -f pid
imgnbd -f qcow2 --discard=unmap -t -e 0 -k "$S" --pid-file="$PWD/pid" m/image 2>messages &
server=$!
eventually test -e pid
works $S 'write -P 5 0 1M'
head -c 30M /dev/zero >m/filler 2>/dev/null || true
fails $S 'write -P 6 8M 8M' 'No space left'
works $S 'read -P 5 0 1M'
works $S 'write -P 7 0 64k'
rm m/filler
sync -f m
works $S 'write -P 6 8M 8M'
works $S 'flush'
works $S 'read -P 6 8M 8M'
kill $server
wait $server
imgnbd check -q -f qcow2 m/image
umount m
`}, "dmsetup", "mkfs.ext4", "qemu-io", "qemu-img", "pgrep", "python3")
	t.Log(strings.TrimSpace(out))
}
