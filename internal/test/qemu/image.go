package qemu

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Img runs qemu-img, which has to succeed, and returns its standard output.
func Img(t testing.TB, args ...string) string {
	t.Helper()
	return Run(t, "qemu-img", args...)
}

// IO runs qemu-io on an image with one -c for each command, and fails the
// test if one of them failed, which qemu-io does not always tell by its exit
// status. The format may be "" to let qemu-io guess.
func IO(t testing.TB, format, file string, commands ...string) string {
	t.Helper()
	var args []string
	if format != "" {
		args = append(args, "-f", format)
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := Run(t, "qemu-io", append(args, file)...)
	if ioFailure.MatchString(out) {
		t.Fatalf("qemu-io %s %q:\n%s", file, commands, out)
	}
	return out
}

// ioFailure is what qemu-io prints where it goes on after a failure.
var ioFailure = regexp.MustCompile(`(?m)^(.* failed: |Pattern verification failed )`)

// Create makes an image in a folder of the test and returns its path. The
// options are qemu-img's -o list, or "" for none; size is as qemu-img takes it.
func Create(t testing.TB, format, options, size string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk."+format)
	args := []string{"create", "-q", "-f", format}
	if options != "" {
		args = append(args, "-o", options)
	}
	Img(t, append(args, file, size)...)
	return file
}

// Check fails the test unless qemu-img finds neither error nor leak in a
// qcow2 image. It must not be open for writing elsewhere.
func Check(t testing.TB, file string) {
	t.Helper()
	if r := Try(t, "qemu-img", "check", "-f", "qcow2", file); r.Code != 0 {
		t.Fatalf("qemu-img check %s: exit status %d\n%s%s", file, r.Code, r.Stdout, r.Stderr)
	}
}

// CheckLeaks is Check, but leaked clusters are allowed, as they are after a
// crash.
func CheckLeaks(t testing.TB, file string) {
	t.Helper()
	const leaksOnly = 3
	if r := Try(t, "qemu-img", "check", "-f", "qcow2", file); r.Code != 0 && r.Code != leaksOnly {
		t.Fatalf("qemu-img check %s: exit status %d\n%s%s", file, r.Code, r.Stdout, r.Stderr)
	}
}

// Compare fails the test unless two images have the same size and contents.
// An empty format lets qemu-img guess.
func Compare(t testing.TB, formatA, a, formatB, b string) {
	t.Helper()
	args := []string{"compare"}
	if formatA != "" {
		args = append(args, "-f", formatA)
	}
	if formatB != "" {
		args = append(args, "-F", formatB)
	}
	r := Try(t, "qemu-img", append(args, a, b)...)
	// A longer image that ends in zeros is equal to qemu-img, with a warning.
	if r.Code != 0 || strings.Contains(r.Stdout+r.Stderr, "size mismatch") {
		t.Fatalf("qemu-img compare %s %s: exit status %d\n%s%s", a, b, r.Code, r.Stdout, r.Stderr)
	}
}
