// Package drivers is the list of what this build can open: the one place that
// imports formats and back ends. Adding one is adding its line here.
package drivers

import (
	"github.com/imgnbd/imgnbd/asif"
	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/qcow2"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// Formats returns the formats, in the order in which they are recognised. raw,
// which is never recognised, is what remains.
func Formats() []image.Format {
	return append([]image.Format{
		qcow2.Format(),
		asif.Format(),
		raw.Format(),
	}, foreign()...)
}

// Protocols returns the back ends.
func Protocols() []storage.Protocol {
	return []storage.Protocol{
		file.Protocol(),
	}
}
