// Package docs holds the text that the program and its manual share.
package docs

import _ "embed"

// Synopsis describes every command and option. It is divided into sections,
// each begun by a line "== NAME".
//
//go:embed synopsis.txt
var Synopsis string
