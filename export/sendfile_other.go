//go:build !linux

package export

import (
	"errors"
	"math"
	"os"
)

const canSendFile = false

func sendFile(int, int, int64, int) (int, error) { return 0, errors.ErrUnsupported }

func queued(int) int { return math.MaxInt }

func forceSendBuffer(int, int) error { return errors.ErrUnsupported }

func resident(*os.File, int64, int64, bool) bool { return false }
