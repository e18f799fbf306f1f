package connect

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// linux is the running kernel.
type linux struct{}

func newKernel() (kernel, error) { return linux{}, nil }

// The family nbd, of linux/nbd-netlink.h.
const (
	family        = "nbd"
	familyVersion = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadTimeout = 8
	attrBackend     = 10

	attrSocket   = 1 // in attrSockets
	attrSocketFD = 1 // in attrSocket

	flagDestroyOnDisconnect = 1 // of attrClientFlags; it stays until it is not sent
	flagDisconnectOnClose   = 2 // of attrClientFlags; it ends with the connection
)

// dial finds the family. A socket is used for one command: an answer that was
// not read cannot be taken for that to the next.
func dial() (*genetlink.Conn, genetlink.Family, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("%w: netlink: %w", ErrUnavailable, err)
	}
	// It says more than an errno where the kernel knows more.
	_ = c.SetOption(netlink.ExtendedAcknowledge, true)
	f, err := c.GetFamily(family)
	if err != nil {
		c.Close()
		return nil, f, err
	}
	return c, f, nil
}

// dialLoading loads the module if the kernel does not know the family.
func dialLoading(maxPart int) (*genetlink.Conn, genetlink.Family, error) {
	// Newer kernels load it when they are asked for the family, which would be
	// without its parameter.
	var why error
	if _, err := os.Stat("/sys/module/nbd"); errors.Is(err, fs.ErrNotExist) {
		why = loadModule(maxPart)
	}
	c, f, err := dial()
	if errors.Is(err, fs.ErrNotExist) {
		if why == nil {
			why = errors.New("in a container, it may be hidden; before Linux 4.12, there is no netlink for it")
		}
		return nil, f, fmt.Errorf("%w: the kernel does not offer nbd: %w", ErrUnavailable, why)
	}
	return c, f, err
}

func loadModule(maxPart int) error {
	path, err := exec.LookPath("modprobe")
	if err != nil {
		path = "/sbin/modprobe"
	}
	args := []string{"nbd"}
	if maxPart >= 0 {
		args = append(args, fmt.Sprintf("max_part=%d", maxPart))
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if text := strings.TrimSpace(string(out)); err != nil && text != "" {
		return errors.New(strings.ReplaceAll(text, "\n", "; "))
	}
	return err
}

func (linux) connect(c *config) (int, error) {
	conn, f, err := dialLoading(c.maxPart)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	e := netlink.NewAttributeEncoder()
	if c.index != anyIndex {
		e.Uint32(attrIndex, uint32(c.index))
	}
	e.Uint64(attrSize, c.size)
	e.Uint64(attrBlockSize, c.blockSize)
	e.Uint64(attrTimeout, seconds(c.timeout))
	e.Uint64(attrDeadTimeout, seconds(c.deadTimeout))
	e.Uint64(attrServerFlags, c.flags)
	var clientFlags uint64
	if c.destroy {
		clientFlags = flagDestroyOnDisconnect
	}
	e.Uint64(attrClientFlags, clientFlags)
	e.String(attrBackend, c.backend)
	release, err := addSockets(e, c.conns)
	if err != nil {
		return 0, err
	}
	defer release()
	data, err := e.Encode()
	if err != nil {
		return 0, err
	}
	// The answer holds the index; to ask for an acknowledgement too would make
	// it two messages.
	answers, err := conn.Execute(message(cmdConnect, data), f.ID, netlink.Request)
	if err != nil {
		return 0, cause(err)
	}
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, err
		}
		for d.Next() {
			if d.Type() == attrIndex {
				return int(d.Uint32()), nil
			}
		}
	}
	return 0, errors.New("the kernel does not say which device it has taken")
}

// reconfigure sends what has to change and nothing else: each attribute that
// is sent is applied, also where no connection is taken, and Linux 6.12 waits
// for ever for a size that is sent to a device without a connection.
func (linux) reconfigure(r *reconfiguration) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(r.index))
	if len(r.conns) > 0 {
		e.Uint64(attrDeadTimeout, seconds(r.deadTimeout))
	}
	e.String(attrBackend, r.backend)
	release, err := addSockets(e, r.conns)
	if err != nil {
		return err
	}
	defer release()
	return command(cmdReconfigure, e)
}

func (linux) setTimeout(index int, backend string, timeout, deadTimeout time.Duration) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	e.Uint64(attrTimeout, seconds(timeout))
	e.Uint64(attrDeadTimeout, seconds(deadTimeout))
	e.String(attrBackend, backend)
	return command(cmdReconfigure, e)
}

func (linux) detachOnClose(index int, backend string) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	e.Uint64(attrClientFlags, flagDisconnectOnClose)
	e.String(attrBackend, backend)
	return command(cmdReconfigure, e)
}

func (linux) disconnect(index int) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(index))
	return command(cmdDisconnect, e)
}

// command runs a command that has no answer.
func command(cmd uint8, e *netlink.AttributeEncoder) error {
	data, err := e.Encode()
	if err != nil {
		return err
	}
	conn, f, err := dial()
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the kernel does not offer nbd", ErrUnavailable)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Execute(message(cmd, data), f.ID, netlink.Request|netlink.Acknowledge)
	return cause(err)
}

// addSockets encodes connections. They are the kernel's once the command is
// through; then release ends the hold on them that the encoding needs.
func addSockets(e *netlink.AttributeEncoder, conns []net.Conn) (release func(), err error) {
	var files []*os.File
	release = func() {
		for _, f := range files {
			f.Close()
		}
	}
	if len(conns) == 0 {
		return release, nil
	}
	for _, conn := range conns {
		fc, ok := conn.(interface{ File() (*os.File, error) })
		if !ok {
			release()
			return nil, fmt.Errorf("%T is not a socket", conn)
		}
		f, err := fc.File()
		if err != nil {
			release()
			return nil, err
		}
		files = append(files, f)
	}
	e.Nested(attrSockets, func(e *netlink.AttributeEncoder) error {
		for _, f := range files {
			e.Nested(attrSocket, func(e *netlink.AttributeEncoder) error {
				e.Uint32(attrSocketFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	})
	return release, nil
}

// seconds rounds up: 0 means not to wait at all.
func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

func message(cmd uint8, data []byte) genetlink.Message {
	return genetlink.Message{Header: genetlink.Header{Command: cmd, Version: familyVersion}, Data: data}
}

// cause is what the kernel says, without the wrapping of the library.
func cause(err error) error {
	e, ok := errors.AsType[*netlink.OpError](err)
	switch {
	case !ok:
		return err
	case e.Message != "":
		return fmt.Errorf("%s: %w", e.Message, e.Err)
	}
	return e.Err
}

// A blockFile is a block device that is open.
type blockFile struct{ *os.File }

func (linux) open(path string, exclusive bool) (block, error) {
	flags := os.O_RDONLY
	if exclusive {
		flags |= syscall.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	return blockFile{f}, nil
}

func (f blockFile) sync() error { return f.Sync() }

func (f blockFile) rescan() error {
	_, err := unix.IoctlRetInt(int(f.Fd()), unix.BLKRRPART)
	return err
}

func (linux) kill(p *os.Process) error { return p.Kill() }

func (f blockFile) endReadOnly() error {
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, 0)
}

func (linux) number(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", unix.ENOTBLK
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

func (linux) syncFS(path string) error {
	// The name may be another's by now, and a FIFO.
	f, err := os.OpenFile(path, unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// peerOf returns who has connected to a Unix socket.
func peerOf(fd int) (pid, uid int, err error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, -1, err
	}
	return int(cred.Pid), int(cred.Uid), nil
}
