package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/imgnbd/imgnbd/storage"
)

// A source is what the name of an image means.
type source struct {
	name     string // as it is shown to people: a path, a URL or json:
	url      *url.URL
	format   string  // "" if the name does not say
	params   []Param // for the format
	readOnly bool
	direct   bool
	noLock   bool
	alone    bool // nothing is below it, whatever it says

	part          bool  // only the bytes from begin on, length of them
	begin, length int64 // length < 0: all
}

// within returns what src means of the file s, which it takes.
func (src *source) within(s storage.Store) (storage.Store, error) {
	if !src.part {
		return s, nil
	}
	part, err := storage.Section(s, src.begin, src.length)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return part, nil
}

// plain returns an error unless src means a file as it is, as it has to where no
// format is opened over it.
func (src *source) plain() error {
	if src.format != "" && src.format != "raw" {
		return fmt.Errorf("a file that holds data as it is cannot be in format %s", src.format)
	}
	if len(src.params) > 0 {
		return fmt.Errorf("a file that holds data as it is has no option '%s'", src.params[0].Key)
	}
	return nil
}

// parseName understands the names that QEMU does: a path; PROTOCOL:..., where
// the colon comes before the first slash; json:{...}.
func parseName(name string) (source, error) {
	if name == "" {
		return source{}, errNoFileName
	}
	if strings.IndexByte(name, 0) >= 0 {
		return source{}, fmt.Errorf("name %q holds a zero byte", name)
	}
	if rest, ok := strings.CutPrefix(name, "json:"); ok {
		src, err := parseJSON(rest)
		if err != nil || len(src.params) > 0 || src.part || src.url.Scheme != "file" {
			src.name = name
		} else if _, _, ok := cutProtocol(src.name); ok {
			src.name = src.url.Path
		} // else it is the path: nothing is lost, and other names can be beside it
		return src, err
	}
	proto, rest, ok := cutProtocol(name)
	if !ok {
		u, err := fileURL(name)
		return source{name: name, url: u}, err
	}
	if proto == "file" {
		// Not percent-encoded: what follows is the path, as in QEMU.
		u, err := fileURL(rest)
		if _, _, ok := cutProtocol(rest); ok {
			rest = "./" + rest // still a path where the name is used again
		}
		return source{name: rest, url: u}, err
	}
	u, err := url.Parse(name)
	if err != nil {
		// url.Error repeats the name.
		return source{}, fmt.Errorf("%s: %w", proto, errors.Unwrap(err))
	}
	return source{name: name, url: u}, nil
}

// errNoFileName is in QEMU's words, as are others below: scripts know them.
var errNoFileName = errors.New("The 'file' block driver requires a file name")

// cutProtocol splits "nbd://host" and "a:b", but not "./a:b".
func cutProtocol(name string) (proto, rest string, ok bool) {
	i := strings.IndexAny(name, ":/")
	if i < 0 || name[i] != ':' {
		return "", "", false
	}
	return name[:i], name[i+1:], true
}

// fileURL keeps the path as it is: cleaning "link/../x" would change its meaning.
func fileURL(path string) (*url.URL, error) {
	if path == "" {
		return nil, errNoFileName
	}
	if path[0] != '/' {
		wd, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		path = strings.TrimSuffix(wd, "/") + "/" + path
	}
	return &url.URL{Scheme: "file", Path: path}, nil
}

// combine resolves ref beside base. Both are names; a ref with a protocol or
// from the root stands for itself.
func combine(base, ref string) string {
	if _, _, ok := cutProtocol(ref); ok || strings.HasPrefix(ref, "/") {
		return ref
	}
	if strings.HasPrefix(base, "json:") {
		return ref
	}
	return base[:strings.LastIndexByte(base, '/')+1] + ref
}

// resolve turns a name found in an image into a source. from is the store of
// that image and base its name as it is shown.
func resolve(from storage.Store, base, ref string) (source, error) {
	if _, _, ok := cutProtocol(ref); ok || strings.HasPrefix(ref, "/") {
		return parseName(ref)
	}
	u := from.Info().URL
	if u == nil {
		return source{}, fmt.Errorf("%q is relative, and the image that names it has no name itself", ref)
	}
	if u.Scheme == "file" {
		src, err := parseName(combine(u.Path, ref)) // absolute, so a path
		src.name = combine(base, ref)
		return src, err
	}
	v := *u
	v.Path, v.RawPath, v.RawQuery = combine(u.Path, ref), "", ""
	return source{name: v.Redacted(), url: &v}, nil
}

// parseJSON understands the block node descriptions of QEMU that describe one
// format over one store or a part of one, nested or with dotted keys.
func parseJSON(text string) (source, error) {
	opts, err := flatten(text)
	if err != nil {
		return source{}, err
	}
	return opts.source()
}

// nodeOptions are the options of a node, with dotted keys.
type nodeOptions map[string]string

func flatten(text string) (nodeOptions, error) {
	if !utf8.ValidString(text) { // the decoder would make another name of it
		return nil, errors.New("Could not parse the JSON options: invalid UTF-8 sequence in string")
	}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	opts := make(nodeOptions)
	if err := opts.object(dec, ""); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if _, bad := errors.AsType[*json.SyntaxError](err); bad || err == io.ErrUnexpectedEOF {
			err = fmt.Errorf("Could not parse the JSON options: %w", err)
		}
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("Could not parse the JSON options: something follows the object")
	}
	return opts, nil
}

// object reads one object, refusing a key that appears twice: two readers
// could take different ones.
func (o nodeOptions) object(dec *json.Decoder, prefix string) error {
	if tok, err := dec.Token(); err != nil {
		return err
	} else if tok != json.Delim('{') {
		return errors.New("Invalid JSON object given")
	}
	return o.members(dec, prefix)
}

func (o nodeOptions) members(dec *json.Decoder, prefix string) error {
	if len(prefix) > 4096 {
		return errors.New("nested too deep")
	}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		key := prefix + tok.(string) // within an object the decoder gives nothing else
		tok, err = dec.Token()
		if err != nil {
			return err
		}
		var value string
		switch v := tok.(type) {
		case string:
			value = v
		case json.Number:
			value = v.String()
		case bool:
			value = map[bool]string{true: "on", false: "off"}[v]
		case json.Delim:
			if v != '{' {
				return fmt.Errorf("option %q is a list, which no option here takes", key)
			}
			if err := o.members(dec, key+"."); err != nil {
				return err
			}
			continue
		default:
			if key != "backing" {
				return fmt.Errorf("option %q is null, which only backing can be", key)
			}
		}
		if _, twice := o[key]; twice {
			return fmt.Errorf("option %q appears twice", key)
		}
		o[key] = value
	}
	_, err := dec.Token()
	return err
}

// take removes an option and returns its value, "" if it is not there.
func (o nodeOptions) take(key string) string {
	v := o[key]
	delete(o, key)
	return v
}

// on removes a boolean option.
func (o nodeOptions) on(key string) (bool, error) {
	if _, given := o[key]; !given {
		return false, nil
	}
	return Param{key, o.take(key)}.Bool()
}

func (o nodeOptions) source() (src source, err error) {
	if named, ok := o["file"]; ok {
		return src, &Hint{
			Err:    fmt.Errorf("Cannot find device='%s' nor node-name='%s'", named, named),
			Advice: "nodes have no names here; describe the file: file.filename=" + named,
		}
	}
	described := false
	for k := range o {
		described = described || strings.HasPrefix(k, "file.")
	}
	src.format = o.take("driver")
	file := "file."
	if isStoreDriver(src.format) && o["file.filename"] == "" {
		// The store itself, without a format over it: its bytes.
		o["driver"], src.format, file = src.format, "raw", ""
	} else if !described && src.format == "" {
		return src, errors.New("Must specify either driver or file")
	} else if !described {
		return src, errors.New(`A block device must be specified for "file"`)
	} else if o["file.driver"] == "raw" {
		if err := o.partOf(&src, file); err != nil {
			return src, err
		}
		file = "file.file."
	}
	if err := o.store(&src, file); err != nil {
		return src, err
	}
	var direct bool
	for _, b := range []struct {
		key string
		to  *bool
	}{{"read-only", &src.readOnly}, {"force-share", &src.noLock}, {"cache.direct", &direct}} {
		on, err := o.on(b.key)
		if err != nil {
			return src, err
		}
		*b.to = *b.to || on
	}
	src.direct = src.direct || direct
	o.take("node-name") // nobody can refer to it
	if v, given := o["backing"]; given && v == "" {
		src.alone = true
		delete(o, "backing")
	}
	for k, v := range o {
		switch {
		case strings.HasPrefix(k, "file."):
			return src, fmt.Errorf("Block protocol 'file' doesn't support the option '%s'", strings.TrimPrefix(k, "file."))
		case k == "backing" || strings.HasPrefix(k, "backing."):
			return src, errors.New(`option "backing" is null, or is not there: the backing image is what the image says`)
		}
		src.params = append(src.params, Param{k, v})
	}
	// A map has no order, and messages should.
	slices.SortFunc(src.params, func(a, b Param) int { return strings.Compare(a.Key, b.Key) })
	return src, nil
}

// partOf takes the options of a raw node below a format: it shows a part of a
// file, such as a disk in an archive.
func (o nodeOptions) partOf(src *source, p string) (err error) {
	o.take(p + "driver")
	o.take(p + "node-name")
	src.part, src.length = true, -1
	for _, n := range []struct {
		key string
		to  *int64
	}{{"offset", &src.begin}, {"size", &src.length}} {
		if _, given := o[p+n.key]; !given {
			continue
		}
		v, err := Param{n.key, o.take(p + n.key)}.Size()
		if err != nil {
			return err
		}
		*n.to = int64(min(v, math.MaxInt64))
	}
	if src.length > 0 && src.length%512 != 0 {
		return errors.New("Specified size is not multiple of 512")
	}
	return nil
}

func isStoreDriver(driver string) bool {
	switch driver {
	case "file", "host_device", "http", "https":
		return true
	}
	return false
}

// store takes the options that say where the bytes are.
func (o nodeOptions) store(src *source, p string) (err error) {
	driver := o.take(p + "driver")
	filename := o.take(p + "filename")
	switch driver {
	case "", "file", "host_device":
		// A path and nothing else: no protocol is looked for in it.
		src.name = filename
		if src.url, err = fileURL(filename); err != nil {
			return err
		}
	case "http", "https":
		if filename == "" {
			filename = o.take(p + "url")
		}
		if src.url, err = url.Parse(filename); err != nil {
			return errors.Unwrap(err)
		}
		if src.url.Scheme != driver {
			return fmt.Errorf("option %q: not a URL of %s", p+"url", driver)
		}
	default:
		return fmt.Errorf("option %q: %q is not one of file, host_device: an image is one format over one file", p+"driver", driver)
	}
	switch v := o.take(p + "locking"); v {
	case "", "auto", "on":
	case "off":
		src.noLock = true
	default:
		return fmt.Errorf("invalid parameter value: %s", v)
	}
	if p == "" {
		return nil // the rest is read for both
	}
	if src.direct, err = o.on(p + "cache.direct"); err != nil {
		return err
	}
	if src.readOnly, err = o.on(p + "read-only"); err != nil {
		return err
	}
	o.take(p + "node-name")
	return nil
}

// NodeName returns the json: name that means the same as options with dotted
// keys, such as driver=raw, file.filename=disk.img.
func NodeName(opts []Param) (string, error) {
	m := make(map[string]string, len(opts))
	for _, p := range opts {
		if _, twice := m[p.Key]; twice {
			return "", fmt.Errorf("option %q appears twice", p.Key)
		}
		if !utf8.ValidString(p.Key) || !utf8.ValidString(p.Value) {
			return "", &Hint{Err: fmt.Errorf("option %q is not UTF-8: %q", p.Key, p.Value), Advice: "name the file by itself, and its format with -f"}
		}
		m[p.Key] = p.Value
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		return "", err
	}
	return "json:" + strings.TrimSuffix(b.String(), "\n"), nil
}
