package interop

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// info is a part of what nbdinfo --json says.
type info struct {
	Protocol   string `json:"protocol"`
	Structured bool   `json:"structured"`
	Extended   bool   `json:"extended"` // newer only
	Exports    []struct {
		Name        string          `json:"export-name"`
		Description string          `json:"description"`
		Size        int64           `json:"export-size"`
		Contexts    json.RawMessage `json:"contexts"`
		ReadOnly    bool            `json:"is_read_only"`
		MultiConn   bool            `json:"can_multi_conn"`
		Flush       bool            `json:"can_flush"`
		FUA         bool            `json:"can_fua"`
		Trim        bool            `json:"can_trim"`
		Zero        bool            `json:"can_zero"`
		FastZero    bool            `json:"can_fast_zero"`
		Cache       bool            `json:"can_cache"`
		DF          bool            `json:"can_df"`
		BlockMin    int64           `json:"block_size_minimum"`
		BlockMax    int64           `json:"block_size_maximum"`
	} `json:"exports"`
}

func nbdinfo(t *testing.T, w way, args ...string) info {
	t.Helper()
	out := qemu.Run(t, w.tool(t, "nbdinfo"), append([]string{"--json"}, args...)...)
	var i info
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		t.Fatalf("nbdinfo: %v\n%s", err, out)
	}
	if len(i.Exports) != 1 {
		t.Fatalf("%d exports, want 1\n%s", len(i.Exports), out)
	}
	return i
}

func TestNbdinfo(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		s := serve(t, w.transport, "-f", "raw", "-D", "a disk", "-A", rawImage(t))
		i := nbdinfo(t, w, s.uri)
		e := i.Exports[0]
		if i.Protocol != "newstyle-fixed" || i.Extended != (w.age == "newer") || !i.Structured {
			t.Errorf("protocol %s, structured %v, extended %v", i.Protocol, i.Structured, i.Extended)
		}
		if e.Size != size || e.Description != "a disk" || e.BlockMin != 1 || e.BlockMax != 32<<20 {
			t.Errorf("%+v", e)
		}
		if e.ReadOnly || !e.MultiConn || !e.Flush || !e.FUA || !e.Trim || !e.Zero || !e.FastZero || !e.Cache || !e.DF {
			t.Errorf("%+v", e)
		}
		for _, c := range []string{"base:allocation", "qemu:allocation-depth"} {
			if !strings.Contains(string(e.Contexts), c) {
				t.Errorf("contexts %s, want %s", e.Contexts, c)
			}
		}
		if got := strings.TrimSpace(qemu.Run(t, w.tool(t, "nbdinfo"), "--size", s.uri)); got != fmt.Sprint(size) {
			t.Errorf("--size prints %s", got)
		}
		if out := qemu.Run(t, w.tool(t, "nbdinfo"), "--can", "zero", s.uri); out != "" {
			t.Errorf("--can prints %s", out)
		}
	})
}

func TestNbdinfoReadOnly(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		s := serve(t, w.transport, "-r", "-e", "1", "-f", "raw", rawImage(t))
		e := nbdinfo(t, w, s.uri).Exports[0]
		if !e.ReadOnly || e.MultiConn || e.Trim || e.Zero || e.FastZero {
			t.Errorf("%+v", e)
		}
	})
}

func TestNbdinfoList(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		s := serve(t, w.transport, "-r", "-f", "raw", "-x", "the disk/ü", "-D", "described", rawImage(t))
		e := nbdinfo(t, w, "--list", s.uri).Exports[0]
		if e.Name != "the disk/ü" || e.Description != "described" || e.Size != size {
			t.Errorf("%+v", e)
		}
		if r := qemu.Try(t, w.tool(t, "nbdinfo"), s.uri); r.Code == 0 {
			t.Errorf("there is an export of no name:\n%s", r.Stdout)
		}
	})
}

// An extent of nbdinfo --map --json.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"`
}

// What the map calls zero is zero, and the holes of the image are found, as
// qemu-img finds them in the image itself.
func TestNbdinfoMap(t *testing.T) {
	want := contents()
	for name, make := range images {
		t.Run(name, func(t *testing.T) {
			for age := range ages {
				w := way{age, "unix"}
				i := make(t)
				s := serve(t, w.transport, "-r", "-f", i.format, i.file)
				var extents []extent
				out := qemu.Run(t, w.tool(t, "nbdinfo"), "--map", "--json", s.uri)
				if err := json.Unmarshal([]byte(out), &extents); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				var at, zeros int64
				for _, e := range extents {
					if e.Offset != at || e.Length < 1 || at+e.Length > size {
						t.Fatalf("%s: extent %+v at %d", age, e, at)
					}
					if e.Type&2 != 0 {
						zeros += e.Length
						for _, b := range want[at : at+e.Length] {
							if b != 0 {
								t.Fatalf("%s: data is called zero in %+v", age, e)
							}
						}
					}
					at += e.Length
				}
				if at != size {
					t.Errorf("%s: %d bytes in the map", age, at)
				}
				var judged []struct {
					Length int64
					Zero   bool
				}
				if err := json.Unmarshal([]byte(qemu.Img(t, "map", "--output=json", "-f", i.format, i.file)), &judged); err != nil {
					t.Fatal(err)
				}
				var theirs int64
				for _, e := range judged {
					if e.Zero {
						theirs += e.Length
					}
				}
				if zeros != theirs {
					t.Errorf("%s: %d bytes of zeros, qemu-img knows %d", age, zeros, theirs)
				}
			}
		})
	}
}

// nbdcopy from the program, of every kind of image.
func TestNbdcopyOut(t *testing.T) {
	want := contents()
	for name, make := range images {
		t.Run(name, func(t *testing.T) {
			i := make(t)
			eachWay(t, func(t *testing.T, w way) {
				s := serve(t, w.transport, "-r", "-f", i.format, i.file)
				for _, flags := range [][]string{nil, {"--connections=4", "--threads=4", "--requests=16", "--request-size=65536"}, {"--synchronous"}, {"--no-extents"}} {
					to := filepath.Join(t.TempDir(), "copy.raw")
					qemu.Run(t, w.tool(t, "nbdcopy"), append(flags, s.uri, to)...)
					equal(t, to, want)
					if len(flags) == 0 {
						sparse(t, to)
					}
				}
			})
		})
	}
}

// sparse fails the test if a copy takes more room than its data needs.
func sparse(t *testing.T, file string) {
	t.Helper()
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > size/2 {
		t.Errorf("%s takes %d bytes, the copy is not sparse", file, used)
	}
}

// nbdcopy to the program, and from one to another.
func TestNbdcopyIn(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		from := rawImage(t)
		for _, flags := range [][]string{nil, {"--connections=4", "--threads=4"}, {"--allocated"}, {"--destination-is-zero"}, {"--flush", "--synchronous"}} {
			to := create(t, filepath.Join(t.TempDir(), "to.raw"), size)
			s := serve(t, w.transport, "-f", "raw", "--discard=unmap", to)
			qemu.Run(t, w.tool(t, "nbdcopy"), append(flags, from, s.uri)...)
			equal(t, to, contents())
			if len(flags) == 0 {
				sparse(t, to)
			}
		}
		first := serve(t, w.transport, "-r", "-f", "raw", from)
		to := create(t, filepath.Join(t.TempDir(), "to.raw"), size)
		second := serve(t, w.transport, "-f", "raw", "--discard=unmap", to)
		qemu.Run(t, w.tool(t, "nbdcopy"), first.uri, second.uri)
		equal(t, to, contents())
	})
}

// Socket activation: the client makes the socket and starts the program.
func TestActivation(t *testing.T) {
	file := rawImage(t)
	for age := range ages {
		t.Run(age, func(t *testing.T) {
			w := way{age, ""}
			bracket := []string{"--", "[", imgnbd, "-r", "-f", "raw", file, "]"}
			if e := nbdinfo(t, w, bracket...).Exports[0]; e.Size != size {
				t.Errorf("%+v", e)
			}
			to := filepath.Join(t.TempDir(), "copy.raw")
			qemu.Run(t, w.tool(t, "nbdcopy"), append(bracket, to)...)
			equal(t, to, contents())
			back := create(t, filepath.Join(t.TempDir(), "back.raw"), size)
			qemu.Run(t, w.tool(t, "nbdcopy"), "--", to, "[", imgnbd, "-f", "raw", back, "]")
			equal(t, back, contents())
		})
	}
}

// nbdsh is libnbd in Python: single requests, and what the server answers to
// those that are wrong.
func TestNbdsh(t *testing.T) {
	eachWay(t, func(t *testing.T, w way) {
		file := create(t, filepath.Join(t.TempDir(), "disk.raw"), size)
		s := serve(t, w.transport, "-f", "raw", "--discard=unmap", file)
		ro := serve(t, w.transport, "-r", "-f", "raw", rawImage(t))
		script := filepath.Join(t.TempDir(), "script.py")
		if err := os.WriteFile(script, []byte(requests), 0o600); err != nil {
			t.Fatal(err)
		}
		shell, args := w.tool(t, "nbdsh"), []string(nil)
		if w.age == "older" {
			// Debian's, whatever other Python is first in PATH.
			shell, args = qemu.Require(t, "/usr/bin/python3"), []string{"-m", "nbd"}
		}
		args = append(args, "-c", fmt.Sprintf("uri, ro, size = %q, %q, %d", s.uri, ro.uri, size), "-c", fmt.Sprintf("exec(open(%q).read())", script))
		qemu.Run(t, shell, args...)
		want := make([]byte, size)
		for i := range 8192 {
			want[4096+i] = 'a'
		}
		clear(want[5000:5100])
		copy(want[size-3:], "end")
		equal(t, file, want)
	})
}

const requests = `

def refused(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errno == want, "errno %s, want %s: %s" % (e.errno, want, e)
    else:
        raise AssertionError("%s%s succeeded" % (call.__name__, args))

h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.get_size() == size
assert h.get_structured_replies_negotiated()
if hasattr(h, "get_extended_headers_negotiated"):
    assert h.get_extended_headers_negotiated()

h.pwrite(b"a" * 8192, 4096)
h.zero(100, 5000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.pwrite(b"end", size - 3, nbd.CMD_FLAG_FUA)
h.flush()
h.cache(65536, 0)
h.trim(65536, 1048576)
assert h.pread(8192, 4096) == b"a" * 904 + bytes(100) + b"a" * 7188
assert h.pread(1, size - 1, nbd.CMD_FLAG_DF) == b"d"

pieces = []
def chunk(data, offset, status, error):
    pieces.append((offset, len(data), status))
h.pread_structured(2 << 20, 0, chunk)
assert sum(n for _, n, _ in pieces) == 2 << 20, pieces
assert any(status == nbd.READ_HOLE for _, _, status in pieces), pieces

extents = []
def status(context, offset, entries, error):
    assert context == nbd.CONTEXT_BASE_ALLOCATION
    extents.extend(entries)
h.block_status(size, 0, status)
assert sum(extents[0::2]) <= size and 3 in extents[1::2] and 0 in extents[1::2], extents
extents.clear()
h.block_status(size, 0, status, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2, extents

refused("EINVAL", h.pread, 1, size)
refused("EINVAL", h.pread, 2, size - 1)
refused("ENOSPC", h.pwrite, b"xx", size - 1)
refused("ENOSPC", h.zero, 2, size - 1)
refused("EINVAL", h.trim, 2, size - 1)
refused("EINVAL", h.pread, 1, 0, 0x8000)
refused("EINVAL", h.pwrite, b"x", 0, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(3, size - 3) == b"end" # alive after all of it
h.shutdown()

r = nbd.NBD()
r.set_strict_mode(0)
r.connect_uri(ro)
for call in (lambda: r.pwrite(b"x", 0), lambda: r.zero(1, 0), lambda: r.trim(1, 0)):
    refused("EPERM", call)
refused("EINVAL", r.block_status, 4096, 0, status) # no context was selected
r.shutdown()
`
