package image_test

import (
	"context"
	"errors"
	"log"
	"net"

	"github.com/imgnbd/imgnbd/export"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/qcow2"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// Serving an overlay and what lies below it, as long as all of it is in the
// same directory.
func ExampleChain() {
	chain := image.Chain{
		Formats:   []image.Format{qcow2.Format(), raw.Format()},
		Protocols: []storage.Protocol{file.Protocol()},
		Policy:    image.Policy{Allow: image.AllowSameDir},
	}
	disk, err := chain.Open(context.Background(), "overlay.qcow2", image.OpenOptions{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	exp := &export.Export{Device: disk}
	server := export.Server{
		Open: func(context.Context, *export.Client, string) (*export.Export, error) { return exp, nil },
	}
	l, err := net.Listen("tcp", "localhost:10809")
	if err != nil {
		log.Fatal(err)
	}
	if err := server.Serve(l); !errors.Is(err, export.ErrServerClosed) {
		log.Fatal(err)
	}
}
