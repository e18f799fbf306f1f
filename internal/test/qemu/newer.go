package qemu

import (
	"os"
	"path/filepath"
	"testing"
)

// Newer returns the path of a tool of Debian 13 (qemu 10.0, libnbd 1.22,
// nbdkit 1.42, nbd 3.26), to be given to Run, Try or Start. install-judges
// unpacks these beside the system's older ones, with the libraries they need:
// they are the ones that speak extended headers. A tool that is missing skips
// or fails the test as in Require.
//
// The path is a script that starts the tool under its own dynamic linker, so
// a server started by it is the process that Start returns.
func Newer(t testing.TB, tool string) string {
	t.Helper()
	if cache, err := os.UserCacheDir(); err == nil {
		path := filepath.Join(cache, "imgnbd", "judges", "debian-13", "bin", tool)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	Missing(t, "Debian 13's "+tool)
	return ""
}
