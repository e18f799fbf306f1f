//go:build linux && !race

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/internal/test/vm"
)

// What attached devices cost their servers: ours with one connection and with
// several, and qemu-nbd, one after the other, repeatedly, in one guest. The
// kernel counts the system calls, in runs of their own, since to count costs.
const speed = `
mount -t tracefs tracefs /sys/kernel/tracing
calls=/sys/kernel/tracing/events/raw_syscalls/sys_enter
modprobe nbd
dd if=/dev/zero of=disk bs=1M count=128 status=none
attach() {
    case $1 in
    qemu-nbd) qemu-nbd -c /dev/nbd0 -f raw disk ;;
    imgnbd*) imgnbd -c /dev/nbd0 --connections=${1#imgnbd-} -f raw disk ;;
    esac
    eventually sh -c '[ "$(cat /sys/block/nbd0/size)" = 262144 ] && : </dev/nbd0'
    pid=$(pgrep -x "${1%-?}")
}
detach() {
    imgnbd -d /dev/nbd0 >/dev/null
    eventually gone $pid
}
load() {
    fio --name=load --filename=/dev/nbd0 --direct=1 --ioengine=libaio --thread --norandommap --randrepeat=1 \
        --group_reporting --output-format=terse --terse-version=3 "$@" | cut -d';' -f8,49 | tr ';' ' '
}
ticks() { sed 's/.*) //' /proc/$pid/stat | awk '{ print $12 + $13 }'; }
# run SERVER NAME OPERATIONS FIO-OPTIONS...
run() {
    local server=$1 name=$2 n=$3 before after iops count
    shift 3
    before=$(ticks)
    iops=$(load --number_ios=$n "$@")
    after=$(ticks)
    echo 'hist:keys=common_pid:size=8192' >$calls/trigger
    load --number_ios=$((n / 4)) "$@" >/dev/null
    cat $calls/hist >hist
    echo '!hist:keys=common_pid:size=8192' >$calls/trigger
    count=0
    for t in $(cd /proc/$pid/task && echo *); do
        count=$((count + $(awk -v t=$t '$3 == t { n += $6 } END { print n + 0 }' hist)))
    done
    echo "RUN $server $name $JOBS $n $((after - before)) $count $iops"
}
for round in $(seq $ROUNDS); do
    for server in imgnbd-1 qemu-nbd imgnbd-4; do
        attach $server
        JOBS=1 run $server read-4k-qd1 $((OPS / 2)) --rw=randread --bs=4k --iodepth=1
        JOBS=1 run $server read-4k-qd32 $OPS --rw=randread --bs=4k --iodepth=32
        JOBS=2 run $server write-4k-qd32-x2 $((OPS / 2)) --rw=randwrite --bs=4k --iodepth=32 --numjobs=2
        JOBS=1 run $server read-256k-qd8 $((OPS / 8)) --rw=read --bs=256k --iodepth=8
        detach
    done
done
`

func BenchmarkDevice(b *testing.B) {
	for _, tool := range []string{"qemu-nbd", "fio"} {
		qemu.Require(b, tool)
	}
	prelude, err := os.ReadFile("testdata/prelude.sh")
	if err != nil {
		b.Fatal(err)
	}
	rounds, ops := 5, 2400
	for b.Loop() {
		out := vm.Run(b, vm.Options{Kernel: "6.12", Limit: time.Hour, Memory: 1024,
			Env:    []string{fmt.Sprintf("ROUNDS=%d", rounds), fmt.Sprintf("OPS=%d", ops)},
			Script: "PATH=" + filepath.Dir(imgnbd) + ":$PATH\n" + string(prelude) + speed})
		b.Log("\n" + speedTable(b, out))
	}
}

// A cost is what one run took for an operation.
type cost struct{ cpu, calls float64 }

// speedTable has a row for each load and server: medians, and the median of
// the ratios to qemu-nbd in the same round.
func speedTable(b *testing.B, out string) string {
	var loads, servers []string
	costs := map[string][]cost{}
	for line := range strings.Lines(out) {
		var server, load string
		var jobs, n, ticks, calls int
		if _, err := fmt.Sscanf(line, "RUN %s %s %d %d %d %d", &server, &load, &jobs, &n, &ticks, &calls); err != nil {
			continue
		}
		total := float64(jobs * n)
		costs[load+server] = append(costs[load+server], cost{float64(ticks) * 1e4 / total, float64(calls) * 4 / total})
		if !slices.Contains(loads, load) {
			loads = append(loads, load)
		}
		if !slices.Contains(servers, server) {
			servers = append(servers, server)
		}
	}
	if len(loads) == 0 {
		b.Fatalf("no runs:\n%s", out)
	}
	var t strings.Builder
	t.WriteString("| load | server | CPU | of qemu-nbd's | system calls | of qemu-nbd's |\n|---|---|---|---|---|---|\n")
	for _, load := range loads {
		peer := costs[load+"qemu-nbd"]
		for _, server := range servers {
			var cpu, calls, cpuRatio, callsRatio []float64
			for i, c := range costs[load+server] {
				cpu, calls = append(cpu, c.cpu), append(calls, c.calls)
				if i < len(peer) {
					cpuRatio, callsRatio = append(cpuRatio, c.cpu/peer[i].cpu), append(callsRatio, c.calls/peer[i].calls)
				}
			}
			fmt.Fprintf(&t, "| %s | %s | %.1f µs | %s | %.2f | %s |\n", load, server, median(cpu), spread(cpuRatio), median(calls), spread(callsRatio))
		}
	}
	return t.String()
}

func median(x []float64) float64 {
	x = slices.Sorted(slices.Values(x))
	return x[len(x)/2]
}

func spread(x []float64) string {
	if len(x) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", median(x), slices.Min(x), slices.Max(x))
}
