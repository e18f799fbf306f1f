package house

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const top = "../../.."

// documents are the Markdown files of the module, by path from its top.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs := map[string]string{}
	walk(t, func(path string) {
		if strings.HasSuffix(path, ".md") {
			docs[path] = read(t, path)
		}
	})
	if docs["README.md"] == "" {
		t.Fatal("no README.md")
	}
	return docs
}

// walk calls f for each file, by path from the top of the module.
func walk(t *testing.T, f func(path string)) {
	t.Helper()
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path, err = filepath.Rel(top, path); err != nil {
			return err
		}
		if d.IsDir() && (path == ".git" || path == "bin" || path == "build") {
			return filepath.SkipDir
		}
		if d.Type().IsRegular() {
			f(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(top, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var link = regexp.MustCompile(`\]\(([^)#\s]*)(#[^)]*)?\)`)

func TestLinks(t *testing.T) {
	for path, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(prose(text), -1) {
			target := m[1]
			if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(top, filepath.Dir(path), target)); err != nil {
				t.Errorf("%s: link to %s, which is not there", path, target)
			}
		}
	}
}

// prose is a document without its blocks of code.
func prose(text string) string {
	var b strings.Builder
	code := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			code = !code
		} else if !code {
			b.WriteString(line)
		}
	}
	return b.String()
}

var (
	makeUse    = regexp.MustCompile("(?m)(?:^|`)(?:sudo )?make ([a-z]+)\\b")
	makeTarget = regexp.MustCompile(`(?m)^([a-z]+):`)
	makeHelp   = regexp.MustCompile(`(?m)^([a-z]+):.*## .`)
)

func TestMakeTargets(t *testing.T) {
	targets := map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(read(t, "Makefile"), -1) {
		targets[m[1]] = true
	}
	for path, text := range documents(t) {
		for _, m := range makeUse.FindAllStringSubmatch(text, -1) {
			if !targets[m[1]] {
				t.Errorf("%s: make %s, which the Makefile does not know", path, m[1])
			}
		}
	}
	readme := read(t, "README.md")
	for _, target := range []string{"run", "test"} {
		if !strings.Contains(readme, "make "+target) {
			t.Errorf("README.md does not name make %s", target)
		}
	}
	if len(makeHelp.FindAllString(read(t, "Makefile"), -1)) == 0 {
		t.Error("make help would be empty")
	}
}

var (
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark|Example)[A-Z_]\w*)\(`)
	testName = regexp.MustCompile(`(?:\b([a-z][\w/]*)\.)?\b((?:Test|Fuzz|Benchmark)[A-Z]\w*)(?:/([\w-]+))?`)
)

// tests maps a test's name to the folders of the packages that have it.
func tests(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	walk(t, func(path string) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, m := range testFunc.FindAllStringSubmatch(read(t, path), -1) {
			found[m[1]] = append(found[m[1]], filepath.Dir(path))
		}
	})
	return found
}

// A test that a document names exists: "TestRead" anywhere, "qcow2.TestRead"
// in that package. Its case, "TestRead/zeros", is a string in the tests of the
// package or a file below its testdata.
func TestNamedTestsExist(t *testing.T) {
	found := tests(t)
	for path, text := range documents(t) {
		for _, m := range testName.FindAllStringSubmatch(text, -1) {
			pkg, name, sub := m[1], m[2], m[3]
			ok := false
			for _, dir := range found[name] {
				if pkg == "" || dir == pkg || strings.HasSuffix(dir, "/"+pkg) {
					ok = ok || sub == "" || hasCase(t, dir, sub)
				}
			}
			if !ok {
				t.Errorf("%s names %s, which does not exist", path, m[0])
			}
		}
	}
}

func hasCase(t *testing.T, dir, name string) bool {
	files, err := filepath.Glob(filepath.Join(top, dir, "testdata", "*", name+".*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) > 0 {
		return true
	}
	files, err = filepath.Glob(filepath.Join(top, dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if s := string(text); strings.Contains(s, `"`+name+`"`) || strings.Contains(s, `"`+strings.ReplaceAll(name, "_", " ")+`"`) {
			return true
		}
	}
	return false
}

var script = regexp.MustCompile(`[\w-]+\.txtar`)

// A script of the command line that a document names exists.
func TestNamedScriptsExist(t *testing.T) {
	for path, text := range documents(t) {
		for _, name := range script.FindAllString(text, -1) {
			if _, err := os.Stat(filepath.Join(top, "cmd/imgnbd/testdata/script", name)); err != nil {
				t.Errorf("%s names the script %s, which does not exist", path, name)
			}
		}
	}
}

// A row of a table with a column Proof that claims something names what proves
// it, a test or a script of the command line.
func TestTablesNameProofs(t *testing.T) {
	rows := map[string]int{}
	for path, text := range documents(t) {
		inTable := false
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			if !strings.HasPrefix(line, "|") {
				inTable = false
				continue
			}
			cells := strings.Split(strings.Trim(line, "|"), "|")
			last := strings.TrimSpace(cells[len(cells)-1])
			if last == "Proof" {
				inTable = true
				continue
			}
			if !inTable || strings.HasPrefix(last, "-") && strings.Trim(last, "-") == "" {
				continue
			}
			rows[path]++
			claims := len(cells) < 3 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "no")
			if claims && !testName.MatchString(last) && !script.MatchString(last) {
				t.Errorf("%s: nothing proves: %s", path, line)
			}
		}
	}
	for _, path := range []string{"docs/nbd.md", "docs/qcow2.md", "docs/compat.md", "docs/reliability.md"} {
		if rows[path] == 0 {
			t.Errorf("%s has no table with a column named Proof", path)
		}
	}
}
