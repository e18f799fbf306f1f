package house

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/imgnbd/imgnbd/"

// The layers. A package may import those of its own row and no other of this
// module; "/..." stands for everything below. A package without a row fails
// the test: where it belongs is to be decided, not to happen.
var layers = []struct {
	pkg     string
	imports []string
}{
	{"storage", nil},
	{"internal/nbd", nil},
	{"internal/partition", nil},
	{"internal/sandbox", nil},

	{"image", []string{"storage"}},
	{"storage/file", []string{"storage"}},
	{"storage/storagetest", []string{"storage"}},
	{"image/imagetest", []string{"image", "storage", "storage/storagetest", "internal/test/qemu"}},

	{"raw", []string{"image", "storage"}},
	{"qcow2", []string{"image", "storage"}},
	{"asif", []string{"image", "storage"}},

	{"export", []string{"image", "storage", "internal/nbd"}},
	{"connect", []string{"internal/nbd"}},
	{"internal/journal", []string{"image", "storage"}},
	{"internal/drivers", []string{"image", "storage", "storage/file", "raw", "qcow2", "asif"}},

	{"docs", nil}, // the synopsis, embedded
	{"cmd/imgnbd", []string{"docs", "image", "storage", "export", "connect", "internal/nbd", "internal/partition", "internal/drivers", "internal/journal", "internal/sandbox"}},

	{"internal/test/...", []string{"..."}},
}

// What else a package may not import. "net" is the network and all below it
// but net/url, which is about names.
var forbidden = []struct {
	pkg, why string
	imports  []string
}{
	{"storage", "the contract does no I/O", []string{"net"}},
	{"image", "a disk is not a network", []string{"net"}},
	{"raw", "a format never opens anything", []string{"net", "os"}},
	{"qcow2", "a format never opens anything", []string{"net", "os"}},
	{"asif", "a format never opens anything", []string{"net", "os"}},
	{"...", "a library returns what it has to say, or is given a logger", []string{"log"}},
	{"...", "only tests test", []string{"testing"}},
}

type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	Imports         []string
}

func (p pkg) name() string { return strings.TrimPrefix(p.ImportPath, module) }

// forTests reports whether a package is there for tests alone.
func forTests(name string) bool {
	return match("internal/test/...", name) || strings.HasSuffix(name, "test")
}

func match(pattern, name string) bool {
	if below, ok := strings.CutSuffix(pattern, "..."); ok {
		return strings.HasPrefix(name, below)
	}
	return pattern == name
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Imports", "./...")
	cmd.Dir = "../../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImportsGoDown(t *testing.T) {
	for _, p := range packages(t) {
		row := slices.IndexFunc(layers, func(l struct {
			pkg     string
			imports []string
		}) bool {
			return match(l.pkg, p.name())
		})
		if row < 0 {
			t.Errorf("%s has no row in the table of layers", p.name())
			continue
		}
		for _, imp := range p.Imports {
			imp, ours := strings.CutPrefix(imp, module)
			if ours && !slices.ContainsFunc(layers[row].imports, func(pattern string) bool { return match(pattern, imp) }) {
				t.Errorf("%s imports %s, which is not below it", p.name(), imp)
			}
			if ours && forTests(imp) && !forTests(p.name()) {
				t.Errorf("%s imports %s, which is for tests", p.name(), imp)
			}
		}
	}
}

func TestForbiddenImports(t *testing.T) {
	for _, p := range packages(t) {
		for _, f := range forbidden {
			if !match(f.pkg, p.name()) || f.pkg == "..." && forTests(p.name()) {
				continue
			}
			for _, imp := range p.Imports {
				for _, no := range f.imports {
					if imp == no || no == "net" && imp != "net/url" && strings.HasPrefix(imp, "net/") {
						t.Errorf("%s imports %s: %s", p.name(), imp, f.why)
					}
				}
			}
		}
	}
}

// What runs before main depends on what is linked, and is seen by nobody.
func TestNoInit(t *testing.T) {
	for _, p := range packages(t) {
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Error(err)
				continue
			}
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
					t.Errorf("%s: %s has an init function", p.name(), file)
				}
			}
			for _, imp := range f.Imports {
				if imp.Name != nil && imp.Name.Name == "_" && imp.Path.Value != `"embed"` {
					t.Errorf("%s: %s imports %s for its effect", p.name(), file, imp.Path.Value)
				}
			}
		}
	}
}
