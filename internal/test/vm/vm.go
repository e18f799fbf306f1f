//go:build linux

// Package vm runs scripts on stock kernels, for what only a kernel can judge:
// /dev/nbdX, and file systems on a disk of ours.
//
// A guest is an emulated machine of two processors whose root file system is
// that of the host, so every program and every path that a test knows is
// there. What the guest writes stays in its memory and ends with it, but for
// the folder /share. There is no udev unless the script starts it.
// install-kernels unpacks the kernels.
package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// Options describe a guest.
type Options struct {
	Kernel string   // the series: "6.1" or "6.12"
	Script string   // for bash -eu, run by root in /scratch, a file system in memory
	Env    []string // of the script, as name=value
	Memory int      // in MiB; 0: 768
	Share  string   // the folder of the host that is /share; "": one of the guest's own

	// Disks are /dev/vda and so on: files of raw images, or what QEMU opens
	// by a name, as nbd:unix:PATH. Trims and flushes of the guest reach them.
	Disks []string

	// Limit bounds the run, to end a hang. 0: five minutes.
	Limit time.Duration
}

// Run boots a guest, runs the script and returns what it printed. The test
// fails if the script does, or if the guest dies. Guests of several tests run
// one after the other: each keeps two processors busy.
func Run(t testing.TB, opt Options) string {
	t.Helper()
	program := qemu.Require(t, "qemu-system-x86_64")
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	kernels := filepath.Join(cache, "imgnbd", "kernels")
	kernel := filepath.Join(kernels, opt.Kernel)
	version, err := os.ReadFile(filepath.Join(kernel, "version"))
	if err != nil {
		qemu.Missing(t, "Linux "+opt.Kernel)
	}
	if opt.Share == "" {
		opt.Share = t.TempDir()
	}
	if opt.Limit == 0 {
		opt.Limit = 5 * time.Minute
	}
	own := filepath.Join(opt.Share, ".guest")
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(own)
	for name, text := range map[string]string{
		"start":  opt.start(kernel, strings.TrimSpace(string(version))),
		"script": opt.Script,
	} {
		if err := os.WriteFile(filepath.Join(own, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	defer takeTurn(t, kernels)()

	machine := opt.machine(t, kernel, own)
	for try := 1; ; try++ {
		e := boot(opt.Limit, program, machine, own)
		if e.status == "0" {
			t.Logf("guest with Linux %s: %.0f s", opt.Kernel, e.took.Seconds())
			return e.output
		}
		lines := 60
		if e.late {
			lines = 400 // what hangs, and where
		}
		report := fmt.Sprintf("guest with Linux %s: %s\n%s%s--- console:\n%s", opt.Kernel, e.status, e.output, e.messages, tail(e.console, lines))
		if e.booted || e.late || try == 3 {
			t.Fatal(report)
			return ""
		}
		// Nothing of ours has run in it. The emulated processor errs now and then.
		t.Logf("booted once more: %s", report)
	}
}

// end is what is left of a guest.
type end struct {
	booted            bool   // the script began
	late              bool   // the guest was ended, since it did not itself
	status            string // of the script, or what came instead
	output            string // of the script
	messages, console string // of QEMU, and of the kernel
	took              time.Duration
}

// boot starts a machine and waits for its end.
func boot(limit time.Duration, program string, machine []string, own string) (e end) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, machine...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	messages, err := cmd.CombinedOutput()
	e.took, e.messages = time.Since(began), string(messages)
	read := func(name string) string {
		b, _ := os.ReadFile(filepath.Join(own, name)) // none: it was not reached
		return string(b)
	}
	_, missing := os.Stat(filepath.Join(own, "output"))
	e.booted = missing == nil
	e.output, e.status, e.console = read("output"), strings.TrimSpace(read("status")), read("console")
	switch {
	case e.status == "0":
	case ctx.Err() != nil:
		e.late = true
		e.status = fmt.Sprintf("no end within %v", limit)
	case e.status == "":
		e.status = fmt.Sprintf("the guest died: %v", err)
	default:
		e.status = "exit status " + e.status
	}
	return e
}

// start is what the guest runs in the host's root.
func (opt *Options) start(kernel, version string) string {
	var b strings.Builder
	modules := "/lib/modules/" + version
	fmt.Fprintf(&b, `export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
mkdir -p %[1]s && mount --bind %[2]s%[1]s %[1]s
mkdir -p /dev/pts /dev/shm /run/lock /run/mount
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
`, modules, quote(kernel))
	for _, e := range opt.Env {
		fmt.Fprintf(&b, "export %s\n", quote(e))
	}
	// A guest that hangs tells where before it is ended.
	fmt.Fprintf(&b, "{ sleep %.0f; dmesg -n 8; ps axo pid,ppid,stat,wchan:24,args; echo w >/proc/sysrq-trigger; } >/dev/console 2>&1 &\n",
		max(opt.Limit-20*time.Second, opt.Limit/2).Seconds())
	b.WriteString(`cd /scratch
setsid bash -eu /share/.guest/script </dev/null >/share/.guest/output 2>&1
echo $? >/share/.guest/status
sync -f /share/.guest/status
echo b >/proc/sysrq-trigger
sleep 100
`)
	return b.String()
}

// quote makes one word of s for a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// machine returns the arguments of QEMU.
func (opt *Options) machine(t testing.TB, kernel, own string) []string {
	memory := opt.Memory
	if memory == 0 {
		memory = 768
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,graphics=off",
		"-accel", "tcg,thread=multi,tb-size=256",
		// Emulated, a string instruction moves bytes one by one, and once cmpxchg16b, which
		// the kernel's allocator uses, left flags that no processor has: the guest died.
		"-cpu", "max,-erms,-cx16",
		"-smp", "2", "-m", strconv.Itoa(memory),
		"-kernel", filepath.Join(kernel, "vmlinux"), "-initrd", filepath.Join(kernel, "initramfs"),
		"-append", "console=ttyS0 panic=-1 mitigations=off nokaslr nowatchdog random.trust_cpu=on audit=0 loglevel=6 cryptomgr.notests no_timer_check " + clock(t),
		"-serial", "file:" + filepath.Join(own, "console"),
		"-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
		"-fsdev", "local,id=share,security_model=none,path=" + comma(opt.Share), "-device", "virtio-9p-pci,fsdev=share,mount_tag=share",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	}
	for i, d := range opt.Disks {
		args = append(args,
			"-drive", fmt.Sprintf("file=%s,format=raw,if=none,id=d%d,cache=none,discard=unmap", comma(d), i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return args
}

// comma writes a value for a list of QEMU's.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// clock tells the kernel the rate of its clock, which is the host's. To
// measure it on a busy host goes wrong: time then runs ten times too fast.
func clock(t testing.TB) string {
	t.Helper()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	_, mhz, _ := strings.Cut(string(info), "cpu MHz")
	mhz, _, _ = strings.Cut(strings.TrimLeft(mhz, "\t :"), "\n")
	rate, err := strconv.ParseFloat(mhz, 64)
	if err != nil {
		t.Fatalf("/proc/cpuinfo: cpu MHz: %v", err)
	}
	return fmt.Sprintf("tsc=reliable tsc_early_khz=%.0f", rate*1000)
}

// takeTurn waits until no other guest of this user runs.
func takeTurn(t testing.TB, dir string) (done func()) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatalf("%s: lock: %v", dir, err)
	}
	return func() { f.Close() }
}

func tail(s string, lines int) string {
	all := strings.SplitAfter(s, "\n")
	return strings.Join(all[max(len(all)-lines, 0):], "")
}
