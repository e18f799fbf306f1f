package main

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/nbd"
)

// askRemote dials as for a device, and lists.
func askRemote(r *remote) error {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	conn, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = nbd.List(ctx, conn)
	return err
}

// A server's export is reached over TLS as the URI, the options of the command
// line, or nbd-client's say, and not otherwise.
func TestRemoteTLS(t *testing.T) {
	_, server, client := certificates(t)
	socket := startTLS(t, "--object", "tls-creds-x509,id=a,endpoint=server,dir="+server, "--tls-creds=a")
	const unknown = "certificate signed by unknown authority"
	object := []string{"--object", "tls-creds-x509,id=b,endpoint=client,dir=" + client, "--tls-creds=b"}
	for _, test := range []struct {
		uri  string // of the socket
		args []string
		want string
	}{
		{uri: "nbds+unix:///?tls-certificates=" + client + "&socket="},
		{uri: "nbds+unix:///?socket=", args: object},
		{uri: "nbd+unix:///?socket=", args: object},
		{uri: "nbd+unix:///?socket=", args: append(object, "--tls-hostname=elsewhere"), want: "not elsewhere"},
		{uri: "nbds+unix:///?tls-hostname=elsewhere&tls-certificates=" + client + "&socket=", want: "not elsewhere"},
		{uri: "nbds+unix:///?socket=", want: unknown},
		{uri: "nbds+unix:///?tls-verify-peer=off&socket=", want: "certificate required"},
		{uri: "nbd+unix:///?socket=", want: "the server requires TLS"},
	} {
		o := newServeOptions()
		if _, err := scan(o.flags, test.args); err != nil {
			t.Fatal(err)
		}
		if err := o.tls.check(o.objects, true); err != nil {
			t.Fatal(err)
		}
		uri, err := nbd.ParseURI(test.uri + socket)
		if err != nil {
			t.Fatal(err)
		}
		r := &remote{uri: *uri}
		if err := o.secureRemote(r); err != nil {
			t.Errorf("%s %q: %v", test.uri, test.args, err)
			continue
		}
		if err := askRemote(r); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s %q: %v, want %q", test.uri, test.args, err, test.want)
		}
	}
	in := func(name string) string { return filepath.Join(client, name) }
	for _, test := range []struct {
		options       clientOptions
		want, warning string
	}{
		{options: clientOptions{ca: in("ca-cert.pem"), cert: in("client-cert.pem"), key: in("client-key.pem"), tlsHost: "localhost"}},
		{options: clientOptions{ca: in("ca-cert.pem"), cert: in("client-cert.pem"), key: in("client-key.pem"), tlsHost: "elsewhere"}, want: "not elsewhere"},
		{options: clientOptions{ca: in("ca-cert.pem"), tlsHost: "localhost"}, want: "certificate required"},
		{options: clientOptions{cert: in("client-cert.pem"), key: in("client-key.pem")}, warning: "anybody could be the server"},
		{options: clientOptions{}, want: "the server requires TLS"},
	} {
		var messages bytes.Buffer
		test.options.unix, test.options.host = true, socket
		r, err := test.options.remote(newUI("nbd-client", nil, nil, &messages), newServeOptions())
		if err != nil {
			t.Fatal(err)
		}
		if err := askRemote(r); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %q", test.options, err, test.want)
		}
		if !strings.Contains(messages.String(), test.warning) || test.warning == "" && messages.Len() > 0 {
			t.Errorf("%+v: %q", test.options, &messages)
		}
	}
}
