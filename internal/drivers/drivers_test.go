package drivers_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/drivers"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

func chain() *image.Chain {
	return &image.Chain{Formats: drivers.Formats(), Protocols: drivers.Protocols()}
}

func TestTables(t *testing.T) {
	seen := make(map[string]bool)
	for _, f := range drivers.Formats() {
		if f.Name == "" || seen[f.Name] || f.Open == nil || f.Inspect == nil {
			t.Errorf("format %q is incomplete or there twice", f.Name)
		}
		if (f.Probe == nil) != (f.Name == "raw") {
			t.Errorf("format %q: only raw is recognised by nothing", f.Name)
		}
		seen[f.Name] = true
	}
	for _, p := range drivers.Protocols() {
		if p.Name == "" || seen[p.Name] || p.Open == nil {
			t.Errorf("protocol %q is incomplete or there twice", p.Name)
		}
		seen[p.Name] = true
	}
}

func TestForeign(t *testing.T) {
	for _, tt := range []struct{ format, options, says string }{
		{"vmdk", "", "VMDK"},
		{"vmdk", "subformat=monolithicFlat", "VMDK"},
		{"vmdk", "subformat=streamOptimized", "VMDK"},
		{"vhdx", "", "VHDX"},
		{"vpc", "", "VHD"},
		{"vdi", "", "VDI"},
		{"parallels", "", "Parallels"},
		{"qed", "", "QED"},
		{"qcow", "", "version 1"},
	} {
		path, converted := qemu.Create(t, tt.format, tt.options, "10M"), filepath.Join(t.TempDir(), "new")
		for _, format := range []string{"", tt.format} {
			d, err := chain().Open(t.Context(), path, image.OpenOptions{Format: format, ReadOnly: true})
			if err == nil {
				d.Close()
				t.Errorf("%s %s is opened", tt.format, tt.options)
				continue
			}
			hint, ok := errors.AsType[*image.Hint](err)
			if !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), path) || !errors.Is(err, errors.ErrUnsupported) || !ok {
				t.Errorf("%s %s, format %q: %v", tt.format, tt.options, format, err)
				continue
			}
			if format != "" {
				continue
			}
			// What is advised works.
			_, command, _ := strings.Cut(hint.Advice, "with: ")
			command, _, _ = strings.Cut(command, ";")
			command = strings.NewReplacer("FILE", path, "NEW.qcow2", converted).Replace(command)
			qemu.Run(t, "sh", "-c", command)
			qemu.Img(t, "check", "-q", "-f", "qcow2", converted)
		}
		// That it is not checked does not mean that nothing is wrong with it.
		for _, repair := range []image.Repair{image.RepairNothing, image.RepairLeaks} {
			_, _, err := chain().Check(t.Context(), path, image.OpenOptions{}, image.CheckOptions{Repair: repair})
			if !errors.Is(err, errors.ErrUnsupported) || errors.Is(err, image.ErrNoCheck) {
				t.Errorf("%s %s is checked: %v", tt.format, tt.options, err)
			}
		}
		// What it is can be told all the same, and for some of them the size.
		size := int64(-1)
		switch tt.format {
		case "vdi", "qed", "qcow":
			size = 10 << 20
		}
		in, err := chain().Inspect(t.Context(), path, image.OpenOptions{})
		if err != nil || in.Format != tt.format || in.VirtualSize != size || in.DiskSize < 0 || !errors.Is(in.Problem, errors.ErrUnsupported) {
			t.Errorf("%s %s is inspected as %+v, %v", tt.format, tt.options, in, err)
		}
		// As raw it is what its bytes are.
		d, err := chain().Open(t.Context(), path, image.OpenOptions{Format: "raw", ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
}

// To read a LUKS container takes more than its name. (qemu-img makes none on a
// machine that is busy.)
func TestForeignLUKS(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, append([]byte("LUKS\xba\xbe\x00\x01"), make([]byte, 4088)...), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := chain().Open(t.Context(), path, image.OpenOptions{ReadOnly: true})
	if hint, ok := errors.AsType[*image.Hint](err); !ok || !strings.Contains(hint.Advice, "--object secret,id=key,file=PASSPHRASE") {
		t.Errorf("%v", err)
	}
}

// What somebody takes for a format that it is not in is not said to be in it.
func TestForeignMistaken(t *testing.T) {
	path := qemu.Create(t, "qcow2", "", "10M")
	_, err := chain().Open(t.Context(), path, image.OpenOptions{Format: "none", ReadOnly: true})
	if hint, ok := errors.AsType[*image.Hint](err); !ok || hint.Advice != "formats: qcow2, asif, raw" {
		t.Errorf("a format that is none: %v", err)
	}
	for _, f := range drivers.Formats() {
		if f.Name == "qcow2" || f.Name == "raw" {
			continue
		}
		d, err := chain().Open(t.Context(), path, image.OpenOptions{Format: f.Name, ReadOnly: true})
		if err == nil {
			d.Close()
		}
		if !errors.Is(err, image.ErrWrongFormat) {
			t.Errorf("opened as %s: %v", f.Name, err)
		}
		for _, repair := range []image.Repair{image.RepairNothing, image.RepairAll} {
			_, _, err := chain().Check(t.Context(), path, image.OpenOptions{Format: f.Name}, image.CheckOptions{Repair: repair})
			if !errors.Is(err, image.ErrWrongFormat) {
				t.Errorf("checked as %s: %v", f.Name, err)
			}
		}
	}
}

// A VHD of fixed size is one to who says so, and to nobody else.
func TestFixedVHD(t *testing.T) {
	path := qemu.Create(t, "vpc", "subformat=fixed", "10M")
	if in, err := chain().Inspect(t.Context(), path, image.OpenOptions{Format: "vpc"}); err != nil || in.Format != "vpc" {
		t.Errorf("inspected as %+v, %v", in, err)
	}
	if d, err := chain().Open(t.Context(), path, image.OpenOptions{Format: "vpc", ReadOnly: true}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("opened: %v, %v", d, err)
	}
	if in, err := chain().Inspect(t.Context(), path, image.OpenOptions{}); err != nil || in.Format != "raw" {
		t.Errorf("without a format: %+v, %v", in, err)
	}
}

func TestMagic(t *testing.T) {
	for text, want := range map[string]string{
		"LUKS\xba\xbe\x00\x01":    "luks",
		"LUKS\xba\xbe\x00\x02":    "", // nor does QEMU
		"Bochs Virtual HD Image":  "bochs",
		"# a\n\n#b\nversion=1\n":  "vmdk",
		"version=3\n":             "vmdk",
		"version=9\n":             "",
		"version=":                "",
		"# Disk DescriptorFile\n": "vmdk",
		"COWD":                    "vmdk",
		"QFI\xfb\x00\x00\x00\x01": "qcow",
		"QFI\xfb\x00\x00\x00\x02": "qcow2",
		"QFI\xfb\x00\x00\x00\x03": "qcow2",
		"shdw\x00\x00\x00\x01":    "asif",
		"shdw and so on":          "",
		"WithoutFreeSpace":        "parallels",
		"":                        "",
		"\x00":                    "",
		"#":                       "",
	} {
		for _, padding := range []int{0, 4096} {
			b := append([]byte(text), make([]byte, padding)...)
			got := ""
			for _, f := range drivers.Formats() {
				if f.Probe != nil && f.Probe(bytes.NewReader(b), int64(len(b))) {
					got = f.Name
					break
				}
			}
			if got != want && (padding > 0 || want == "") {
				t.Errorf("%q and %d zeros is %q, not %q", text, padding, got, want)
			}
		}
	}
}

// Whatever cannot be read is not recognised, and nothing panics.
func TestProbeErrors(t *testing.T) {
	for _, f := range drivers.Formats() {
		if f.Probe != nil && f.Probe(broken{}, 1<<20) {
			t.Errorf("%s recognises a disk that cannot be read", f.Name)
		}
	}
}

// A read that fails once, whichever it is, makes an image of no other format.
func TestFailedReadIsNoGuess(t *testing.T) {
	dir := t.TempDir()
	over := filepath.Join(dir, "over")
	open := func(c *image.Chain, path string, opt image.OpenOptions) (string, error) {
		d, err := c.Open(t.Context(), path, opt)
		if err != nil {
			return "", err
		}
		return d.Info().Format, d.Close()
	}
	uses := map[string]func(*image.Chain, string) (string, error){
		"open": func(c *image.Chain, path string) (string, error) { return open(c, path, image.OpenOptions{}) },
		"inspect": func(c *image.Chain, path string) (string, error) {
			in, err := c.Inspect(t.Context(), path, image.OpenOptions{})
			if err != nil {
				return "", err
			}
			return in.Format, nil
		},
		"check": func(c *image.Chain, path string) (string, error) {
			_, format, err := c.Check(t.Context(), path, image.OpenOptions{}, image.CheckOptions{})
			return format, err
		},
		"backing": func(c *image.Chain, path string) (string, error) {
			backing := image.CreateOptions{Size: 10 << 20, Params: []image.Param{{Key: "backing_file", Value: path}}} // without its format
			if err := chain().Create(t.Context(), over, "qcow2", backing); err != nil {
				t.Fatal(err)
			}
			_, err := open(c, over, image.OpenOptions{Format: "qcow2"})
			return "", err
		},
	}
	for _, format := range []string{"qcow2", "vmdk", "vhdx", "vpc", "vdi", "parallels", "qed", "qcow"} {
		path := filepath.Join(dir, format)
		if err := os.Rename(qemu.Create(t, format, "", "10M"), path); err != nil {
			t.Fatal(err)
		}
		for use, f := range uses {
			// The first two openings look at the image, the second under its lock.
			for opening := 1; opening <= 2; opening++ {
				for k := 1; ; k++ {
					var faulty *storagetest.Faulty
					c, opened := chain(), 0
					c.Protocols = []storage.Protocol{{Name: "file", Open: func(ctx context.Context, u *url.URL, opt storage.Options) (storage.Store, error) {
						s, err := file.Open(ctx, u, opt)
						if err != nil || u.Path != path {
							return s, err
						}
						if opened++; opened != opening {
							return s, nil
						}
						faulty = storagetest.Fault(s, storagetest.Nth(storagetest.OpRead, k, storagetest.Failure{Err: syscall.EIO}))
						return faulty, nil
					}}}
					got, err := f(c, path)
					if faulty == nil || len(faulty.Injected()) == 0 {
						break
					}
					if got != format && !errors.Is(err, syscall.EIO) {
						t.Errorf("%s %s, read %d of opening %d fails: %q, %v", use, format, k, opening, got, err)
					}
				}
			}
		}
	}
}

type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

func FuzzProbe(f *testing.F) {
	f.Add([]byte("QFI\xfb"))
	f.Add([]byte("# Disk DescriptorFile\nversion=1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, f := range drivers.Formats() {
			if f.Probe != nil {
				f.Probe(bytes.NewReader(b), int64(len(b)))
			}
		}
	})
}

// A guest must not be able to give its raw disk the beginning of any format
// that QEMU or this program recognises.
func TestGuardKnowsAllFormats(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := chain().Open(t.Context(), path, image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, format := range []string{"qcow2", "vmdk", "vhdx", "vpc", "vdi", "parallels", "qed", "qcow"} {
		p := make([]byte, 64<<10)
		f, err := os.Open(qemu.Create(t, format, "", "10M"))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.ReadFull(f, p)
		f.Close()
		if err != nil && err != io.ErrUnexpectedEOF {
			t.Fatal(err)
		}
		if err := d.WriteAt(p[:n], 0, 0); !errors.Is(err, syscall.EPERM) {
			t.Errorf("the beginning of a %s image: %v", format, err)
		}
	}
}

// Chains as qemu-img makes them, read as qemu-img reads them.
func TestChains(t *testing.T) {
	dir := t.TempDir()
	base, mid, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "mid.qcow2"), filepath.Join(dir, "top.qcow2")
	qemu.Img(t, "create", "-q", "-f", "raw", base, "3M")
	qemu.IO(t, "raw", base, "write -P 1 0 2M", "write -P 2 2500k 100k")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", mid, "4M")
	qemu.IO(t, "qcow2", mid, "write -P 3 64k 100k", "write -z 1M 128k")
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-b", `json:{"driver":"qcow2","file":{"driver":"file","filename":"`+mid+`"}}`, "-F", "qcow2", top, "5M")
	qemu.IO(t, "qcow2", top, "write -P 4 100k 1k")
	for _, name := range []string{base, mid, top} {
		flat := filepath.Join(dir, "flat")
		format := strings.TrimPrefix(filepath.Ext(name), ".")
		qemu.Img(t, "convert", "-f", format, "-O", "raw", name, flat)
		want, err := os.ReadFile(flat)
		if err != nil {
			t.Fatal(err)
		}
		d, err := chain().Open(t.Context(), name, image.OpenOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, d.Info().Size)
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s reads as something else than qemu-img says: %v", name, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	all, err := chain().InspectChain(t.Context(), top, image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 3 || all[1].Name != mid || all[2].Name != base {
		t.Errorf("the chain is %+v", all)
	}
}

// What is changed in an overlay that is opened alone shows in the chain, and
// nothing else does; so zeros are marked, though all reads as zeros.
func TestAlone(t *testing.T) {
	for _, options := range []string{"compat=1.1", "compat=0.10", "extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
			qemu.Img(t, "create", "-q", "-f", "raw", base, "1M")
			qemu.IO(t, "raw", base, "write -P 1 0 1M")
			qemu.Img(t, "create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", top)
			qemu.IO(t, "qcow2", top, "write -P 2 64k 192k")

			d, err := chain().Open(t.Context(), `json:{"driver":"qcow2","file.filename":"`+top+`","backing":null}`, image.OpenOptions{Unmap: true})
			if err != nil {
				t.Fatal(err)
			}
			alone := make([]byte, d.Info().Size)
			copy(alone[64<<10:], bytes.Repeat([]byte{2}, 192<<10))
			got := make([]byte, len(alone))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, alone) {
				t.Errorf("it does not read as what it has, and zeros: %v", err)
			}
			extents, err := d.AppendExtents(nil, 0, 64<<10, image.WantZero|image.WantAllocated)
			if err != nil || len(extents) != 1 || !extents[0].Zero || extents[0].Allocated {
				t.Errorf("what it does not have: %+v, %v", extents, err)
			}
			chained := bytes.Repeat([]byte{1}, len(alone))
			copy(chained[64<<10:], alone[64<<10:][:192<<10])
			for _, err := range []error{
				d.WriteAt([]byte{3}, 300<<10, 0), // its cluster is filled with zeros
				d.WriteZeroes(128<<10, 64<<10, image.MayUnmap),
				d.WriteZeroes(512<<10, 64<<10, 0),
				d.WriteZeroes(640<<10, 64<<10, image.MayUnmap),
				d.Discard(768<<10, 64<<10),
				d.Close(),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			unit := 64 << 10
			if options == "extended_l2=on" {
				unit = 2 << 10
			}
			at := 300 << 10 / unit * unit
			clear(chained[at:][:unit])
			chained[300<<10] = 3
			for _, at := range []int{128 << 10, 512 << 10, 640 << 10} {
				clear(chained[at:][:64<<10])
			}
			if options != "compat=0.10" { // which knows no zero clusters
				clear(chained[768<<10:][:64<<10])
			}
			flat := filepath.Join(dir, "flat")
			qemu.Img(t, "convert", "-f", "qcow2", "-O", "raw", top, flat)
			if got, err = os.ReadFile(flat); err != nil || !bytes.Equal(got, chained) {
				for i := range got {
					if got[i] != chained[i] {
						t.Errorf("byte %#x of the chain is %d, not %d", i, got[i], chained[i])
						break
					}
				}
			}
			qemu.Img(t, "check", "-q", top)
		})
	}
}
