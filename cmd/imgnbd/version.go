package main

import (
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
)

// version is set by the linker where a release is built.
var version string

// compatVersion is the version of qemu-nbd whose command line and messages
// these are. Scripts compare it with what they need.
const compatVersion = "7.2.0"

// programVersion returns a version that scripts can compare.
func programVersion() string {
	v, revision := version, ""
	if info, ok := debug.ReadBuildInfo(); ok && v == "" {
		v = info.Main.Version
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = s.Value
			}
		}
	}
	return versionOf(v, revision)
}

var numbered = regexp.MustCompile(`^\d+\.\d+\.\d+`)

// versionOf makes a version of what git describe said, or else of a revision. A
// revision may begin with a digit, too.
func versionOf(described, revision string) string {
	v := strings.TrimPrefix(described, "v")
	switch {
	case numbered.MatchString(v):
		return v
	case v != "" && v != "(devel)": // a revision without a tag
		return "0.0.0-" + v
	case revision != "":
		return "0.0.0-" + revision[:min(len(revision), 12)]
	}
	return "0.0.0-unreleased"
}

// version prints one line that scripts read, of which the second word is a
// version: this program's, or that of the qemu-nbd it stands for.
func (u *ui) version() {
	if u.compat() {
		u.printf("%s %s (imgnbd %s)\n", u.called, compatVersion, programVersion())
		return
	}
	u.printf("%s %s\n", u.name, programVersion())
}

func versionCommand() *command {
	c := newCommand("version")
	c.run = func(u *ui, operands []string) error {
		if len(operands) > 0 {
			return usageError("no operand is expected")
		}
		u.version()
		u.printf("command line of qemu-nbd %s\n%s %s/%s\n", compatVersion, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return nil
	}
	return c
}
