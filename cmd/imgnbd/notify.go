package main

import (
	"net"
	"os"
)

// notify tells a service manager of the state of this process, see
// sd_notify(3). Where there is none, or it does not listen, nothing is lost.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	c.Write([]byte(state))
}
