package export

import (
	"net"

	"golang.org/x/sys/unix"
)

// peerCredentials returns who connected, nil if that is not known.
func peerCredentials(conn net.Conn) *Credentials {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return nil
	}
	rc, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	var cred *unix.Ucred
	if rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}) != nil || err != nil {
		return nil
	}
	return &Credentials{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}
}
