package sandbox

import "golang.org/x/sys/unix"

const arch = unix.AUDIT_ARCH_AARCH64

// neverHere are calls that this architecture has besides.
var neverHere = []uint32{unix.SYS_KEXEC_FILE_LOAD}

// It has no old forms.
var removingHere, opening []uint32
