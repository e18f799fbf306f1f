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
	text := map[string]*string{"port": &c.port, "certfile": &c.cert, "keyfile": &c.key, "cacertfile": &c.ca, "tlshostname": &c.tlsHost}
	var seconds int // of timeout
	number := map[string]*int{"bs": &c.blockSize, "conns": &c.connections, "timeout": &seconds}
	set := map[string]*bool{"no_optgo": &c.noGo, "persist": &c.persist, "swap": &c.swap, "sdp": &c.sdp, "unix": &c.unix,
		"preinit": &c.preinit, "tls": &c.tls}
	switch {
	case text[key] != nil:
		*text[key] = value
	case set[key] != nil:
		*set[key] = true
	case number[key] != nil:
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 {
			return true, errors.New("not a number")
		}
		if *number[key] = n; key == "timeout" {
			c.timeout = time.Duration(n) * time.Second
		}
	default:
		return false, nil
	}
	return true, nil
}
