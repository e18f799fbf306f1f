package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/docs"
)

func allCommands() []*command { return append([]*command{serveCommand(nil)}, commands()...) }

// asClient is the program by the name of nbd-client, as if it were a command.
func asClient() *command { return &command{name: "nbd-client", flags: new(client).options()} }

// What a flag set has and what the synopsis says are the same, to the letter.
func TestSynopsis(t *testing.T) {
	for _, c := range append(allCommands(), asClient()) {
		var have, written []string
		c.flags.VisitAll(func(f *pflag.Flag) {
			have = append(have, optionSpelling(f.Shorthand, f.Name, takesValue(f)))
		})
		for _, o := range documentedOptions(c.name) {
			written = append(written, optionSpelling(o.short, o.long, o.arg != ""))
		}
		slices.Sort(have)
		slices.Sort(written)
		if diff := cmp.Diff(have, written); diff != "" {
			t.Errorf("command %q, flags against docs/synopsis.txt:\n%s", c.name, diff)
		}
	}
	for line := range strings.Lines(docs.Synopsis) {
		if len(line) > 80+len("\n") {
			t.Errorf("docs/synopsis.txt is wider than a terminal: %s", line)
		}
	}
}

func optionSpelling(short, long string, value bool) string {
	s := "--" + long
	if short != "" {
		s = "-" + short + ", " + s
	}
	if value {
		s += "=..."
	}
	return s
}

// The manual has each option of each command, with its letter.
func TestManual(t *testing.T) {
	text, err := os.ReadFile("../../docs/man/imgnbd.1")
	if err != nil {
		t.Fatal(err)
	}
	items := regexp.MustCompile(`(?m)^\.It (?:Fl (\w)(?: Ar \S+)? , )?Fl -([a-z-]+)`)
	written := map[string]string{} // the letter of each
	sections := strings.Split(string(text), "\n.Ss ")
	for _, c := range append(allCommands(), asClient()) {
		want := "Serving"
		switch c.name {
		case "":
		case "nbd-client":
			want = "By the name of nbd-client"
		default:
			want = "imgnbd " + c.name
		}
		i := slices.IndexFunc(sections, func(s string) bool { return strings.HasPrefix(s, want+"\n") })
		if i < 0 {
			t.Errorf("the manual has no section %q", want)
			continue
		}
		if strings.HasPrefix(want, "imgnbd ") && !regexp.MustCompile(`(?m)^\.Cm (\w+ \| )*`+c.name+`\b`).MatchString(sections[0]) {
			t.Errorf("the manual's synopsis does not have %s", c.name)
		}
		for _, m := range items.FindAllStringSubmatch(sections[i], -1) {
			written[c.name+" "+m[2]] = m[1]
		}
		c.flags.VisitAll(func(f *pflag.Flag) {
			short, ok := written[c.name+" "+f.Name]
			if f.Name != "help" && (!ok || short != f.Shorthand) {
				t.Errorf("the manual does not have %s -%s, --%s", c.name, f.Shorthand, f.Name)
			}
			delete(written, c.name+" "+f.Name)
		})
	}
	for name := range written {
		t.Errorf("the manual has an option that does not exist: %s", name)
	}
}

func TestHelp(t *testing.T) {
	out := func(args ...string) string {
		var stdout, stderr bytes.Buffer
		if code := run(args, nil, &stdout, &stderr); code != 0 || stderr.Len() > 0 {
			t.Fatalf("%q: exit status %d, %s", args, code, &stderr)
		}
		return stdout.String()
	}
	if s := out("imgnbd", "--help"); !strings.HasPrefix(s, "Usage: imgnbd [OPTIONS] FILE\n  or:  imgnbd -L [OPTIONS]\n") ||
		!strings.Contains(s, "--stdio") || !strings.Contains(s, "\n  info ") {
		t.Error(s)
	}
	// A name of qemu-nbd's has what qemu-nbd has.
	if s := out("/usr/bin/qemu-nbd", "--help"); !strings.HasPrefix(s, "Usage: /usr/bin/qemu-nbd [OPTIONS] FILE\n") ||
		strings.Contains(s, "--stdio") || strings.Contains(s, "PROGRAM") {
		t.Error(s)
	}
	if out("imgnbd", "help") != out("imgnbd", "-h") || out("imgnbd", "help", "info") != out("imgnbd", "info", "-h") {
		t.Error("help depends on how one asks")
	}
	// Every command is in the list.
	for _, c := range commands() {
		if !strings.Contains(out("imgnbd", "help"), "\n  "+c.name+" ") {
			t.Errorf("help says nothing of %s", c.name)
		}
	}
}

// Scripts take the second word of the first line for a version.
func TestVersion(t *testing.T) {
	for _, name := range []string{"imgnbd", "qemu-nbd", "/usr/bin/qemu-nbd"} {
		var stdout bytes.Buffer
		if code := run([]string{name, "--version", "--nonsense"}, nil, &stdout, os.Stderr); code != 0 {
			t.Fatalf("exit status %d", code)
		}
		line, _, _ := strings.Cut(stdout.String(), "\n")
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != name || !regexp.MustCompile(`^\d+\.\d+\.\d+`).MatchString(f[1]) {
			t.Errorf("%s: %q", name, line)
		}
		if strings.HasSuffix(name, "qemu-nbd") && f[1] != compatVersion {
			t.Errorf("%s says it is version %s", name, f[1])
		}
	}
}

// What is built between releases has a version as well.
func TestVersionOf(t *testing.T) {
	for _, tt := range [][3]string{
		{"v1.2.3", "", "1.2.3"},
		{"v1.2.3-4-gabcdef0-dirty", "", "1.2.3-4-gabcdef0-dirty"},
		{"0466f69", "", "0.0.0-0466f69"},
		{"f4b7e8a-dirty", "", "0.0.0-f4b7e8a-dirty"},
		{"(devel)", "0466f6912345678", "0.0.0-0466f6912345"},
		{"", "", "0.0.0-unreleased"},
	} {
		if got := versionOf(tt[0], tt[1]); got != tt[2] {
			t.Errorf("%q: %s", tt[:2], got)
		}
	}
}

// The script completes what the program has: options, commands, values.
func TestCompletion(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("bash is not installed")
	}
	var script bytes.Buffer
	if code := run([]string{"imgnbd", "completion", "bash"}, nil, &script, os.Stderr); code != 0 {
		t.Fatalf("exit status %d", code)
	}
	dir := t.TempDir()
	for _, name := range []string{"my disk.qcow2", "my*", "yours"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	complete := func(words ...string) []string {
		cmd := exec.Command(bash, "-c", script.String()+`
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_imgnbd; printf '%s\n' "${COMPREPLY[@]}"`, "bash")
		cmd.Args = append(cmd.Args, words...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	}
	for _, test := range []struct {
		words []string
		want  string
	}{
		{[]string{"imgnbd", "--sel"}, "--selinux-label"},
		{[]string{"imgnbd", "inf"}, "info"},
		{[]string{"imgnbd", "info", "--backing-c"}, "--backing-chain"},
		{[]string{"imgnbd", "--cache", "=", "wr"}, "writeback|writethrough"},
		{[]string{"imgnbd", "-f", "qc"}, "qcow2"},
		{[]string{"imgnbd", "completion", "z"}, "zsh"},
		{[]string{"imgnbd", "help", "u"}, "umount"},
		{[]string{"imgnbd", "--tls-mode", "=", ""}, "allow|direct|require"},
		{[]string{"imgnbd", "check", "-r", ""}, "all|leaks"},
		{[]string{"imgnbd", "check", "--repair", "a"}, "all"},
		{[]string{"imgnbd", "create", "-F", "r"}, "raw"},
		{[]string{"imgnbd", "check", "my"}, "my disk.qcow2|my*"},
		{[]string{"imgnbd", "my"}, "my disk.qcow2|my*"},
		{[]string{"imgnbd", "-r", "my"}, "my disk.qcow2|my*"}, // of check it takes a word
		{[]string{"imgnbd", "u"}, "umount"},
		{[]string{"imgnbd", "y"}, "yours"},
		{[]string{"imgnbd", "check", "z"}, ""},
	} {
		got := complete(test.words...)
		if slices.Sort(got); strings.Join(got, "|") != test.want {
			t.Errorf("%q: %q, want %q", test.words, got, test.want)
		}
	}
	for _, c := range allCommands() {
		c.flags.VisitAll(func(f *pflag.Flag) {
			words := []string{"imgnbd", "--" + f.Name}
			if c.name != "" {
				words = []string{"imgnbd", c.name, "--" + f.Name}
			}
			if !slices.Contains(complete(words...), "--"+f.Name) {
				t.Errorf("%s is not completed", strings.Join(words, " "))
			}
		})
	}
	for _, shell := range []string{"zsh", "fish"} {
		var out bytes.Buffer
		if code := run([]string{"imgnbd", "completion", shell}, nil, &out, os.Stderr); code != 0 {
			t.Fatalf("%s: exit status %d", shell, code)
		}
		for _, o := range documentedOptions("") {
			if !strings.Contains(out.String(), o.long) {
				t.Errorf("%s: nothing of --%s", shell, o.long)
			}
		}
	}
}
