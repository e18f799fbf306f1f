//go:build linux && !race

package guest

import (
	"crypto/tls"
	"crypto/x509/pkix"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/pki"
	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// servers starts and stops one of each kind, with the export disk of disk.raw,
// at a port of 127.0.0.1 or at the socket s. Where clients are counted, four
// may come.
const servers = `
modprobe nbd
cat >server.conf <<.
[generic]
port = 10810
listenaddr = 127.0.0.1
[disk]
exportname = $PWD/disk.raw
flush = true
fua = true
.
# serve KIND [OPTION...]: $uri says where, $serving is its process or group.
serve() {
    local kind=$1
    shift
    rm -f s
    case $kind in
    imgnbd)
        uri=nbd://127.0.0.1:10811/disk
        imgnbd -t -e 4 -f raw -b 127.0.0.1 -p 10811 -x disk "$@" disk.raw & ;;
    qemu-nbd)
        uri="nbd+unix:///disk?socket=$PWD/s"
        qemu-nbd -t -e 4 -f raw -k "$PWD/s" -x disk "$@" disk.raw & ;;
    nbd-server)
        uri=nbd://127.0.0.1:10810/disk
        nbd-server -C server.conf -p $PWD/server.pid ;;
    nbdkit)
        uri=nbds://localhost:10812/disk?tls-certificates=$CLIENT
        nbdkit -f -i 127.0.0.1 -p 10812 --tls=require --tls-verify-peer --tls-certificates="$SERVER" file disk.raw & ;;
    esac
    serving=$!
    eventually reachable
    [ $kind != nbd-server ] || serving=-$(cat server.pid) # and those of its clients
}
reachable() {
    case $uri in
    *socket=*) test -S s ;;
    *) (exec 3<>"/dev/tcp/127.0.0.1/$(expr "$uri" : '.*:\([0-9]*\)/')") ;;
    esac
}
stop() {
    kill -KILL -- $serving
    eventually gone $serving
}
state() { imgnbd devices | grep -q "^/dev/nbd0 .* $1 "; }
`

func pkiEnv(t *testing.T) []string {
	ca := pki.New(t)
	return []string{
		"SERVER=" + ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost")}),
		"CLIENT=" + ca.Dir(map[string]tls.Certificate{"client": ca.Client(nil, pkix.Name{CommonName: "client"})}),
	}
}

// A server's export is a device with partitions and a file system. The server
// is killed while that is in use, and comes back: nothing is lost, and nobody
// sees an error.
func TestRemote(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Env: pkiEnv(t), Script: servers + `
truncate -s 64M disk.raw
printf ',10M\n,\n' | sfdisk -q disk.raw
mkdir m
for kind in imgnbd qemu-nbd nbd-server nbdkit; do
    echo "== $kind"
    serve $kind
    imgnbd -c /dev/nbd0 "$uri"
    nodes /dev/nbd0 1 2
    imgnbd devices | tee list
    grep -F -q "  $uri" list
    mkfs.ext4 -q -F /dev/nbd0p2
    mount /dev/nbd0p2 m
    fill m
    sync -f m
    head -c 4M /dev/urandom >m/more
    (cd m && md5sum more >>sums)
    stop
    eventually state away
    sync -f m &
    syncing=$!
    sleep 0.5
    serve $kind
    wait $syncing || fail "sync: $?"
    state live || fail "$(imgnbd devices)"
    head -c 1M /dev/urandom >m/later
    (cd m && md5sum later >>sums)
    sync -f m
    umount m
    [ "$(imgnbd -d /dev/nbd0)" = '/dev/nbd0 disconnected' ]
    free /dev/nbd0
    imgnbd -r -c /dev/nbd0 "$uri"
    [ "$(blockdev --getro /dev/nbd0)" = 1 ]
    mount -o ro /dev/nbd0p2 m
    verify m
    umount m
    imgnbd -d /dev/nbd0
    stop
done
`}, "sfdisk", "mkfs.ext4", "qemu-nbd", "nbd-server", "nbdkit")
}
