//go:build linux && !race

package guest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// Images on NFS, with the kernel's own server. What was written is in the file
// that the server has, locks hold on both sides, holes are made, what a killed
// server had answered is there, and a flush tells that there is no room.
func TestNFS(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	run(t, vm.Options{Kernel: "6.12", Disks: []string{disk}, Script: `
mkfs.ext4 -q /dev/vda
mkdir /exported /nfs
mount -t ext4 /dev/vda /exported
modprobe nfsd; modprobe nfsv4
mount -t nfsd nfsd /proc/fs/nfsd
mkdir -p /var/lib/nfs/v4recovery
echo -3 >/proc/fs/nfsd/versions
# What exportfs and mountd would answer. The flags of the export: insecure
# ports, no subtree check, fsid.
end=$(($(date +%s) + 100000))
echo "nfsd 127.0.0.1 $end all" >/proc/net/rpc/auth.unix.ip/channel
echo "all /exported $end $((0x2402)) -2 -2 0" >/proc/net/rpc/nfsd.export/channel
echo "all 1 \\x00000000 $end /exported" >/proc/net/rpc/nfsd.fh/channel
echo tcp 2049 >/proc/fs/nfsd/portlist || [ $? = 1 ] # there is no rpcbind
echo 4 >/proc/fs/nfsd/threads
busybox mount -t nfs4 -o vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/ /nfs

S=$PWD/s
uri="nbd+unix:///?socket=$S"
serve() { # serve OPTION... IMAGE
    rm -f pid "$S"
    imgnbd -t -e 0 -k "$S" --pid-file="$PWD/pid" "$@" 2>messages &
    server=$!
    eventually test -e pid
}
end() { kill $server; wait $server; }
io() { # io COMMAND...: qemu-io runs each
    local text args=()
    for c; do args+=(-c "$c"); done
    text=$(qemu-io -f raw nbd:unix:"$S" "${args[@]}" 2>&1) || fail "$*: $text"
    [[ $text != *failed* ]] || fail "$*: $text"
}
head -c 8M /dev/urandom >data
for format in raw qcow2; do
    for cache in writeback none; do
        imgnbd create -q -f $format /nfs/image 32M
        serve -f $format --cache=$cache --discard=unmap /nfs/image
        nbdcopy --flush data "$uri"
        io 'write -P 7 30M 1M' 'write -z 30M 64k' 'discard 4M 1M' 'write -f -P 8 20M 4k' flush
        io 'read -P 0 30M 64k' 'read -P 7 31522816 64k' 'read -P 0 4M 1M' 'read -P 8 20M 4k'
        for there in /nfs /exported; do
            refused 'Failed to get shared "write" lock' -- imgnbd -r -f $format --run=true $there/image
        done
        nbdcopy "$uri" copy
        end
        qemu-img compare -q -f $format -F raw /exported/image copy
        cmp -n 4M data copy
        [ $(du -k /exported/image | cut -f1) -lt 12000 ] || fail "$format $cache: no holes"
        [ $format = raw ] || qemu-img check -q /exported/image
        rm /nfs/image
    done
done

# What was answered outlasts a kill.
imgnbd create -q -f qcow2 /nfs/image 32M
serve -f qcow2 /nfs/image
io 'write -P 1 0 4M' flush 'write -P 2 1M 64k'
kill -KILL $server
wait $server || true
serve -f qcow2 /nfs/image
io 'read -P 1 0 1M' 'read -P 2 1M 64k' 'read -P 1 1114112 2M'
end
qemu-img check -q /exported/image
rm /nfs/image

# A full server.
imgnbd create -q -f qcow2 /nfs/image 1G
serve -f qcow2 /nfs/image
head -c 100M /dev/urandom >large
refused 'No space left on device' -- nbdcopy --flush large "$uri"
kill $server
! wait $server || fail 'that data was lost is not told at the end'
grep -q 'o space left on device' messages || fail "messages: $(cat messages)"
qemu-img check /exported/image >check 2>&1 || [ $? = 3 ] || fail "$(cat check)" # leaks
`}, "mkfs.ext4", "busybox", "nbdcopy", "qemu-io")
}
