package qcow2

import (
	"context"
	"fmt"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// openDataFile opens the external data file of an image that has one, by the
// name that the user gave or else that the image has. An image without one
// has its data in s.
func openDataFile(ctx context.Context, h *header, s storage.Store, opt *image.Options, o *Options) (storage.Store, error) {
	if h.incompatible&incompatDataFile == 0 {
		if o.DataFile != "" {
			return nil, fmt.Errorf("'data-file' can only be set for images with an external data file")
		}
		return s, nil
	}
	ref := image.Reference{Name: o.DataFile}
	if ref.Name == "" {
		ref.Name, ref.From = h.dataFileName(), s
	}
	switch {
	case ref.Name == "":
		return nil, corrupt("'data-file' is required for this image")
	case opt.Refs == nil:
		return nil, fmt.Errorf("data file %q: %w", ref.Name, image.ErrReference)
	}
	data, err := opt.Refs.OpenStore(ctx, ref, !opt.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("data file %q: %w", ref.Name, err)
	}
	return data, nil
}
