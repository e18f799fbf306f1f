// Package nbd is the wire: the numbers of the NBD protocol, the encoding of
// its messages, and the client's side of it. It imports nothing of this
// module.
//
// The names are those of the specification (doc/proto.md of the NBD project,
// the branch extension-ext-header included), less the prefix NBD_.
package nbd

import "fmt"

// DefaultPort is the TCP port that IANA assigned to NBD.
const DefaultPort = 10809

// Magic numbers.
const (
	Magic                = 0x4e42444d41474943 // NBDMAGIC, INIT_PASSWD
	MagicOption          = 0x49484156454F5054 // IHAVEOPT
	MagicOldstyle        = 0x00420281861253
	MagicOptionReply     = 0x0003e889045565a9
	MagicRequest         = 0x25609513
	MagicSimpleReply     = 0x67446698
	MagicStructuredReply = 0x668e33ef
	MagicExtRequest      = 0x21e41c71
	MagicExtReply        = 0x6e8a278c
)

// Handshake flags: the server's and the client's have the same values.
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// An Option is what a client asks for during the handshake.
type Option uint32

const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptPeekExport      Option = 4
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11
)

var optionNames = map[Option]string{
	OptExportName: "export name", OptAbort: "abort", OptList: "list", OptPeekExport: "peek export",
	OptStartTLS: "starttls", OptInfo: "info", OptGo: "go", OptStructuredReply: "structured reply",
	OptListMetaContext: "list meta context", OptSetMetaContext: "set meta context",
	OptExtendedHeaders: "extended headers",
}

func (o Option) String() string {
	if s, ok := optionNames[o]; ok {
		return s
	}
	return fmt.Sprintf("option %d", uint32(o))
}

// An OptionReply is the type of a server's answer to an Option.
type OptionReply uint32

const (
	RepAck         OptionReply = 1
	RepServer      OptionReply = 2
	RepInfo        OptionReply = 3
	RepMetaContext OptionReply = 4

	repError                        = 1 << 31
	RepErrUnsup         OptionReply = repError + 1
	RepErrPolicy        OptionReply = repError + 2
	RepErrInvalid       OptionReply = repError + 3
	RepErrPlatform      OptionReply = repError + 4
	RepErrTLSReqd       OptionReply = repError + 5
	RepErrUnknown       OptionReply = repError + 6
	RepErrShutdown      OptionReply = repError + 7
	RepErrBlockSizeReqd OptionReply = repError + 8
	RepErrTooBig        OptionReply = repError + 9
	RepErrExtHeaderReqd OptionReply = repError + 10
)

// IsError reports whether the reply refuses the option.
func (r OptionReply) IsError() bool { return r&repError != 0 }

// Information types of OptInfo and OptGo.
const (
	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3
)

// TransmissionFlags say what an export can do.
type TransmissionFlags uint16

const (
	FlagHasFlags           TransmissionFlags = 1 << 0
	FlagReadOnly           TransmissionFlags = 1 << 1
	FlagSendFlush          TransmissionFlags = 1 << 2
	FlagSendFUA            TransmissionFlags = 1 << 3
	FlagRotational         TransmissionFlags = 1 << 4
	FlagSendTrim           TransmissionFlags = 1 << 5
	FlagSendWriteZeroes    TransmissionFlags = 1 << 6
	FlagSendDF             TransmissionFlags = 1 << 7
	FlagCanMultiConn       TransmissionFlags = 1 << 8
	FlagSendResize         TransmissionFlags = 1 << 9
	FlagSendCache          TransmissionFlags = 1 << 10
	FlagSendFastZero       TransmissionFlags = 1 << 11
	FlagBlockStatusPayload TransmissionFlags = 1 << 12
)

// A Command is the type of a request.
type Command uint16

const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
	CmdResize      Command = 8
)

var commandNames = [...]string{"read", "write", "disc", "flush", "trim", "cache", "write zeroes", "block status", "resize"}

func (c Command) String() string {
	if int(c) < len(commandNames) {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// CommandFlags modify a request.
type CommandFlags uint16

const (
	CmdFlagFUA        CommandFlags = 1 << 0
	CmdFlagNoHole     CommandFlags = 1 << 1
	CmdFlagDF         CommandFlags = 1 << 2
	CmdFlagReqOne     CommandFlags = 1 << 3
	CmdFlagFastZero   CommandFlags = 1 << 4
	CmdFlagPayloadLen CommandFlags = 1 << 5
)

// Flags and types of a chunk of a structured or extended reply.
const (
	ReplyFlagDone = 1 << 0

	ReplyNone           = 0
	ReplyOffsetData     = 1
	ReplyOffsetHole     = 2
	ReplyBlockStatus    = 5
	ReplyBlockStatusExt = 6
	ReplyError          = 1<<15 + 1
	ReplyErrorOffset    = 1<<15 + 2
)

// An Errno is an error on the wire.
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// States of the context base:allocation and of qemu:dirty-bitmap contexts.
const (
	ContextBaseAllocation = "base:allocation"
	StateHole             = 1 << 0
	StateZero             = 1 << 1

	ContextAllocationDepth = "qemu:allocation-depth"
	ContextDirtyBitmap     = "qemu:dirty-bitmap:" // followed by the bitmap's name
	StateDirty             = 1 << 0
)

// Sizes and limits in bytes.
const (
	MaxString           = 4096 // names, descriptions, error texts
	MaxPayload          = 32 << 20
	RequestSize         = 28
	ExtRequestSize      = 32
	SimpleReplySize     = 16
	StructuredReplySize = 20
	ExtReplySize        = 32
)
