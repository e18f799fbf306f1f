package qemu

import (
	"os/exec"
	"syscall"
)

// endWithParent ends a server with the test binary, which a panic or a
// timeout ends without any cleanup.
func endWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
