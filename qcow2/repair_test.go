package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// repair repairs the image in a file.
func repair(t testing.TB, file string, what image.Repair) (res image.CheckResult, findings []string, err error) {
	t.Helper()
	for range 60_000 {
		findings = nil
		res, _, err = chain().Check(context.Background(), file, image.OpenOptions{Format: "qcow2"}, image.CheckOptions{
			Repair: what,
			Report: func(f image.Finding) { findings = append(findings, strings.Split(f.Text, "\n")...) },
		})
		if !errors.Is(err, image.ErrInUse) {
			break
		}
		// A child of another test holds our locks between fork and exec.
		time.Sleep(time.Millisecond)
	}
	return res, findings, err
}

// A guestView is what guests see of an image: for each part that can be read,
// what it is. The disks are the active one and the snapshots.
type guestView map[string][]byte

func viewDisk(v guestView, name string, d image.Device, unit int64) {
	for off := int64(0); off < d.Info().Size; off += unit {
		b := make([]byte, min(unit, d.Info().Size-off))
		if _, err := d.ReadAt(b, off); err == nil {
			v[fmt.Sprintf("%s %#x", name, off)] = b
		}
	}
}

func viewStore(t testing.TB, s storage.Store) guestView {
	t.Helper()
	v := guestView{}
	im, err := Open(context.Background(), shared{s}, image.Options{ReadOnly: true, Refs: chain()})
	if err != nil {
		return v
	}
	defer im.Close()
	unit := int64(1) << im.geo.subclusterBits()
	viewDisk(v, "disk", im, unit)
	for _, sn := range im.Snapshots() {
		d, err := im.OpenSnapshot(image.SnapshotSelector{ID: sn.ID})
		if err != nil {
			continue
		}
		viewDisk(v, "snapshot "+sn.ID, d, unit)
		d.Close()
	}
	return v
}

func viewFile(t testing.TB, file string) guestView {
	t.Helper()
	v := guestView{}
	d, err := chain().Open(context.Background(), file, image.OpenOptions{Format: "qcow2", ReadOnly: true})
	if err != nil {
		return v
	}
	defer d.Close()
	im := d.(*Image)
	unit := int64(1) << im.geo.subclusterBits()
	viewDisk(v, "disk", im, unit)
	for _, sn := range im.Snapshots() {
		d, err := im.OpenSnapshot(image.SnapshotSelector{ID: sn.ID})
		if err != nil {
			continue
		}
		viewDisk(v, "snapshot "+sn.ID, d, unit)
		d.Close()
	}
	return v
}

// kept returns what a guest could read before and cannot any more, or reads
// differently.
func (v guestView) kept(after guestView) error {
	for at, b := range v {
		if a, ok := after[at]; !ok {
			return fmt.Errorf("%s cannot be read any more", at)
		} else if !bytes.Equal(a, b) {
			return fmt.Errorf("%s changed", at)
		}
	}
	return nil
}

// left says of what remains after a repair that it may: data, or tables of
// data, whose place nobody knows, and counts that are too narrow.
func left(finding string) bool {
	for _, s := range []string{
		"Data cluster is not properly aligned", "exceeding the end of the file",
		"snapshots in image with data file", "overflow cluster", "Use qemu-img amend", "table entry corrupted",
		"OFLAG_COPIED", // in such tables, and of such counts
	} {
		if strings.Contains(finding, s) {
			return true
		}
	}
	return false
}

// checkRepaired judges an image that was repaired.
func checkRepaired(t testing.TB, file string, before guestView) {
	t.Helper()
	v := compareVerdicts(t, file)
	// What is taken for a table where there is none may say anything.
	lost := strings.Contains(strings.Join(v.Findings, "\n"), "Table is not cluster aligned")
	for _, f := range v.Findings {
		if !lost && !left(f) {
			t.Errorf("after the repair qemu-img says: %s", f)
			break
		}
	}
	if len(v.Findings) == 0 && (v.Corruptions > 0 || v.Leaks > 0 || v.Errors > 0) {
		t.Errorf("after the repair qemu-img says: %+v", v)
	}
	if err := before.kept(viewFile(t, file)); err != nil {
		t.Error(err)
	}
}

func TestRepairDamaged(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			file := tt.r.make(t)
			edit(t, file, tt.change)
			before := viewFile(t, file)
			res, findings, err := repair(t, file, image.RepairAll)
			if err != nil {
				t.Fatal(err, findings)
			}
			if res.CorruptionsFixed+res.LeaksFixed == 0 && res.Corruptions == 0 {
				t.Errorf("nothing was repaired: %+v %q", res, findings)
			}
			checkRepaired(t, file, before)
			if t.Failed() {
				t.Logf("%+v\n%s", res, strings.Join(findings, "\n"))
			}
		})
	}
}

// A repairVerdict is what qemu-img says of a repair.
type repairVerdict struct {
	Code             int
	Corruptions      int64 `json:"corruptions"`
	Leaks            int64 `json:"leaks"`
	Errors           int64 `json:"check-errors"`
	CorruptionsFixed int64 `json:"corruptions-fixed"`
	LeaksFixed       int64 `json:"leaks-fixed"`
	Lines            []string
}

func qemuRepair(t testing.TB, file, what string) (v repairVerdict) {
	t.Helper()
	r := qemu.Try(t, "qemu-img", "check", "-r", what, "-f", "qcow2", "--output=json", file)
	if r.Stdout != "" {
		if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil {
			t.Fatal(err)
		}
	}
	v.Code = r.Code
	v.Lines = strings.Split(strings.TrimSuffix(r.Stderr, "\n"), "\n")
	return v
}

// TestRepairLikeQEMU: where qemu-img can repair without a new structure, ours
// says and does the same.
func TestRepairLikeQEMU(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	same := []string{"leak", "refcount 2", "L2 entry without copied", "L1 entry without copied", "two entries, one cluster",
		"zero cluster unaligned", "data in the header"}
	for _, tt := range damages {
		for _, what := range []image.Repair{image.RepairLeaks, image.RepairAll} {
			name := map[image.Repair]string{image.RepairLeaks: "leaks", image.RepairAll: "all"}[what]
			isSame := false
			for _, s := range same {
				isSame = isSame || s == tt.name
			}
			if !isSame {
				continue
			}
			t.Run(tt.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				file := tt.r.make(t)
				edit(t, file, tt.change)
				theirs := filepath.Join(t.TempDir(), "theirs")
				whole, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(theirs, whole, 0o600); err != nil {
					t.Fatal(err)
				}
				want := qemuRepair(t, theirs, name)
				res, lines, err := repair(t, file, what)
				if err != nil {
					t.Fatal(err)
				}
				if res.CorruptionsFixed != want.CorruptionsFixed || res.LeaksFixed != want.LeaksFixed {
					t.Errorf("%+v, but qemu-img %+v", res, want)
				}
				// Theirs has those of the check afterwards as well.
				if len(want.Lines) < len(lines) {
					t.Errorf("%q\nqemu-img: %q", lines, want.Lines)
				} else if diff := cmp.Diff(want.Lines[:len(lines)], lines); diff != "" {
					t.Error(diff)
				}
				edit(t, file, func(a *editor) {
					b, _ := os.ReadFile(theirs)
					for k := range a.g.clusters(int64(len(b))) {
						at, n := k<<a.g.clusterBits, a.g.clusterSize
						// What it gives up, qemu-img discards.
						if a.count(k) > 0 && !bytes.Equal(a.b[at:min(at+n, int64(len(a.b)))], b[at:min(at+n, int64(len(b)))]) {
							t.Errorf("the images differ in cluster %d", k)
						}
					}
				})
			})
		}
	}
}

func TestRepairRandomDamage(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	n := 20
	if testing.Short() {
		n = 2
	}
	for _, base := range append(damageBases, recipe{name: "snapshots"}, recipe{name: "bitmaps"}) {
		t.Run(base.name, func(t *testing.T) {
			t.Parallel()
			var file string
			switch base.name {
			case "snapshots":
				file = withSnapshots(t)
			case "bitmaps":
				file = withBitmaps(t)
			default:
				file = base.make(t)
			}
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for seed := range uint64(n) {
				rnd := rand.New(rand.NewPCG(seed, 11))
				if err := os.WriteFile(file, whole, 0o600); err != nil {
					t.Fatal(err)
				}
				var what []string
				edit(t, file, func(e *editor) {
					for range 1 + rnd.IntN(4) {
						what = append(what, e.damage(rnd))
					}
				})
				before := viewFile(t, file)
				res, findings, err := repair(t, file, image.RepairAll)
				if err != nil {
					t.Fatalf("seed %d: %v: %v\n%s", seed, what, err, strings.Join(findings, "\n"))
				}
				if checkRepaired(t, file, before); t.Failed() {
					t.Fatalf("seed %d: %v: %+v\n%s", seed, what, res, strings.Join(findings, "\n"))
				}
			}
		})
	}
}

// TestRepairRefcountTable: the header leads to no refcount table.
func TestRepairRefcountTable(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for name, change := range map[string]func(e *editor){
		"none":      func(e *editor) { binary.BigEndian.PutUint32(e.b[56:], 0) },
		"unaligned": func(e *editor) { e.xor(48, 512) },
		"past end":  func(e *editor) { e.xor(48, 1<<40) },
		"huge":      func(e *editor) { binary.BigEndian.PutUint32(e.b[56:], 1<<31) },
		"is data":   func(e *editor) { e.put(48, uint64(l2Entry(e.word(e.l2(0, 0))).host())) },
		"is L1":     func(e *editor) { e.put(48, e.h.l1Offset) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := plainImage.make(t)
			before := viewFile(t, file)
			edit(t, file, change)
			if _, _, err := repair(t, file, image.RepairLeaks); err == nil {
				t.Error("-r leaks repaired it")
			}
			if res, findings, err := repair(t, file, image.RepairAll); err != nil {
				t.Fatal(res, findings, err)
			}
			checkRepaired(t, file, before)
		})
	}
}

// TestRepairCutOff: the end of the file is lost. What was there reads as
// zeros, and what is written then does not get in the way of anything.
func TestRepairCutOff(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for cut := int64(1); cut < 40; cut += 3 {
		file := plainImage.make(t)
		st, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if cut<<16 >= st.Size()-(4<<16) {
			break
		}
		if err := os.Truncate(file, st.Size()-cut<<16); err != nil {
			t.Fatal(err)
		}
		before := viewFile(t, file)
		res, findings, err := repair(t, file, image.RepairAll)
		if err != nil {
			t.Fatal(cut, res, findings, err)
		}
		checkRepaired(t, file, before)
		qemu.Check(t, file)
		if t.Failed() {
			t.Fatalf("cut %d: %+v\n%s", cut, res, strings.Join(findings, "\n"))
		}
	}
}

func TestRepairSnapshotTable(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := withSnapshots(t)
	before := viewFile(t, file)
	edit(t, file, func(e *editor) {
		// Entries without extra data, as version 2 has them.
		list := readTestSnapshots(t, e)
		var b []byte
		for i := range list {
			list[i].extra = list[i].extra[:i*8]
			b = list[i].append(b)
		}
		copy(e.b[e.h.snapshotOffset:], b)
	})
	if v := compareVerdicts(t, file); !strings.Contains(strings.Join(v.Findings, "\n"), "is incomplete") {
		t.Errorf("%q", v.Findings)
	}
	res, findings, err := repair(t, file, image.RepairAll)
	if err != nil || res.CorruptionsFixed != 2 {
		t.Error(res, findings, err)
	}
	// The size of the first snapshot was lost: it is that of the disk now.
	for at := range before {
		if strings.HasPrefix(at, "snapshot 1") {
			delete(before, at)
		}
	}
	checkRepaired(t, file, before)
	qemu.Check(t, file)
}

// TestRepairSnapshotTableTooLarge: a table that with what it lacks would be too
// large to be read stays as it is.
func TestRepairSnapshotTableTooLarge(t *testing.T) {
	x := build(16, 1<<20)
	sn := snapshot{l1At: x.h.l1Offset, l1Size: x.h.l1Size}
	const each = 128 << 10
	sn.ID = strings.Repeat("i", math.MaxUint16)
	sn.Name = strings.Repeat("n", each-snapshotFixed-len(sn.ID))
	table := bytes.Repeat(sn.append(nil), maxSnapshotTable/each)
	x.h.snapshotCount = maxSnapshotTable / each
	x.h.snapshotOffset = uint64(x.alloc(maxSnapshotTable >> 16))
	copy(x.b[x.h.snapshotOffset:], table)
	mem := storagetest.MemOf(x.bytes())
	if res, findings, err := repairStore(mem, image.RepairAll); err != nil || res.Corruptions < int64(x.h.snapshotCount) {
		t.Fatal(res, len(findings), err)
	}
	im, err := Open(t.Context(), mem, image.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(im.Snapshots()); n != int(x.h.snapshotCount) {
		t.Errorf("%d snapshots instead of %d", n, x.h.snapshotCount)
	}
	im.Close()
}

func readTestSnapshots(t testing.TB, e *editor) []snapshot {
	list, err := readSnapshots(storagetest.MemOf(e.b), e.h)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestRepairBitmaps(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	file := withBitmaps(t)
	edit(t, file, func(e *editor) {
		x, err := e.h.bitmapsExtension()
		if err != nil {
			t.Fatal(err)
		}
		table := int64(e.word(int64(x.offset)))
		e.put(table, 512)
	})
	before := viewFile(t, file)
	res, findings, err := repair(t, file, image.RepairAll)
	if err != nil || res.CorruptionsFixed != 1 {
		t.Error(res, findings, err)
	}
	checkRepaired(t, file, before)
	qemu.Check(t, file)

	// A directory that makes no sense.
	edit(t, file, func(e *editor) {
		x, _ := e.h.bitmapsExtension()
		e.put(int64(x.offset), 512)
	})
	if _, _, err := repair(t, file, image.RepairNothing); err == nil {
		t.Error("a broken directory passes")
	}
	if res, findings, err = repair(t, file, image.RepairAll); err != nil || res.CorruptionsFixed != 1 || res.LeaksFixed == 0 {
		t.Error(res, findings, err)
	}
	checkRepaired(t, file, before)
	qemu.Check(t, file)
}

// TestBitmapsOfLaterPrograms: bitmaps that we do not understand are not given
// up, neither when an image that was not closed properly is opened, nor by a
// repair that was asked for.
func TestBitmapsOfLaterPrograms(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	base := repairBase(t)
	for name, tt := range map[string]struct {
		change func(e *editor, entry int64)
		given  bool // up, if that is asked for
	}{
		"flags":      {func(e *editor, entry int64) { e.xor(entry+8, 4) }, false},
		"type":       {func(e *editor, entry int64) { e.xor(entry+16, 2<<56) }, false},
		"extra data": {func(e *editor, entry int64) { e.xor(entry+16, 4); copy(e.b[entry+24:], "morefine") }, false},
		"no sense":   {func(e *editor, entry int64) { e.put(entry, 512) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := damaged(t, base, func(e *editor) {
				x, err := e.h.bitmapsExtension()
				if err != nil {
					t.Fatal(err)
				}
				e.xor(72, uint64(incompatDirty))
				tt.change(e, int64(x.offset))
			})
			mem := storagetest.MemOf(b)
			if im, err := Open(t.Context(), shared{mem}, image.Options{}); err == nil {
				t.Errorf("opened with the bitmaps %+v: %v", im.Bitmaps(), im.Close())
			}
			if !bytes.Equal(mem.Bytes(), b) {
				t.Error("opening changed the image")
			}
			_, findings, err := repairStore(mem, image.RepairAll)
			if given := err == nil; given != tt.given {
				t.Errorf("given up: %v, %v, %q", given, err, findings)
			}
			if !tt.given && !bytes.Equal(mem.Bytes(), b) {
				t.Error("the repair changed the image")
			}
		})
	}
}

// TestRepairBits: the corrupt bit keeps writers out until a repair.
func TestRepairBits(t *testing.T) {
	qemu.Require(t, "qemu-img", "qemu-io")
	for _, what := range []image.Repair{image.RepairLeaks, image.RepairAll} {
		file := plainImage.make(t)
		edit(t, file, func(e *editor) { e.xor(72, uint64(incompatCorrupt|incompatDirty)) })
		if d, err := chain().Open(t.Context(), file, image.OpenOptions{Format: "qcow2"}); err == nil {
			d.Close()
			t.Error("a corrupt image was opened for writing")
		}
		if res, findings, err := repair(t, file, what); err != nil {
			t.Fatal(res, findings, err)
		}
		edit(t, file, func(e *editor) {
			if e.h.incompatible != 0 {
				t.Errorf("incompatible features %#x are left", e.h.incompatible)
			}
		})
		d, err := chain().Open(t.Context(), file, image.OpenOptions{Format: "qcow2"})
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
	// Bits stay if anything else does.
	file := plainImage.make(t)
	edit(t, file, func(e *editor) { e.xor(72, uint64(incompatCorrupt)); e.xor(e.l2(0, 0), 512) })
	if res, _, err := repair(t, file, image.RepairAll); err != nil || res.Corruptions == 0 {
		t.Error(res, err)
	}
	edit(t, file, func(e *editor) {
		if e.h.incompatible&incompatCorrupt == 0 {
			t.Error("the corrupt bit is gone, the damage is not")
		}
	})
	// But for the mark of a repair that made something.
	mem := storagetest.MemOf(damaged(t, repairBase(t), func(e *editor) {
		hardRepairs["snapshots"](e)
		e.xor(e.l2(0, 0), 512)
	}))
	if res, _, err := repairStore(mem, image.RepairAll); err != nil || res.Corruptions == 0 || res.CorruptionsFixed == 0 {
		t.Error(res, err)
	}
	if h, err := readHeader(mem); err != nil || h.incompatible != 0 {
		t.Error(h, err)
	}
}
