package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"

	"github.com/imgnbd/imgnbd/internal/journal"
)

// journals returns the journals of images in the folder for temporary files.
// One that a test leaves behind, since it killed a server, is 8 MiB of memory
// until the machine is started again.
func journals() map[string]bool {
	found := map[string]bool{}
	for _, dir := range journal.Dirs() {
		files, _ := filepath.Glob(filepath.Join(dir, "*.journal"))
		for _, file := range files {
			f, err := os.Open(file)
			if err != nil {
				continue // it went meanwhile
			}
			header, _ := io.ReadAll(io.LimitReader(f, 4096))
			f.Close()
			if bytes.Contains(header, []byte(`opened as "file://`+os.TempDir()+"/")) {
				found[file] = true
			}
		}
	}
	return found
}
