package main

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/internal/test/pki"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// certificates returns the folders of a server for localhost and of a client.
func certificates(t *testing.T) (ca *pki.CA, server, client string) {
	t.Helper()
	return certificatesOf(t, pki.New(t))
}

func certificatesOf(t *testing.T, ca *pki.CA) (_ *pki.CA, server, client string) {
	t.Helper()
	subject := pkix.Name{Country: []string{"GB"}, Organization: []string{"Org, Ltd"}, OrganizationalUnit: []string{"a+b"}, CommonName: "client #1"}
	server = ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost")})
	client = ca.Dir(map[string]tls.Certificate{"client": ca.Client(nil, subject)})
	return ca, server, client
}

// What is wrong with objects is told in qemu-nbd's words, wherever it has some
// that are worth it.
func TestObjectsSameAsQEMUNBD(t *testing.T) {
	workplace(t)
	_, server, client := certificates(t)
	good := "tls-creds-x509,id=a,endpoint=server,dir=" + server
	for _, args := range [][]string{
		{"--object", "foo"},
		{"--object", ""},
		{"--object", "foo,id=a"},
		{"--object", "tls-creds-x509"},
		{"--object", "tls-creds-x509,id=a"},
		{"--object", "tls-creds-x509,id=1a"},
		{"--object", "tls-creds-x509,id=a,dir=/nonexistent"},
		{"--object", "tls-creds-x509,id=a,endpoint=server,dir=" + client},
		{"--object", "tls-creds-x509,id=a,dir=" + server + ",endpoint=foo"},
		{"--object", good + ",verify-peer=maybe"},
		{"--object", good + ",foo=bar"},
		{"--object", good, "--object", good},
		{"--object", "tls-creds-x509,id=a,dir=" + client, "--tls-creds", "a"},
		{"--object", good, "--tls-creds", "b"},
		{"--object", "authz-simple,id=a,identity=x", "--tls-creds", "a"},
		{"--tls-creds", "b"},
		{"--tls-authz", "b"},
		{"--tls-hostname", "b"},
		{"--object", good, "--tls-creds", "a", "--tls-hostname", "b"},
		{"--object", "authz-simple,id=a"},
		{"--object", "authz-list,id=a,policy=foo"},
		{"--object", "authz-list,id=a,rules.0.match=x"},
		{"--object", "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.format=foo"},
		{"--object", "authz-list,id=a,rules.1.match=x"},
		{"--object", `{"qom-type":"authz-simple"`},
		{"--object", `{"id":"a"}`},
		{"-L", "--tls-hostname", "b"},
		{"-L", "--object", good, "--tls-creds", "a"},
		{"-L", "--object", "tls-creds-x509,id=a,dir=" + client, "--tls-creds", "a", "--tls-authz", "b"},
	} {
		if args[0] != "-L" {
			args = append(args, "disk.raw")
		}
		compareOutcome(t, append([]string{"qemu-nbd"}, args...))
	}
}

// Certificates that no peer would take are found when the program starts.
func TestBadCertificates(t *testing.T) {
	ca := pki.New(t)
	other := pki.New(t)
	dirs := map[string]string{
		"has expired":            ca.Dir(map[string]tls.Certificate{"server": ca.Server(pki.Expired, "localhost")}),
		"is not yet active":      ca.Dir(map[string]tls.Certificate{"server": ca.Server(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, "localhost")}),
		"failed validation":      ca.Dir(map[string]tls.Certificate{"server": other.Server(nil, "localhost")}),
		"incompatible key usage": ca.Dir(map[string]tls.Certificate{"server": ca.Client(nil, pkix.Name{CommonName: "x"})}),
	}
	swapped := ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost"), "other": ca.Server(nil, "localhost")})
	if err := os.Rename(filepath.Join(swapped, "other-key.pem"), filepath.Join(swapped, "server-key.pem")); err != nil {
		t.Fatal(err)
	}
	dirs["does not match"] = swapped
	foreign := ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost")})
	ca.Write(filepath.Join(foreign, "ca-crl.pem"), "X509 CRL", other.CRL(time.Now().Add(time.Hour)))
	dirs["no CA of ours has signed"] = foreign
	for want, dir := range dirs {
		err := objects{}.add("tls-creds-x509,id=a,endpoint=server,dir=" + dir)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A secured program serves an empty disk over TLS.
func startTLS(t *testing.T, args ...string) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "socket")
	o := newServeOptions()
	operands, err := scan(o.flags, append([]string{"-t", "-e0", "-f", "raw", "-k", socket, disk}, args...))
	if err == nil {
		err = o.tls.check(o.objects, false)
	}
	if err != nil {
		t.Fatal(err)
	}
	u := newUI("imgnbd", nil, os.Stderr, os.Stderr)
	place, err := o.listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dev, err := o.open(t.Context(), u, operands[0])
	if err != nil {
		t.Fatal(err)
	}
	e, err := o.export("disk", dev)
	if err != nil {
		t.Fatal(err)
	}
	s := o.newServer(u, e, newVisitors())
	done := make(chan error, 1)
	go func() { done <- s.Serve(place.listeners[0]) }()
	t.Cleanup(func() {
		if err := s.Shutdown(t.Context()); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
		<-done
		dev.Close()
		place.close()
	})
	return socket
}

// Clients of others and our own get in with a certificate, and with nothing
// else.
func TestTLSClients(t *testing.T) {
	t.Run("ECDSA", func(t *testing.T) { testTLSClients(t, pki.New(t)) })
	t.Run("RSA", func(t *testing.T) { testTLSClients(t, pki.NewRSA(t)) })
}

func testTLSClients(t *testing.T, ca *pki.CA) {
	_, server, client := certificatesOf(t, ca)
	stranger := pki.New(t)
	strangers := stranger.Dir(map[string]tls.Certificate{"client": stranger.Client(nil, pkix.Name{CommonName: "x"})})
	if err := os.WriteFile(filepath.Join(strangers, "ca-cert.pem"), pemOf(t, filepath.Join(server, "ca-cert.pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	nobody := ca.Dir(nil)
	expired := ca.Dir(map[string]tls.Certificate{"client": ca.Client(pki.Expired, pkix.Name{CommonName: "x"})})
	servers := ca.Dir(map[string]tls.Certificate{"client": ca.Server(nil, "localhost")})
	socket := startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server, "--tls-creds=a")
	list := func(program func(...string) outcome, dir, host string) outcome {
		return program("qemu-nbd", "-L", "-k", socket, "--object", "tls-creds-x509,id=a,endpoint=client,dir="+dir,
			"--tls-creds=a", "--tls-hostname", host)
	}
	real := func(args ...string) outcome { return theirs(t, args...) }
	for name, program := range map[string]func(...string) outcome{"ours": ours, "qemu-nbd": real} {
		t.Run(name, func(t *testing.T) {
			if name == "qemu-nbd" && realQEMUNBD == "" {
				qemu.Require(t, "the real qemu-nbd")
			}
			if o := list(program, client, "localhost"); o.Code != 0 || !strings.HasPrefix(o.Stdout, "exports available: 1\n") {
				t.Errorf("%+v", o)
			}
			for what, o := range map[string]outcome{
				"another host":   list(program, client, "elsewhere"),
				"another CA":     list(program, strangers, "localhost"),
				"no certificate": list(program, nobody, "localhost"),
				"no TLS":         program("qemu-nbd", "-L", "-k", socket),
				"expired":        list(program, expired+",sanity-check=off", "localhost"),
				"for servers":    list(program, servers+",sanity-check=off", "localhost"),
			} {
				if o.Code != 1 || o.Stdout != "" || o.Stderr == "" {
					t.Errorf("%s: %+v", what, o)
				}
			}
		})
	}
	uri := "nbds+unix:///?socket=" + socket + "&tls-certificates=" + client
	t.Run("nbdinfo", func(t *testing.T) {
		if got := qemu.Run(t, "nbdinfo", uri); !strings.Contains(got, "with TLS") {
			t.Error(got)
		}
		if r := qemu.Try(t, "nbdinfo", "nbd+unix:///?socket="+socket); r.Code == 0 {
			t.Error("served in the clear")
		}
	})
	t.Run("nbdcopy", func(t *testing.T) {
		dir := t.TempDir()
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		want := []byte(strings.Repeat("some bytes that are not zeros...", 32<<10))
		if err := os.WriteFile(from, want, 0o600); err != nil {
			t.Fatal(err)
		}
		qemu.Run(t, "nbdcopy", "--flush", from, uri)
		qemu.Run(t, "nbdcopy", uri, to)
		if got, err := os.ReadFile(to); err != nil || string(got) != string(want) {
			t.Errorf("%d bytes came back: %v", len(got), err)
		}
	})
	t.Run("qemu-io", func(t *testing.T) {
		got := qemu.Run(t, "qemu-io", "--object", "tls-creds-x509,id=a,endpoint=client,dir="+client,
			"-c", "write -P 5 64k 256k", "-c", "flush", "-c", "read -P 5 64k 256k", "-c", "write -z 0 64k", "-c", "read -P 0 0 64k",
			"--image-opts", "driver=nbd,server.type=unix,server.path="+socket+",tls-creds=a,tls-hostname=localhost")
		if strings.Contains(got, "fail") || strings.Contains(got, "rror") {
			t.Error(got)
		}
	})
}

func pemOf(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Our -L speaks to QEMU's server, and the name that we give a certificate is
// the one that it has for it.
func TestIdentitySameAsQEMUNBD(t *testing.T) {
	if realQEMUNBD == "" {
		qemu.Require(t, "the real qemu-nbd")
	}
	_, server, client := certificates(t)
	certs, err := readCertificates(filepath.Join(client, "client-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	name, err := distinguishedName(certs[0])
	if err != nil {
		t.Fatal(err)
	}
	for identity, code := range map[string]int{name: 0, name + "x": 1} {
		dir := t.TempDir()
		socket, disk := filepath.Join(dir, "s"), filepath.Join(dir, "disk")
		if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		escaped := strings.ReplaceAll(identity, ",", ",,")
		qemu.Start(t, realQEMUNBD, "-t", "-f", "raw", "-k", socket, "--pid-file", filepath.Join(dir, "pid"), "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server,
			"--object", "authz-simple,id=z,identity="+escaped, "--tls-creds=a", "--tls-authz=z", disk)
		for end := time.Now().Add(deadline); ; time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(filepath.Join(dir, "pid")); err == nil {
				break
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		args := []string{"-L", "--object", "tls-creds-x509,id=a,dir=" + client, "--tls-creds=a"}
		if o := ours(append([]string{"imgnbd", "-k", socket}, args...)...); o.Code != code {
			t.Errorf("%s: qemu-nbd: %+v", identity, o)
		}
		// And so it is with ours.
		socket = startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server,
			"--object", "authz-simple,id=z,identity="+escaped, "--tls-creds=a", "--tls-authz=z")
		if o := ours(append([]string{"imgnbd", "-k", socket}, args...)...); o.Code != code {
			t.Errorf("%s: %+v", identity, o)
		}
	}
}

// -L without credentials says what is missing, in qemu-nbd's words.
func TestListRequiresTLS(t *testing.T) {
	_, server, _ := certificates(t)
	socket := startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server, "--tls-creds=a")
	compareOutcome(t, []string{"qemu-nbd", "-L", "-k", socket})
}

func TestTLSDirect(t *testing.T) {
	_, server, client := certificates(t)
	socket := startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server, "--tls-creds=a", "--tls-mode=direct")
	args := []string{"imgnbd", "-L", "-k", socket, "--object", "tls-creds-x509,id=a,dir=" + client, "--tls-creds=a"}
	if o := ours(append(args, "--tls-mode=direct")...); o.Code != 0 {
		t.Errorf("%+v", o)
	}
	for _, a := range [][]string{args[:4], {"imgnbd", "-L", "-k", socket, "--tls-mode=direct"}} {
		if o := ours(a...); o.Code != 1 {
			t.Errorf("%q: %+v", a, o)
		}
	}
}

func TestRevocation(t *testing.T) {
	ca := pki.New(t)
	good, bad := ca.Client(nil, pkix.Name{CommonName: "good"}), ca.Client(nil, pkix.Name{CommonName: "bad"})
	for name, test := range map[string]struct {
		next              time.Time
		goodCode, badCode int
	}{
		"current":     {time.Now().Add(time.Hour), 0, 1},
		"out of date": {time.Now().Add(-time.Hour), 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			server := ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost")})
			ca.Write(filepath.Join(server, "ca-crl.pem"), "X509 CRL", ca.CRL(test.next, bad.Leaf))
			socket := startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server, "--tls-creds=a")
			for cert, code := range map[*tls.Certificate]int{&good: test.goodCode, &bad: test.badCode} {
				client := ca.Dir(map[string]tls.Certificate{"client": *cert})
				o := ours("imgnbd", "-L", "-k", socket, "--object", "tls-creds-x509,id=a,dir="+client, "--tls-creds=a")
				if o.Code != code {
					t.Errorf("%s: %+v", cert.Leaf.Subject, o)
				}
			}
		})
	}
}

func TestAuthz(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	write := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"rules": [{"match": "CN=a*", "policy": "allow", "format": "glob"}], "policy": "deny"}`)
	made := objects{}
	for _, s := range []string{
		"authz-simple,id=simple,identity=CN=a,,O=b",
		"authz-list,id=list,rules.0.match=CN=x,rules.0.policy=deny,rules.1.match=CN=?*,rules.1.policy=allow,rules.1.format=glob",
		`{"qom-type":"authz-list","id":"json","policy":"allow","rules":[{"match":"CN=x","policy":"deny"}]}`,
		"authz-list-file,id=file,filename=" + file,
		"authz-list-file,id=once,refresh=off,filename=" + file,
	} {
		if err := made.add(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	check := func(id, name string, want bool) {
		t.Helper()
		if got, err := made[id].(authz).allows(name); got != want || err != nil {
			t.Errorf("%s, %s: %v, %v", id, name, got, err)
		}
	}
	check("simple", "CN=a,O=b", true)
	check("simple", "CN=a,O=bc", false)
	check("list", "CN=x", false)
	check("list", "CN=y", true)
	check("list", "CN=", false)
	check("list", "O=y", false)
	check("json", "CN=x", false)
	check("json", "CN=y", true)
	check("file", "CN=abc", true)
	check("file", "CN=b", false)
	write(`{"rules": [{"match": "CN=b", "policy": "allow"}]}`)
	check("file", "CN=abc", false)
	check("file", "CN=b", true)
	check("once", "CN=abc", true)
	write(`{"rules": [`)
	if ok, err := made["file"].(authz).allows("CN=b"); ok || err == nil {
		t.Errorf("a file that is broken: %v, %v", ok, err)
	}
}

func TestAccess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "allow")
	tcp := func(ip string) *export.Client {
		return &export.Client{Addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 7}}
	}
	unix := func(uid, gid uint32) *export.Client {
		return &export.Client{Addr: &net.UnixAddr{}, Cred: &export.Credentials{UID: uid, GID: gid}}
	}
	unknown := &export.Client{Addr: &net.UnixAddr{}}
	for _, test := range []struct {
		allow, deny, file string
		in, out           []*export.Client
	}{
		{"", "", "", []*export.Client{tcp("192.0.2.1"), unix(0, 0), unknown, {}}, nil},
		{"192.0.2.0/24,2001:db8::/32", "192.0.2.66", "", []*export.Client{tcp("192.0.2.1"), tcp("::ffff:192.0.2.1"), tcp("2001:db8::1")},
			[]*export.Client{tcp("192.0.2.66"), tcp("::ffff:192.0.2.66"), tcp("192.0.3.1"), tcp("::1"), unix(0, 0), {}}},
		{"::ffff:192.0.2.1", "", "", []*export.Client{tcp("192.0.2.1")}, []*export.Client{tcp("192.0.2.2")}},
		{"uid:7,gid:8", "uid:9", "", []*export.Client{unix(7, 0), unix(0, 8)}, []*export.Client{unix(9, 8), unix(8, 7), unknown, tcp("127.0.0.1")}},
		{"unix", "", "", []*export.Client{unix(1, 1), unknown}, []*export.Client{tcp("127.0.0.1"), {}}},
		{"any", "uid:root", "", []*export.Client{tcp("127.0.0.1"), unix(1, 0)}, []*export.Client{unix(0, 1)}},
		{"", "", "# ours\n 192.0.2.0/24 # all\n\n198.51.100.7\n", []*export.Client{tcp("192.0.2.1"), tcp("198.51.100.7")}, []*export.Client{tcp("203.0.113.1"), unix(0, 0)}},
		{"", "", "", nil, nil},
		{"203.0.113.1", "", "198.51.100.7\n", []*export.Client{tcp("203.0.113.1"), tcp("198.51.100.7")}, []*export.Client{tcp("192.0.2.1")}},
		{"", "", "\n", nil, []*export.Client{tcp("203.0.113.1")}},
	} {
		o := newServeOptions()
		var args []string
		if test.allow != "" {
			args = append(args, "--allow", test.allow)
		}
		if test.deny != "" {
			args = append(args, "--deny", test.deny)
		}
		if test.file != "" {
			if err := os.WriteFile(file, []byte(test.file), 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, "--allow-file", file)
		}
		if _, err := scan(o.flags, args); err != nil {
			t.Fatal(err)
		}
		for _, c := range test.in {
			if err := o.access.check(c); err != nil {
				t.Errorf("%q: %v %+v: %v", args, c.Addr, c.Cred, err)
			}
		}
		for _, c := range test.out {
			if o.access.check(c) == nil {
				t.Errorf("%q: %v %+v is let in", args, c.Addr, c.Cred)
			}
		}
	}
	for _, s := range []string{"", "nonsense", "192.0.2.0/33", "uid:", "uid:no-such-user", "gid:-1", "uid:4294967296", "fe80::1%lo", "::ffff:192.0.2.0/120"} {
		if addAccess(new([]accessRule), s) == nil {
			t.Errorf("%q is a rule", s)
		}
	}
	l := &accessList{}
	if err := os.WriteFile(file, []byte("192.0.2.1\n"), 0o600); err != nil || l.setFile(file) != nil {
		t.Fatal(err)
	}
	os.Remove(file)
	if l.check(tcp("192.0.2.1")) == nil {
		t.Error("a file that is gone lets somebody in")
	}
}

// Others may connect to a Unix socket only if that is asked for.
func TestSocketMode(t *testing.T) {
	for arg, want := range map[string]os.FileMode{"": 0o770, "--socket-mode=666": 0o666, "--socket-mode=600": 0o600} {
		o := newServeOptions()
		path := filepath.Join(t.TempDir(), "s")
		args := []string{"-k", path}
		if arg != "" {
			args = append(args, arg)
		}
		if _, err := scan(o.flags, args); err != nil {
			t.Fatal(err)
		}
		p, err := func() (*place, error) {
			defer syscall.Umask(syscall.Umask(0))
			return o.listen(t.Context())
		}()
		if err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%q: %v, %v", arg, fi.Mode(), err)
		}
		p.close()
	}
}

// What would let in everybody, or nobody, is a mistake.
func TestAuthzOptions(t *testing.T) {
	_, server, _ := certificates(t)
	creds := "tls-creds-x509,id=a,endpoint=server,dir=" + server
	simple := []string{"--object", "authz-simple,id=z,identity=x", "--tls-creds=a"}
	for want, args := range map[string][]string{
		"there is no object with id 'y'":         {"--object", creds, "--tls-authz=y"},
		"object with id 'a' is no authorization": {"--object", creds, "--tls-authz=a"},
		"would not be known":                     {"--object", creds + ",verify-peer=off", "--tls-authz=z"},
		"with --tls-mode=allow":                  {"--object", creds, "--tls-authz=z", "--tls-mode=allow"},
		"--tls-mode is require, allow or direct": {"--object", creds, "--tls-mode=off"},
	} {
		o := ours(append(append([]string{"imgnbd", "disk"}, simple...), args...)...)
		if o.Code != 1 || !strings.Contains(o.Stderr, want) {
			t.Errorf("%q: %+v", args, o)
		}
	}
	if o := ours("imgnbd", "--tls-mode=require", "disk"); o.Code != 1 || !strings.Contains(o.Stderr, "without --tls-creds") {
		t.Errorf("%+v", o)
	}
}
