// Command imgnbd serves disk images over NBD.
//
// Without a sub-command it takes qemu-nbd's command line; called by the name
// qemu-nbd it takes nothing else.
package main

import (
	"os"
)

func main() { os.Exit(process()) }
