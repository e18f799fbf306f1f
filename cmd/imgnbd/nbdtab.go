package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// nbdtabPath is where nbd-client finds what its devices are.
const nbdtabPath = "/etc/nbdtab"

// readNBDTab returns what nbdtab says of a device, which may be given without
// /dev/.
func readNBDTab(u *ui, device string) (*clientOptions, error) {
	f, err := os.Open(nbdtabPath)
	if err != nil {
		return nil, fmt.Errorf("%s: %s", nbdtabPath, strerror(err))
	}
	defer f.Close()
	c, err := parseNBDTab(u, f, strings.TrimPrefix(device, "/dev/"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", nbdtabPath, err)
	}
	return c, nil
}

// parseNBDTab finds the first line of a device, see nbdtab(5): its name, the
// host or socket, the name of the export, and options with commas between.
func parseNBDTab(u *ui, r io.Reader, name string) (*clientOptions, error) {
	var found *clientOptions
	lines := bufio.NewScanner(r)
	for number := 1; lines.Scan(); number++ {
		fields := strings.Fields(lines.Text())
		for i, f := range fields {
			if f[0] == '#' {
				fields = fields[:i]
				break
			}
		}
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 3 || len(fields) > 4 {
			return nil, fmt.Errorf("line %d: DEVICE HOST EXPORT [OPTIONS] is expected, not %d fields", number, len(fields))
		}
		if found != nil || strings.TrimPrefix(fields[0], "/dev/") != name {
			continue
		}
		found = &clientOptions{device: "/dev/" + name, host: fields[1], export: fields[2], port: defaultPort, connections: 1}
		if len(fields) == 3 {
			continue
		}
		for _, option := range strings.Split(fields[3], ",") {
			key, value, _ := strings.Cut(option, "=")
			known, err := found.setNBDTab(key, value)
			if err != nil {
				return nil, fmt.Errorf("line %d: %s: %w", number, option, err)
			}
			if !known && !strings.HasPrefix(key, "_") { // those are for others
				u.warning(fmt.Sprintf("unknown option '%s' found in nbdtab file", printable(key)))
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if found == nil {
		return nil, fmt.Errorf("there is no line for %s", name)
	}
	return found, nil
}

// setNBDTab sets an option of a line, and reports whether there is one of that
// name.
func (c *clientOptions) setNBDTab(key, value string) (known bool, err error) {
	number := func(n *int) (bool, error) {
		*n, err = strconv.Atoi(value)
		if err != nil || *n < 0 {
			return true, errors.New("not a number")
		}
		return true, nil
	}
	switch key {
	case "port":
		c.port = value
	case "certfile":
		c.cert = value
	case "keyfile":
		c.key = value
	case "cacertfile":
		c.ca = value
	case "tlshostname":
		c.tlsHost = value
	case "bs":
		return number(&c.blockSize)
	case "conns":
		return number(&c.connections)
	case "timeout":
		var seconds int
		_, err := number(&seconds)
		c.timeout = time.Duration(seconds) * time.Second
		return true, err
	case "no_optgo":
		c.noGo = true
	case "persist":
		c.persist = true
	case "swap":
		c.swap = true
	case "sdp":
		c.sdp = true
	case "unix":
		c.unix = true
	case "preinit":
		c.preinit = true
	case "tls":
		c.tls = true
	default:
		return false, nil
	}
	return true, nil
}
