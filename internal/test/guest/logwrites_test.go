//go:build linux && !race

package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// The kernel notes what reaches the disk under the file system that holds an
// image, and when. After a power cut at any flush of ours the image is sound and
// has all that was flushed before; between them it is sound.
func TestLogWrites(t *testing.T) {
	dir := t.TempDir()
	replay := filepath.Join(dir, "logwrites")
	cmd := exec.Command("go", "build", "-o", replay, "../logwrites")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	var disks []string
	for name, size := range map[string]int64{"a-disk": 96 << 20, "b-log": 1 << 30} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
	}
	disks = append(disks, filepath.Join(dir, "a-disk"), filepath.Join(dir, "b-log"))
	rounds := "4"
	if full {
		rounds = "14"
	}
	out := run(t, vm.Options{Kernel: "6.12", Disks: disks, Env: []string{"REPLAY=" + replay, "ROUNDS=" + rounds}, Script: `
modprobe dm-log-writes; modprobe ext4; modprobe loop
dmsetup create log --table "0 $(blockdev --getsz /dev/vda) log-writes /dev/vda /dev/vdb"
dmsetup mknodes
D=/dev/mapper/log
mkfs.ext4 -q $D
mkdir m r
mount $D m
imgnbd create -f qcow2 -o cluster_size=4k m/image 16M >/dev/null
truncate -s 16M model
imgnbd -f qcow2 --discard=unmap -t -k "$PWD/s" --pid-file="$PWD/pid" m/image &
eventually test -e pid
sync -f m
seed=1
random() { seed=$(((seed * 1103515245 + 12345) & 0x7fffffff)); r=$((seed / 7 % $1)); } # no subshell
for ((i = 1; i <= ROUNDS; i++)); do
    commands=()
    for ((k = 0; k < 12; k++)); do
        random 60; n=$((1 + r))
        random 4000; at=$r
        if [ $k -lt 9 ]; then
            commands+=(-c "write -q -P $((i * 16 + k)) $((at * 4096 + 512 * (k % 3))) $((n * 2048))")
            head -c $((n * 2048)) /dev/zero | tr '\0' "\\$(printf %03o $((i * 16 + k)))" |
                dd of=model conv=notrunc oflag=seek_bytes seek=$((at * 4096 + 512 * (k % 3))) status=none
        else
            commands+=(-c "write -q -z -u $((at * 4096)) $((n * 4096))")
            head -c $((n * 4096)) /dev/zero | dd of=model conv=notrunc oflag=seek_bytes seek=$((at * 4096)) status=none
        fi
    done
    qemu-io -f raw nbd:unix:"$PWD/s" "${commands[@]}" -c flush
    dmsetup message log 0 mark flushed-$i
    cp --sparse=always model model-$i
done
kill $(cat pid); wait
umount m
dmsetup remove log

# What the disk had at one moment, as a machine finds it that starts again.
after() {
    rm -f disk
    $REPLAY /dev/vdb disk $1
    truncate -s 96M disk
    mount -o loop disk r
    status=0
    imgnbd check -q -f qcow2 r/image >said 2>&1 || status=$?
    [ $status = 0 ] || [ $status = 3 ] || { cat said; fail "after $1 entries: check ends with $status"; }
}
$REPLAY /dev/vdb >list
count=$(head -n 1 list) last= points=0
while read -r entry mark; do
    case $mark in flushed-*) ;; *) continue ;; esac
    if [ -n "$last" ]; then
        for part in 1 2 3; do
            after $((last + (entry - last) * part / 4))
            umount r
            points=$((points + 1))
        done
    fi
    after $entry
    qemu-img compare -q -f raw -F qcow2 model-${mark#flushed-} r/image || fail "after $mark: other data"
    umount r
    points=$((points + 1))
    last=$entry
done <<<"$(tail -n +2 list)"
echo "$points points of $count entries"
[ $points -ge $ROUNDS ]
! cmp -s model model-1 || fail 'nothing was written'
`}, "dmsetup", "mkfs.ext4", "qemu-io", "qemu-img")
	t.Log(strings.TrimSpace(out))
}
