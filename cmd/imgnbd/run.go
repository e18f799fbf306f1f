package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
)

// startCommand starts the command of --run, which finds the export in its
// environment under the names that nbdkit uses.
func (o *serveOptions) startCommand(u *ui, p *place) (*exec.Cmd, error) {
	uri := p.uri
	uri.Export = o.exportName
	var port, socket string
	if uri.Network == "unix" {
		socket = uri.Address
	} else if _, after, err := net.SplitHostPort(uri.Address); err == nil {
		port = after
	}
	cmd := exec.Command("/bin/sh", "-c", o.runCommand)
	cmd.Env = append(os.Environ(), "uri="+uri.String(), "nbd="+uri.String(),
		"unixsocket="+socket, "port="+port, "exportname="+o.exportName)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = u.stdin, u.stdout, u.stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// exitOf turns the end of a command into ours, as a shell does.
func exitOf(err error) error {
	e, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	if st, ok := e.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return &exit{128 + int(st.Signal()), fmt.Errorf("the command was killed by signal %d", st.Signal())}
	}
	return &exit{code: e.ExitCode()}
}
