package qcow2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/hostile"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// hardRepairs are damages whose repair takes every path.
var hardRepairs = map[string]func(e *editor){
	"counts": func(e *editor) {
		for c := int64(1); c < 40; c += 3 {
			e.setCount(c, uint64(c%4))
		}
	},
	"refcount block": func(e *editor) { e.put(e.refTable(0), 0) },
	"refcount table": func(e *editor) { binary.BigEndian.PutUint32(e.b[56:], 0) },
	"table is data": func(e *editor) {
		e.put(e.l2(0, 1), flagCopied|uint64(l1Entry(e.word(e.l1(0))).host()))
		e.put(e.l2(0, 2), flagCopied|e.h.l1Offset)
		e.put(e.l2(0, 3), flagCopied|e.word(e.refTable(0)))
	},
	"entries": func(e *editor) {
		e.xor(e.l2(0, 0), 1<<58)
		e.xor(e.l1(1), 1<<58)
		e.put(e.l2(0, 40), 513)
		e.put(e.l2(0, 41), e.word(e.l2(0, 0)))
		e.put(e.l2(0, 30), 0)
	},
	"cut off":   func(e *editor) { e.b = e.b[:len(e.b)-40<<12] },
	"snapshots": func(e *editor) { e.put(int64(e.h.snapshotOffset)+36, 0) },
	"flags": func(e *editor) {
		e.xor(e.l1(0), flagCopied)
		for i := range int64(20) {
			e.xor(e.l2(0, i), flagCopied)
		}
	},
	"bitmaps": func(e *editor) {
		x, err := e.h.bitmapsExtension()
		if err != nil {
			e.t.Fatal(err)
		}
		e.put(int64(e.word(int64(x.offset))), 513)
	},
	"bitmap directory": func(e *editor) {
		x, err := e.h.bitmapsExtension()
		if err != nil {
			e.t.Fatal(err)
		}
		e.put(int64(x.offset), 512)
	},
	"bits": func(e *editor) { e.xor(72, uint64(incompatCorrupt|incompatDirty)); e.put(e.l2(0, 7), 0) },
}

// repairBase is an image with all that can be damaged.
func repairBase(t testing.TB) []byte { return repairBaseOf(t, "1.1") }

// repairBaseOf is one with the features of some QEMU: without bitmaps, which
// version 2 does not know, if that is 0.10.
func repairBaseOf(t testing.TB, compat string) []byte {
	r := recipe{options: "cluster_size=4k,compat=" + compat, io: writes, size: "8M"}
	file := r.make(t)
	qemu.Img(t, "snapshot", "-c", "first", file)
	qemu.IO(t, "qcow2", file, "write -P 0x91 0 60k", "discard 3M 64k", "write -P 0x92 900k 200k")
	if compat != "0.10" {
		qemu.Img(t, "bitmap", "--add", "-g", "512", file, "fine")
	}
	qemu.IO(t, "qcow2", file, "write -P 0x93 7M 100k")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func damaged(t testing.TB, b []byte, change func(e *editor)) []byte {
	t.Helper()
	h, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	e := &editor{t, append([]byte(nil), b...), h, newGeometry(h)}
	change(e)
	return e.b
}

func repairStore(s storage.Store, what image.Repair) (image.CheckResult, []string, error) {
	var findings []string
	res, err := check(context.Background(), s, image.Options{}, image.CheckOptions{
		Repair: what,
		Report: func(f image.Finding) { findings = append(findings, f.Text) },
	})
	return res, findings, err
}

// sound returns an error unless the image can be repaired, is clean then, and
// reads as before in all three states.
func soundAfterRepair(t testing.TB, s storage.Store, before guestView) error {
	if err := before.kept(viewStore(t, s)); err != nil {
		return fmt.Errorf("before the second repair: %w", err)
	}
	if _, findings, err := repairStore(s, image.RepairAll); err != nil {
		return fmt.Errorf("second repair: %w\n%s", err, strings.Join(findings, "\n"))
	}
	res, findings, err := repairStore(s, image.RepairNothing)
	if err == nil && res.Corruptions+res.Leaks+res.CheckErrors > 0 {
		err = errors.New(strings.Join(findings, "\n"))
	}
	if err != nil {
		return fmt.Errorf("after the second repair: %w", err)
	}
	if err := before.kept(viewStore(t, s)); err != nil {
		return fmt.Errorf("after the second repair: %w", err)
	}
	return nil
}

// writersVerdict is what writers that know nothing of a repair make of an
// image.
type writersVerdict struct {
	ours, theirs error           // why they cannot write to it
	wrong        map[string]bool // clusters that lack counts, before or after, and what else they changed
}

// What those write, where some of the image is not allocated.
const writtenAt, writtenSize = 3200 << 10, 512 << 10

// writeOurs lets our writer write to an image.
func writeOurs(t testing.TB, s storage.Store) error {
	t.Helper()
	im, err := Open(t.Context(), shared{s}, image.Options{})
	if err != nil {
		return err
	}
	return errors.Join(im.WriteAt(bytes.Repeat([]byte{0x55}, writtenSize), writtenAt, 0), im.Flush(), im.Close())
}

// judgeWriters lets our writer and QEMU's write to copies of an image.
func judgeWriters(t testing.TB, b []byte, before guestView) (v writersVerdict) {
	t.Helper()
	v.wrong = map[string]bool{}
	note := func(findings []string) {
		for _, f := range findings {
			var cluster, stored, refs uint64
			if n, _ := fmt.Sscanf(f, "ERROR cluster %d refcount=%d reference=%d", &cluster, &stored, &refs); n == 3 && stored < refs {
				v.wrong[f] = true
			}
		}
	}
	mem := storagetest.MemOf(b)
	v.ours = writeOurs(t, mem)
	after := viewStore(t, mem)
	for off := int64(0); off < 8<<20; off += 4 << 10 {
		place := fmt.Sprintf("disk %#x", off)
		if was, ok := before[place]; ok && (off < writtenAt || off >= writtenAt+writtenSize) && !bytes.Equal(was, after[place]) {
			v.wrong[place+" changed"] = true
		}
	}
	_, findings, _ := repairStore(mem, image.RepairNothing)
	note(findings)

	file := filepath.Join(t.TempDir(), "i.qcow2")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if binary.BigEndian.Uint32(b[4:]) < 3 || b[79]&byte(incompatDirty) == 0 { // else QEMU too repairs it first
		note(strings.Split(qemu.Try(t, "qemu-img", "check", "-f", "qcow2", file).Stderr, "\n"))
	}
	if r := qemu.Try(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 0x55 %d %d", writtenAt, writtenSize), file); r.Code != 0 || strings.Contains(r.Stdout+r.Stderr, " failed: ") {
		v.theirs = errors.New(r.Stdout + r.Stderr)
	}
	note(strings.Split(qemu.Try(t, "qemu-img", "check", "-f", "qcow2", file).Stderr, "\n"))
	return v
}

// worse returns what writers can do no more that they could, or do wrong that
// they did not.
func (v writersVerdict) worse(after writersVerdict) error {
	switch {
	case v.ours == nil && after.ours != nil:
		return fmt.Errorf("our writer: %w", after.ours)
	case v.theirs == nil && after.theirs != nil:
		return fmt.Errorf("QEMU's writer: %w", after.theirs)
	}
	for what := range after.wrong {
		if !v.wrong[what] {
			return errors.New(what)
		}
	}
	return nil
}

// repairStores are the kinds of store that an image is repaired on.
var repairStores = map[string]storage.Info{
	"file":   {NewReadsZero: true},
	"device": {FixedSize: true},
}

// onStore returns what a store of that kind holds: a device has room behind
// the image, full of other bytes.
func onStore(b []byte, info storage.Info) []byte {
	if info.FixedSize {
		for range 64 << 12 {
			b = append(b, 0xa5)
		}
	}
	return b
}

// TestRepairPowerCut cuts the power at every step of a repair. What is there
// then is no worse for writers than what the repair began with, and a repair
// that is begun again succeeds.
func TestRepairPowerCut(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	bases := map[string][]byte{"": repairBase(t), "/version 2": repairBaseOf(t, "0.10")}
	samples := int(min(crashRuns(2), 20))
	if testing.Short() {
		samples = 1
	}
	var points, judged atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d power cuts while images were repaired, %d of them judged by writers", points.Load(), judged.Load())
	})
	for version, base := range bases {
		for name, change := range hardRepairs {
			if version != "" && (strings.HasPrefix(name, "bit") || name == "snapshots") {
				continue // version 2 has no such thing
			}
			for kind, info := range repairStores {
				if name == "cut off" && info.FixedSize {
					continue // a device cannot grow
				}
				t.Run(name+"/"+kind+version, func(t *testing.T) {
					t.Parallel()
					b := onStore(damaged(t, base, change), info)
					before := viewStore(t, storagetest.MemOf(b))
					log := new(storagetest.Log)
					store := log.NewStore(b, info)
					if res, findings, err := repairStore(store, image.RepairAll); err != nil || res.CorruptionsFixed+res.LeaksFixed == 0 && name != "bits" {
						t.Fatal(res, findings, err)
					}
					if err := soundAfterRepair(t, storagetest.MemOf(store.Bytes()), before); err != nil {
						t.Fatal(err)
					}
					writers := judgeWriters(t, b, before)
					known := map[[sha256.Size]byte]bool{sha256.Sum256(b): true}
					judge := func(b []byte) error {
						sum := sha256.Sum256(b)
						if known[sum] {
							return nil
						}
						known[sum] = true
						judged.Add(1)
						return writers.worse(judgeWriters(t, b, before))
					}
					rnd := rand.New(rand.NewPCG(1, 2))
					disk := log.NewDisk(rnd)
					events := log.Events()
					for i, e := range events {
						disk.Step(e)
						cuts := [][]byte{disk.Cache(0)} // a kill
						for range samples {
							points.Add(1)
							cuts = append(cuts, disk.Crash()[0])
						}
						for _, cut := range cuts {
							err := judge(cut)
							if err == nil {
								err = soundAfterRepair(t, storagetest.MemOf(cut), before)
							}
							if err != nil {
								t.Fatalf("cut off after event %d of %d: %v", i, len(events), err)
							}
						}
					}
				})
			}
		}
	}
}

// TestRepairFaults fails each operation of a repair once. The repair says so,
// unless it can do without, and one that comes later succeeds.
func TestRepairFaults(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	base := repairBase(t)
	for name, change := range hardRepairs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := damaged(t, base, change)
			before := viewStore(t, storagetest.MemOf(b))
			writable := writeOurs(t, storagetest.MemOf(b)) == nil
			for k := 1; ; k++ {
				mem := storagetest.MemOf(b)
				fail := storagetest.Failure{Err: []error{syscall.EIO, syscall.ENOSPC}[k%2], Done: int64(k % 3 * 512)}
				faulty := storagetest.Fault(mem, storagetest.Nth(storagetest.OpAny, k, fail))
				res, findings, err := repairStore(faulty, image.RepairAll)
				if len(faulty.Injected()) == 0 {
					if k < 10 {
						t.Errorf("%d operations", k)
					}
					return
				}
				if err == nil && res.CheckErrors == 0 && !strings.Contains(strings.Join(findings, "\n"), "Rebuilding") {
					t.Fatalf("%v was not noticed: %+v\n%s", faulty.Injected(), res, strings.Join(findings, "\n"))
				}
				if err := writeOurs(t, storagetest.MemOf(mem.Bytes())); err != nil && writable {
					t.Fatalf("after %v: our writer: %v", faulty.Injected(), err)
				}
				if err := soundAfterRepair(t, mem, before); err != nil {
					t.Fatalf("after %v: %v", faulty.Injected(), err)
				}
			}
		})
	}
}

// FuzzCheckRepair: an image of which a repair says that nothing is wrong any
// more is clean, and a second repair finds nothing to do. What a guest could
// read it still can.
func FuzzCheckRepair(f *testing.F) {
	for _, b := range seeds() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4<<20 {
			return
		}
		s := storagetest.MemOf(b)
		before := viewFuzz(t, s)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		findings := 0
		what := image.CheckOptions{Repair: image.RepairAll, Report: func(image.Finding) {
			if findings++; findings > 1<<16 {
				cancel()
			}
		}}
		said, err := check(ctx, s, image.Options{}, what)
		if err != nil {
			if err := before.kept(viewFuzz(t, s)); err != nil {
				t.Fatalf("a repair that failed: %v", err)
			}
			return
		}
		if err := before.kept(viewFuzz(t, s)); err != nil {
			t.Fatal(err)
		}
		res, lines, err := repairStore(s, image.RepairNothing)
		if said.Corruptions > 0 || said.CheckErrors > 0 {
			return
		}
		if err != nil || res.Leaks+res.Corruptions+res.CheckErrors > 0 {
			t.Fatalf("after a repair that said %+v: %+v, %v\n%s", said, res, err, strings.Join(lines, "\n"))
		}
		if res, lines, err := repairStore(s, image.RepairAll); err != nil || res.LeaksFixed+res.CorruptionsFixed > 0 {
			t.Fatalf("second repair: %+v, %v\n%s", res, err, strings.Join(lines, "\n"))
		}
	})
}

// viewFuzz is the part of a guest's view that takes little time.
func viewFuzz(t testing.TB, s storage.Store) guestView {
	v := guestView{}
	im, err := Open(context.Background(), shared{s}, image.Options{ReadOnly: true})
	if err != nil {
		return v
	}
	defer im.Close()
	for off := int64(0); off < min(im.Info().Size, 1<<20); off += 4096 {
		b := make([]byte, min(4096, im.Info().Size-off))
		if _, err := im.ReadAt(b, off); err == nil {
			v[fmt.Sprint(off)] = b
		}
	}
	return v
}

// shared is a store that stays open.
type shared struct{ storage.Store }

func (shared) Close() error { return nil }

// TestRepairHostilePowerCut cuts the power while images are repaired that lie
// in any way: what guests could read they can, and a repair that would have
// come to a good end does so when it is begun again.
func TestRepairHostilePowerCut(t *testing.T) {
	n := 30 * crashRuns(4)
	if testing.Short() {
		n = 30
	}
	points, mended := 0, 0
	for seed := range n {
		r := rand.New(rand.NewPCG(seed, 9))
		img := hostile.New(r.IntN, 4)
		b := img.Parts[0].Data
		before := viewFuzz(t, storagetest.MemOf(b))
		log := new(storagetest.Log)
		store := log.NewStore(b, repairStores[[]string{"file", "device"}[r.IntN(2)]])
		said, _, err := repairStore(store, image.RepairAll)
		good := err == nil && said.Corruptions == 0 && said.CheckErrors == 0
		if size, err := store.Size(); err != nil || size > 4<<20 {
			continue // it grew by what is not there, and would be slow
		}
		if good {
			mended++
		}
		disk := log.NewDisk(r)
		for i, e := range log.Events() {
			disk.Step(e)
			points++
			cut := storagetest.MemOf(disk.Crash()[0])
			err := before.kept(viewFuzz(t, cut))
			if err == nil && good {
				_, _, err = repairStore(cut, image.RepairAll)
			}
			if err == nil && good {
				var res image.CheckResult
				if res, _, err = repairStore(cut, image.RepairNothing); err == nil && res.Corruptions+res.Leaks+res.CheckErrors > 0 {
					err = fmt.Errorf("%+v is left", res)
				}
			}
			if err == nil {
				err = before.kept(viewFuzz(t, cut))
			}
			if err != nil {
				t.Fatalf("seed %d, power cut after event %d: %v; %s", seed, i, err, img.Name)
			}
		}
	}
	t.Logf("%d images, %d of them repaired: %d power cuts", n, mended, points)
	if points == 0 || mended == 0 {
		t.Error("nothing was tested")
	}
}
