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
const remote = servers + `
truncate -s 64M disk.raw
printf ',10M\n,\n' | sfdisk -q disk.raw
mkdir m
remote() {
    local kind=$1 syncing
    echo "== $kind"
    serve $kind
    imgnbd -c /dev/nbd0 "$uri"
    nodes /dev/nbd0 1 2
    imgnbd devices | tee list
    grep -F -q "  $uri" list
    # Zeroed in the way that the server knows, whatever was attached before.
    head -c 1M /dev/urandom >/dev/nbd0p1
    blkdiscard -z -l 1M /dev/nbd0p1
    cmp -n 1048576 /dev/zero /dev/nbd0p1
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
    if [ $kind = nbdkit ]; then # over TLS the data passes through a process
        pid=$(server /dev/nbd0)
        kill -KILL $pid
        eventually gone $pid
        state dead
        # To write may wait, too, for what the journal was writing.
        { head -c 1M /dev/urandom >m/waiting && (cd m && md5sum waiting >>sums) && sync -f m; } &
        syncing=$!
        sleep 0.5
        imgnbd -c /dev/nbd0 "$uri"
        wait $syncing || fail "sync: $?"
        state live
    fi
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
}
`

func TestRemote(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Env: pkiEnv(t), Script: remote + `
remote imgnbd
remote qemu-nbd
remote nbd-server
remote nbdkit
`}, "sfdisk", "mkfs.ext4", "qemu-nbd", "nbd-server", "nbdkit")
}

func TestRemoteOlder(t *testing.T) {
	run(t, vm.Options{Kernel: "6.1", Env: pkiEnv(t), Script: remote + `
remote nbdkit
serve nbdkit
imgnbd -c /dev/nbd0 --dead-timeout=1 "$uri"
eventually guardians 1
pid=$(server /dev/nbd0)
kill -STOP $pid
dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct 2>err &
waiting=$!
eventually grep -q '[1-9]$' /sys/block/nbd0/inflight
kill -KILL $pid
eventually gone $waiting
grep -q 'Input/output error' err
imgnbd -c /dev/nbd0 "$uri" # as the kernel shuts down what it has
dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct status=none
imgnbd -d /dev/nbd0
eventually guardians 0
stop
`}, "sfdisk", "mkfs.ext4", "nbdkit", "pgrep")
}

// The server goes away for longer, comes back as another, and what tends the
// device is ended in each way.
func TestRemoteEnds(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: servers + `
truncate -s 64M disk.raw
established() { [ "$(grep -c ' 0100007F:2A3B 01 ' /proc/net/tcp)" = $1 ]; }
write() { dd if=data of=/dev/nbd0 bs=1M conv=fsync status=none; }
same() { cmp -n 4194304 data disk.raw; }
head -c 4M /dev/urandom >data

# Several connections, all of which are there again.
serve imgnbd
imgnbd -c /dev/nbd0 --connections=3 "$uri"
established 3 || fail "$(cat /proc/net/tcp)"
stop
serve imgnbd
eventually established 3
write
same

# Away for too long: an error, and nobody waits for a device by force.
stop
imgnbd -d --force /dev/nbd0
free /dev/nbd0
serve imgnbd
imgnbd -c /dev/nbd0 --dead-timeout=2 "$uri"
kill -STOP $serving
write 2>under-way & # is sent, and not answered
waiting=$!
eventually grep -q '[1-9]$' /sys/block/nbd0/inflight
stop
eventually state away
eventually gone $waiting
grep -q 'Input/output error' under-way
if write 2>err; then fail 'a write that nobody took'; fi
grep -q 'Input/output error' err

# Another export is not taken for it; the same one is, even now.
mv disk.raw right
truncate -s 32M disk.raw
serve imgnbd
sleep 3
state away
stop
mv right disk.raw
serve imgnbd
eventually state live
kill -STOP $serving
write &
sleep 3 # it may be slow
kill -CONT $serving
wait $!
same

# A signal: what nobody has flushed is written.
head -c 4M /dev/urandom >data
exec 9</dev/nbd0
dd if=data of=/dev/nbd0 bs=1M status=none
pid=$(server /dev/nbd0)
kill $pid
sleep 0.5
exec 9<&-
eventually gone $pid
free /dev/nbd0
same

# Death: the kernel goes on with the server.
imgnbd -c /dev/nbd0 "$uri"
pid=$(server /dev/nbd0)
kill -KILL $pid
eventually gone $pid
state unattended
head -c 4M /dev/urandom >data
exec 9</dev/nbd0
dd if=data of=/dev/nbd0 bs=1M status=none
imgnbd -d /dev/nbd0 2>err || true # it stays until all have closed it
exec 9<&-
same
eventually absent /sys/block/nbd0/pid
imgnbd -c /dev/nbd0 "$uri"
imgnbd -d /dev/nbd0
free /dev/nbd0

# One connection is all that some allow.
stop
imgnbd -f raw -t -b 127.0.0.1 -p 10811 -x disk disk.raw &
serving=$!
eventually reachable
refused 'allows one connection, not 2' -- imgnbd -c /dev/nbd0 --connections=2 "$uri"
refused 'nbd://127.0.0.1:10811/other: ' 'no such export' -- imgnbd -c /dev/nbd0 nbd://127.0.0.1:10811/other
free /dev/nbd0
kill $serving
`})
}

// A server's export is swapped to.
func TestRemoteSwap(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Script: servers + `
truncate -s 128M disk.raw
serve imgnbd
imgnbd -c /dev/nbd0 --swap "$uri"
mkswap -q /dev/nbd0
swapon /dev/nbd0
imgnbd devices | grep -q ' swap$'
mount -t cgroup2 none /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/small
echo 32M >/sys/fs/cgroup/small/memory.max
# tail keeps a line in memory that has no end.
bash -c 'echo $$ >/sys/fs/cgroup/small/cgroup.procs; head -c 80M /dev/zero | tr "\0" x | tail -n 1 | md5sum' >got
head -c 80M /dev/zero | tr '\0' x | md5sum | cmp - got
[ "$(sed -n 's/^pswpout //p' /proc/vmstat)" -gt 5000 ] || fail 'nothing was swapped'
refused '/dev/nbd0 is swapped to' -- imgnbd -d /dev/nbd0
swapoff /dev/nbd0
imgnbd -d /dev/nbd0
stop
`})
}

// By the name of nbd-client, its scripts go on.
func TestAsNBDClient(t *testing.T) {
	run(t, vm.Options{Kernel: "6.12", Env: pkiEnv(t), Script: servers + `
ln -s "$(command -v imgnbd)" nbd-client
real=$(command -v nbd-client)
truncate -s 16M disk.raw
mkfs.ext4 -q disk.raw
mkdir m
serve imgnbd
run() { echo "$("$@" 2>&1) $?"; }
both() {
    local theirs ours
    theirs=$(run $real "$@")
    $real -d /dev/nbd0
    eventually absent /sys/block/nbd0/pid
    ours=$(run ./nbd-client "$@")
    [ "$theirs" = "$ours" ] || fail "$*: $ours, and not $theirs"
}
both -N disk 127.0.0.1 10811 /dev/nbd0
./nbd-client -c /dev/nbd0 >pid
[ "$(cat pid)" = "$(server /dev/nbd0)" ]
[ "$(cat /proc/$(server /dev/nbd0)/comm)" = nbd-client ]
$real -c /dev/nbd0 >pid
mount /dev/nbd0 m
fill m
refused "is mounted on $PWD/m" 'imgnbd -d --force' -- ./nbd-client -d /dev/nbd0
umount m
[ -z "$(./nbd-client -d /dev/nbd0 2>&1)" ]
free /dev/nbd0
if ./nbd-client -c /dev/nbd0; then fail 'it is attached'; fi
[ "$(./nbd-client -d /dev/nbd0 2>&1)" = 'nbd-client: warning: /dev/nbd0: not attached' ]

# Without -persist the device fails when the server ends, as nbd-client's does.
./nbd-client -N disk -b 4096 -R 127.0.0.1 10811 /dev/nbd0
[ "$(blockdev --getss --getro /dev/nbd0 | tr '\n' ' ')" = '4096 1 ' ]
pid=$(server /dev/nbd0)
stop
eventually gone $pid
state dead
if dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; then fail 'somebody answers'; fi
imgnbd -d /dev/nbd0
free /dev/nbd0

# With it, the server may come back. The process is marked for systemd.
serve imgnbd
./nbd-client -N disk -persist -systemd-mark -C 2 127.0.0.1 10811 /dev/nbd0
pid=$(server /dev/nbd0)
[ "$(head -c 1 /proc/$pid/cmdline)" = @ ] || fail "$(cat /proc/$pid/cmdline)"
[ "$(cat /proc/$pid/comm)" = nbd-client ]
stop
eventually state away
serve imgnbd
mount /dev/nbd0 m
verify m
umount m
$real -d /dev/nbd0
eventually gone $pid
free /dev/nbd0

# nbdtab, also for the program by its own name.
cat >/etc/nbdtab <<.
nbd0 127.0.0.1 disk port=10811,conns=2 # a comment
nbd1 $PWD/s disk unix,bs=1024
.
[ "$(./nbd-client nbd0)" = 'Negotiation: ..size = 16MB
Negotiation: ..size = 16MB
Connected /dev/nbd0' ]
imgnbd -d /dev/nbd0
imgnbd -c nbd0 -r
[ "$(blockdev --getro /dev/nbd0)" = 1 ]
grep -q '"connections":2' /run/imgnbd/nbd0.json
imgnbd -d /dev/nbd0
refused '/etc/nbdtab: there is no line for nbd9' -- imgnbd -c /dev/nbd9
stop
serve qemu-nbd
./nbd-client nbd1 >/dev/null
[ "$(blockdev --getss /dev/nbd1)" = 1024 ]
imgnbd devices | grep -F -q "nbd+unix:///disk?socket=$PWD/s"
./nbd-client -d /dev/nbd1
stop

# TLS, with a certificate of our own.
serve nbdkit
./nbd-client -N disk -A "$CLIENT/ca-cert.pem" -F "$CLIENT/client-cert.pem" -K "$CLIENT/client-key.pem" localhost 10812 /dev/nbd0 >/dev/null
mount -o ro /dev/nbd0 m
verify m
umount m
./nbd-client -d /dev/nbd0
free /dev/nbd0
refused 'certificate' -- ./nbd-client -N disk -A "$CLIENT/ca-cert.pem" -F "$CLIENT/client-cert.pem" -K "$CLIENT/client-key.pem" -H elsewhere localhost 10812 /dev/nbd0
stop
`}, "nbd-client", "nbdkit", "mkfs.ext4", "qemu-nbd")
}
