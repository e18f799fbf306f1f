//go:build !unix

package image

import "github.com/imgnbd/imgnbd/storage"

func diskSize(storage.Store) int64 { return -1 }
