//go:build !linux

package export

import (
	"errors"
	"os"
)

const canSendFile = false

func sendFile(int, int, int64, int) (int, error) { return 0, errors.ErrUnsupported }

func forceSendBuffer(int, int) error { return errors.ErrUnsupported }

func resident(*os.File, int64, int64, bool) bool { return false }
