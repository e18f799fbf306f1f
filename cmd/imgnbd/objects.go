package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/imgnbd/imgnbd/image"
)

// objects are what --object has made, by id: *tlsCreds or an authz.
type objects map[string]any

// objectKinds are the types that this program knows, and how one is made.
var objectKinds = []struct {
	name string
	make func(p *properties) (any, error)
}{
	{"tls-creds-x509", newTLSCreds},
	{"authz-simple", newAuthzSimple},
	{"authz-list", newAuthzList},
	{"authz-list-file", newAuthzListFile},
}

// otherKinds are types of QEMU's, and what to do instead.
var otherKinds = map[string]string{
	"tls-creds-psk":  "use tls-creds-x509",
	"tls-creds-anon": "it would keep out nobody: use tls-creds-x509",
	"authz-pam":      "use authz-list or authz-list-file",
	"secret":         "a key for TLS is kept without a passphrase, in a file that only its user may read",
	"secret_keyring": "a key for TLS is kept without a passphrase, in a file that only its user may read",
	"throttle-group": "limit the process with its control group: systemd-run -p IOReadBandwidthMax=...",
	"iothread":       "threads are used as they are needed",
	"main-loop":      "threads are used as they are needed",
}

// add makes the object that s describes, as TYPE,id=ID,key=value,... or in JSON.
func (o objects) add(s string) error {
	p, err := parseProperties(s)
	if err != nil {
		return err
	}
	name, ok := p.take("qom-type")
	if !ok {
		return says("Parameter 'qom-type' is missing")
	}
	for _, kind := range objectKinds {
		if kind.name != name {
			continue
		}
		id, ok := p.take("id")
		switch {
		case !ok:
			return says("Parameter 'id' is missing")
		case !regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]*$`).MatchString(id):
			return says("Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
		}
		made, err := kind.make(p)
		if err == nil {
			err = p.end()
		}
		if err != nil {
			return err
		}
		if o[id] != nil {
			return says("attempt to add duplicate property '%s' to object (type 'container')", id)
		}
		o[id] = made
		return nil
	}
	if instead, ok := otherKinds[name]; ok {
		return hinted(fmt.Errorf("object type '%s' is not supported", name), instead)
	}
	return says("Parameter 'qom-type' does not accept value '%s'", name)
}

// properties are the parts of an object that were not taken yet. The key of a
// value in a list or a structure is dotted, as in rules.0.match.
type properties struct{ rest []image.Param }

func parseProperties(s string) (*properties, error) {
	if !strings.HasPrefix(s, "{") {
		return &properties{keyValues(s, "qom-type")}, nil
	}
	var v map[string]any
	if err := decodeJSON([]byte(s), &v); err != nil {
		return nil, err
	}
	p := &properties{}
	return p, p.flatten("", v)
}

// decodeJSON reads one value and nothing behind it.
func decodeJSON(text []byte, v any) error {
	dec := json.NewDecoder(strings.NewReader(string(text)))
	dec.UseNumber()
	err := dec.Decode(v)
	if err == nil {
		if _, err = dec.Token(); err == io.EOF {
			return nil
		}
		err = errors.New("text behind the value")
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return says("JSON parse error, premature EOI")
	}
	return says("JSON parse error, %v", err)
}

// flatten adds what v holds under key.
func (p *properties) flatten(key string, v any) error {
	below := func(name string) string { return strings.TrimPrefix(key+"."+name, ".") }
	switch v := v.(type) {
	case map[string]any:
		for name, e := range v {
			if err := p.flatten(below(name), e); err != nil {
				return err
			}
		}
	case []any:
		for i, e := range v {
			if err := p.flatten(below(strconv.Itoa(i)), e); err != nil {
				return err
			}
		}
	case string:
		p.rest = append(p.rest, image.Param{Key: key, Value: v})
	case json.Number:
		p.rest = append(p.rest, image.Param{Key: key, Value: v.String()})
	case bool:
		p.rest = append(p.rest, image.Param{Key: key, Value: map[bool]string{true: "on", false: "off"}[v]})
	default:
		return says("Invalid parameter type for '%s'", key)
	}
	return nil
}

// take returns the value of key, the last if there are several.
func (p *properties) take(key string) (value string, ok bool) {
	for _, q := range p.rest {
		if q.Key == key {
			value, ok = q.Value, true
		}
	}
	p.rest = slices.DeleteFunc(p.rest, func(q image.Param) bool { return q.Key == key })
	return value, ok
}

// choice is take for one of some words, of which the first is the default.
func (p *properties) choice(key string, words ...string) (string, error) {
	value, ok := p.take(key)
	switch {
	case !ok:
		return words[0], nil
	case !slices.Contains(words, value):
		return "", says("Parameter '%s' does not accept value '%s'", key[strings.LastIndex(key, ".")+1:], value)
	}
	return value, nil
}

func (p *properties) flag(key string, otherwise bool) (bool, error) {
	switch value, ok := p.take(key); {
	case !ok:
		return otherwise, nil
	case slices.Contains([]string{"on", "yes", "true", "y"}, value):
		return true, nil
	case slices.Contains([]string{"off", "no", "false", "n"}, value):
		return false, nil
	}
	return false, says("Parameter '%s' expects 'on' or 'off'", key)
}

// end refuses what nobody has taken.
func (p *properties) end() error { return p.unexpectedBut("") }

// unexpectedBut refuses what is not key.
func (p *properties) unexpectedBut(key string) error {
	for _, q := range p.rest {
		if q.Key != key {
			return says("Parameter '%s' is unexpected", q.Key)
		}
	}
	return nil
}
