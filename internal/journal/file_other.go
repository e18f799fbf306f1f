//go:build !linux

package journal

import (
	"errors"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Open implements [image.Journals]: there is no memory that would outlive the
// process.
func (j *Files) Open(storage.Info) (image.Journal, error) {
	err := errors.New("journals need Linux")
	switch {
	case j.Off:
		return nil, nil
	case j.Without == nil:
		return nil, err
	}
	return nil, j.Without(err)
}

// Left implements [image.Journals].
func (j *Files) Left(storage.Info) string { return "" }

// Remove implements [image.Journals].
func (j *Files) Remove(storage.Info) error { return nil }
