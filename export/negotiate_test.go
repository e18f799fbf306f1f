package export

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/nbd"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// memDisk returns a raw disk in memory.
func memDisk(t testing.TB, size int64) image.Device {
	t.Helper()
	d, err := raw.Open(storagetest.NewMem(size), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// catalogue is the exporter of the transcripts: "disk" is a plain disk, "full"
// has all its clients, "" is the default, "secret" is refused, nothing else
// exists.
type catalogue struct {
	disk    image.Device
	held    int // exports that were opened and not released
	entered int
}

func (c *catalogue) list() ([]Info, error) {
	return []Info{{"disk", "a disk"}, {"full", ""}}, nil
}

func (c *catalogue) open(name string) (*Export, error) {
	e := &Export{Name: name, Device: c.disk, MultiConn: true}
	switch name {
	case "disk":
		e.Description = "a disk"
		e.AllocationDepth = true
		e.Contexts = []MetaContext{bitmap("qemu:dirty-bitmap:b1"), bitmap("qemu:dirty-bitmap:b0")}
	case "full":
		e.MaxClients = 1
	case "":
		e.ReadOnly = true
	case "secret":
		return nil, fs.ErrPermission
	default:
		return nil, fs.ErrNotExist
	}
	c.held++
	return e, nil
}

func (c *catalogue) release(*Export) { c.held-- }

func (c *catalogue) enter(e *Export) bool {
	if e.MaxClients > 0 {
		return false
	}
	c.entered++
	return true
}

// bitmap is a context in which everything has the flag 1.
type bitmap string

func (b bitmap) Name() string { return string(b) }

func (b bitmap) AppendStatus(dst []Status, _, n int64) ([]Status, error) {
	return append(dst, Status{n, 1}), nil
}

var optionNames = map[string]nbd.Option{
	"EXPORT_NAME": nbd.OptExportName, "ABORT": nbd.OptAbort, "LIST": nbd.OptList, "PEEK_EXPORT": nbd.OptPeekExport,
	"STARTTLS": nbd.OptStartTLS, "INFO": nbd.OptInfo, "GO": nbd.OptGo, "STRUCTURED_REPLY": nbd.OptStructuredReply,
	"LIST_META_CONTEXT": nbd.OptListMetaContext, "SET_META_CONTEXT": nbd.OptSetMetaContext,
	"EXTENDED_HEADERS": nbd.OptExtendedHeaders,
}

var replyNames = map[nbd.OptionReply]string{
	nbd.RepAck: "ACK", nbd.RepServer: "SERVER", nbd.RepInfo: "INFO", nbd.RepMetaContext: "META_CONTEXT",
	nbd.RepErrUnsup: "ERR_UNSUP", nbd.RepErrPolicy: "ERR_POLICY", nbd.RepErrInvalid: "ERR_INVALID",
	nbd.RepErrUnknown: "ERR_UNKNOWN", nbd.RepErrExtHeaderReqd: "ERR_EXT_HEADER_REQD", nbd.RepErrTooBig: "ERR_TOO_BIG",
	nbd.RepErrTLSReqd: "ERR_TLS_REQD",
}

// TestTranscripts plays what clients say and compares the answers. A
// transcript has lines "C: opt NAME args" (strings quoted, repeated by *N,
// numbers as they are; "C: raw NAME hex" sends data as it is; "C: tls offered"
// and "C: tls required" are the server's settings, "S: upgrade" is TLS), and the
// answers "S: ...". Rewrite the answers with UPDATE=1, and read them.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/negotiate/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(text))
			if os.Getenv("UPDATE") != "" {
				if err := os.WriteFile(file, []byte(got), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			if d := cmp.Diff(string(text), got); d != "" {
				t.Errorf("transcript (-file +ours):\n%s", d)
			}
		})
	}
}

// play returns the transcript with our answers.
func play(t *testing.T, script string) string {
	var out strings.Builder
	c := &catalogue{disk: memDisk(t, 64<<20)}
	n, _ := negotiate(c, 3, tlsNone)
	over := false
	for _, line := range strings.Split(strings.TrimSuffix(script, "\n"), "\n") {
		if strings.HasPrefix(line, "S: ") {
			continue
		}
		fmt.Fprintln(&out, line)
		says, ok := strings.CutPrefix(line, "C: ")
		if !ok {
			continue // a comment
		}
		if over {
			t.Fatalf("%q comes after the end", line)
		}
		words := split(t, says)
		if words[0] == "tls" {
			n.tls = map[string]tlsState{"offered": tlsOffered, "required": tlsAwaited}[words[1]]
			continue
		}
		if words[0] == "flags" {
			v, err := strconv.ParseUint(words[1], 0, 32)
			if err != nil {
				t.Fatal(err)
			}
			if n, err = negotiate(c, uint32(v), tlsNone); err != nil {
				fmt.Fprintln(&out, "S: hangup:", err)
				over = true
			}
			continue
		}
		o := option{id: optionNames[words[1]]}
		if o.id == 0 {
			v, err := strconv.ParseUint(words[1], 0, 32)
			if err != nil {
				t.Fatalf("%q: unknown option", line)
			}
			o.id = nbd.Option(v)
		}
		if words[0] == "raw" {
			data, err := hex.DecodeString(strings.Join(words[2:], ""))
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			o.data = data
		} else {
			o.data = optionData(t, o.id, words[2:])
		}
		answer, next := n.handle(o)
		if o.id == nbd.OptExportName && next == transmit {
			fmt.Fprintf(&out, "S: size %d flags %#x and %d zeros\n",
				binary.BigEndian.Uint64(answer), binary.BigEndian.Uint16(answer[8:]), bytes.Count(answer[10:], []byte{0}))
		} else {
			showReplies(t, &out, o.id, answer)
		}
		switch next {
		case hangup:
			fmt.Fprintln(&out, "S: hangup")
			over = true
		case upgrade:
			fmt.Fprintln(&out, "S: upgrade")
			n.close()
			n = n.afterTLS()
		case transmit:
			a := n.agreed
			var contexts []string
			for _, c := range a.contexts {
				contexts = append(contexts, fmt.Sprintf("%d=%s", c.id, c.Name()))
			}
			fmt.Fprintf(&out, "S: transmit %q size %d flags %#x structured %v extended %v contexts %v\n",
				a.name, a.size, uint16(a.flags), a.structured, a.extended, contexts)
			over = true
		}
	}
	if n != nil {
		n.close()
	}
	if want := c.entered; c.held != want {
		t.Errorf("%d exports are held, want %d", c.held, want)
	}
	return out.String()
}

// split divides a line into words; a quoted one may be repeated by *N.
func split(t *testing.T, line string) []string {
	var words []string
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		if line[0] != '"' {
			word, rest, _ := strings.Cut(line, " ")
			words, line = append(words, word), rest
			continue
		}
		q, err := strconv.QuotedPrefix(line)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		word, _ := strconv.Unquote(q)
		line = line[len(q):]
		if times, ok := strings.CutPrefix(line, "*"); ok {
			times, line, _ = strings.Cut(times, " ")
			n, err := strconv.Atoi(times)
			if err != nil {
				t.Fatal(err)
			}
			word = strings.Repeat(word, n)
		}
		words = append(words, word)
	}
	return words
}

func appendString(dst []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(dst, uint32(len(s))), s...)
}

// optionData encodes the arguments of an option.
func optionData(t *testing.T, id nbd.Option, args []string) []byte {
	var data []byte
	switch id {
	case nbd.OptGo, nbd.OptInfo:
		data = appendString(data, args[0])
		data = binary.BigEndian.AppendUint16(data, uint16(len(args)-1))
		for _, a := range args[1:] {
			v, err := strconv.ParseUint(a, 0, 16)
			if err != nil {
				t.Fatal(err)
			}
			data = binary.BigEndian.AppendUint16(data, uint16(v))
		}
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		data = appendString(data, args[0])
		data = binary.BigEndian.AppendUint32(data, uint32(len(args)-1))
		for _, q := range args[1:] {
			data = appendString(data, q)
		}
	default:
		data = []byte(strings.Join(args, ""))
	}
	return data
}

// showReplies decodes the replies to an option.
func showReplies(t *testing.T, out *strings.Builder, id nbd.Option, b []byte) {
	for len(b) > 0 {
		if len(b) < 20 || binary.BigEndian.Uint64(b) != nbd.MagicOptionReply {
			t.Fatalf("no reply: %x", b)
		}
		if got := nbd.Option(binary.BigEndian.Uint32(b[8:])); got != id {
			t.Fatalf("reply to %v, want one to %v", got, id)
		}
		typ := nbd.OptionReply(binary.BigEndian.Uint32(b[12:]))
		size := binary.BigEndian.Uint32(b[16:])
		d := b[20 : 20+size]
		b = b[20+size:]
		fmt.Fprintf(out, "S: rep %s", replyNames[typ])
		switch {
		case typ == nbd.RepServer:
			n := binary.BigEndian.Uint32(d)
			fmt.Fprintf(out, " %q %q", d[4:4+n], d[4+n:])
		case typ == nbd.RepMetaContext:
			fmt.Fprintf(out, " %d %q", binary.BigEndian.Uint32(d), d[4:])
		case typ == nbd.RepInfo:
			kind, d := binary.BigEndian.Uint16(d), d[2:]
			switch kind {
			case nbd.InfoExport:
				fmt.Fprintf(out, " EXPORT %d %#x", binary.BigEndian.Uint64(d), binary.BigEndian.Uint16(d[8:]))
			case nbd.InfoBlockSize:
				fmt.Fprintf(out, " BLOCK_SIZE %d %d %d", binary.BigEndian.Uint32(d), binary.BigEndian.Uint32(d[4:]), binary.BigEndian.Uint32(d[8:]))
			case nbd.InfoName:
				fmt.Fprintf(out, " NAME %q", d)
			case nbd.InfoDescription:
				fmt.Fprintf(out, " DESCRIPTION %q", d)
			}
		case typ.IsError() || len(d) > 0:
			fmt.Fprintf(out, " %q", d)
		}
		fmt.Fprintln(out)
	}
}

// FuzzNegotiate feeds options to a negotiation: no panic, well-formed answers
// of bounded size, and no export is left open.
func FuzzNegotiate(f *testing.F) {
	f.Add(uint32(3), []byte("\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x0a\x00\x00\x00\x04disk\x00\x00"))
	f.Add(uint32(3), []byte("\x00\x00\x00\x0b\x00\x00\x00\x00\x00\x00\x00\x0a\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x04base"))
	f.Add(uint32(0), []byte("\x00\x00\x00\x01\x00\x00\x00\x04disk"))
	f.Fuzz(func(t *testing.T, flags uint32, in []byte) {
		c := &catalogue{disk: memDisk(t, 1<<20)}
		n, err := negotiate(c, flags, tlsState(len(in)%4))
		if err != nil {
			return
		}
		for len(in) >= 8 {
			id, size := nbd.Option(binary.BigEndian.Uint32(in)), binary.BigEndian.Uint32(in[4:])
			in = in[8:]
			o := option{id: id, data: in[:min(size, uint32(len(in)), maxOption)]}
			in = in[len(o.data):]
			answer, next := n.handle(o)
			if len(answer) > 4*maxOption {
				t.Fatalf("an answer of %d bytes", len(answer))
			}
			if !(id == nbd.OptExportName && next == transmit) {
				showReplies(&testing.T{}, &strings.Builder{}, id, answer)
			}
			if next == stay && len(answer) == 0 {
				t.Fatal("no answer")
			}
			if (next == transmit) != (n.agreed != nil) {
				t.Fatal("the step does not fit the agreement")
			}
			if next == upgrade {
				n.close()
				n = n.afterTLS()
				continue
			}
			if next != stay {
				break
			}
		}
		n.close()
		if c.held != c.entered {
			t.Fatalf("%d exports are held, %d are used", c.held, c.entered)
		}
	})
}
