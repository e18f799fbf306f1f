package program

import (
	"crypto/tls"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/pki"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// freePort returns a port that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// The program as one would run it for strangers, confined, as another user and
// with a list of who may come in, has others' clients over TLS.
func TestTLS(t *testing.T) {
	if os.Getuid() != 0 {
		qemu.Missing(t, "root, who can become another user,")
	}
	qemu.Require(t, "nbdinfo", "nbdcopy", "qemu-img", "nbd-client", "openssl")
	bin := release(t)
	ca := pki.New(t)
	server := ca.Dir(map[string]tls.Certificate{"server": ca.Server(nil, "localhost")})
	client := ca.Dir(map[string]tls.Certificate{"client": ca.Client(nil, pkix.Name{CommonName: "alice"})})
	dir, err := os.MkdirTemp("", "tls") // t.TempDir lets in this user alone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	list, plain, disk := filepath.Join(dir, "list"), filepath.Join(dir, "plain"), filepath.Join(dir, "disk.qcow2")
	allow := func(match string) {
		text := fmt.Sprintf(`{"rules": [{"match": %q, "policy": "allow", "format": "glob"}]}`, match)
		if err := os.WriteFile(list, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	allow("CN=ali*")
	if err := os.WriteFile(plain, compressible(4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu.Img(t, "convert", "-f", "raw", "-O", "qcow2", plain, disk)

	begin := func(more ...string) (port string, p *patient) {
		port = freePort(t)
		p = &patient{t: t, bin: bin, socket: filepath.Join(dir, "s"), args: append([]string{"--untrusted", "--user=65534:65534", "-f", "qcow2",
			"--object", "tls-creds-x509,id=t,endpoint=server,dir=" + server, "--tls-creds=t"}, more...)}
		p.start("--bind=127.0.0.1", "--port="+port)
		t.Cleanup(func() { p.cmd.Process.Kill() })
		eventually(t, "no server", func() bool {
			c, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		return port, p
	}
	port, p := begin("--object", "authz-list-file,id=who,filename="+list, "--tls-authz=who", disk)
	uri := "nbds://localhost:" + port + "/?tls-certificates=" + client
	creds := "tls-creds-x509,id=t,endpoint=client,dir=" + client
	opts := "driver=nbd,server.type=inet,server.host=localhost,server.port=" + port + ",tls-creds=t"
	lists := []string{"-l", "localhost", "-p", port, "-x", "-cacertfile", client + "/ca-cert.pem", "-certfile", client + "/client-cert.pem", "-keyfile", client + "/client-key.pem"}

	if out := qemu.Run(t, "nbdinfo", uri); !strings.Contains(out, "with TLS") {
		t.Error(out)
	}
	copied := filepath.Join(dir, "copied")
	qemu.Run(t, "nbdcopy", uri, copied)
	qemu.Compare(t, "raw", plain, "raw", copied)
	qemu.Run(t, "qemu-img", "compare", "--object", creds, "--image-opts", "driver=raw,file.filename="+plain, opts)
	if r := qemu.Try(t, "nbd-client", lists...); r.Code != 0 {
		t.Errorf("nbd-client: %+v", r)
	}
	// Nothing is told in the clear, and nobody is let in whom the list has not.
	for what, r := range map[string]qemu.Result{
		"in the clear": qemu.Try(t, "nbdinfo", "nbd://localhost:"+port),
		"listed":       qemu.Try(t, "nbdinfo", "--list", "nbd://localhost:"+port),
	} {
		if r.Code == 0 || strings.Contains(r.Stdout, "export") {
			t.Errorf("%s: %+v", what, r)
		}
	}
	allow("CN=bob")
	for what, r := range map[string]qemu.Result{
		"nbdinfo":    qemu.Try(t, "nbdinfo", uri),
		"qemu-img":   qemu.Try(t, "qemu-img", "info", "--object", creds, "--image-opts", opts),
		"nbd-client": qemu.Try(t, "nbd-client", lists...),
	} {
		if r.Code == 0 {
			t.Errorf("%s, who is not on the list: %+v", what, r)
		}
	}
	allow("CN=alice")
	qemu.Run(t, "nbdinfo", "--size", uri)
	p.end()
	qemu.Check(t, disk)

	// TLS from the first byte, as any client of TLS speaks it.
	port, p = begin("--tls-mode=direct", disk)
	hello := exec.Command("openssl", "s_client", "-quiet", "-connect", "localhost:"+port, "-verify_return_error",
		"-CAfile", client+"/ca-cert.pem", "-cert", client+"/client-cert.pem", "-key", client+"/client-key.pem")
	out, err := hello.StdoutPipe()
	if err == nil {
		err = hello.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	greeting := make([]byte, 16)
	if _, err := io.ReadFull(out, greeting); err != nil || string(greeting) != "NBDMAGICIHAVEOPT" {
		t.Errorf("the greeting is %q, %v", greeting, err)
	}
	hello.Process.Kill()
	hello.Wait()
	p.end()
}
