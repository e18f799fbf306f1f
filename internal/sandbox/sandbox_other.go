//go:build !linux || !(amd64 || arm64)

package sandbox

import "errors"

// Enter does nothing on this system, and says so.
func Enter(Policy) Result { return Result{errors.ErrUnsupported, errors.ErrUnsupported} }
