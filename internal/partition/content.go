package partition

import (
	"encoding/binary"
	"io"
)

// A Content is what a disk or partition holds, as far as its first bytes tell.
type Content struct {
	Name       string // as blkid calls it; "" if it is not recognised
	FileSystem bool   // it can be mounted
}

// contentSize is how much of a partition is looked at, in bytes.
const contentSize = 65536 + 4096

// Identify tells what n bytes at off of r hold. They are within r.
func Identify(r io.ReaderAt, off, n int64) (Content, error) {
	b := make([]byte, min(n, contentSize))
	d := &disk{r, off + n}
	if err := d.read(b, off); err != nil {
		return Content{}, err
	}
	return identify(b), nil
}

// A magic is what is always found in one place.
type magic struct {
	Content
	off  int
	text string
}

// What holds something else comes first: members of it may have old magic
// elsewhere.
var magics = []magic{
	{Content{"crypto_LUKS", false}, 0, "LUKS\xba\xbe"},
	{Content{"BitLocker", false}, 3, "-FVE-FS-"},
	{Content{"LVM2_member", false}, 512 + 24, "LVM2 001"},
	{Content{"linux_raid_member", false}, 0, "\xfc\x4e\x2b\xa9"},
	{Content{"linux_raid_member", false}, 4096, "\xfc\x4e\x2b\xa9"},
	{Content{"bcache", false}, 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{Content{"swap", false}, 4086, "SWAPSPACE2"},
	{Content{"xfs", true}, 0, "XFSB"},
	{Content{"squashfs", true}, 0, "hsqs"},
	{Content{"ntfs", true}, 3, "NTFS    "},
	{Content{"exfat", true}, 3, "EXFAT   "},
	{Content{"erofs", true}, 1024, "\xe2\xe1\xf5\xe0"},
	{Content{"f2fs", true}, 1024, "\x10\x20\xf5\xf2"},
	{Content{"hfsplus", true}, 1024, "H+"},
	{Content{"hfsplus", true}, 1024, "HX"},
	{Content{"nilfs2", true}, 1024 + 6, "\x34\x34"},
	{Content{"jfs", true}, 32768, "JFS1"},
	{Content{"iso9660", true}, 32769, "CD001"},
	{Content{"udf", true}, 32769, "BEA01"},
	{Content{"reiserfs", true}, 65536 + 52, "ReIsEr"},
	{Content{"btrfs", true}, 65536 + 64, "_BHRfS_M"},
}

func identify(b []byte) Content {
	for _, m := range magics {
		if len(b) >= m.off+len(m.text) && string(b[m.off:][:len(m.text)]) == m.text {
			return m.Content
		}
	}
	if c, ok := identifyExt(b); ok {
		return c
	}
	if isFAT(b) {
		return Content{"vfat", true}
	}
	return Content{}
}

// identifyExt tells ext2, 3 and 4 apart by the features that they may have.
func identifyExt(b []byte) (Content, bool) {
	const super = 1024
	if len(b) < super+1024 || b[super+56] != 0x53 || b[super+57] != 0xef {
		return Content{}, false
	}
	compat := binary.LittleEndian.Uint32(b[super+92:])
	incompat := binary.LittleEndian.Uint32(b[super+96:])
	roCompat := binary.LittleEndian.Uint32(b[super+100:])
	switch {
	case incompat&0x8 != 0:
		return Content{"jbd", false}, true // the journal of another one
	case incompat&^0x16 != 0 || roCompat&^0x7 != 0:
		return Content{"ext4", true}, true
	case compat&0x4 != 0:
		return Content{"ext3", true}, true
	}
	return Content{"ext2", true}, true
}

// isFAT reports whether b begins with the boot sector of a FAT file system.
func isFAT(b []byte) bool {
	if len(b) < sector || b[mbrSignature] != 0x55 || b[mbrSignature+1] != 0xaa ||
		b[0] != 0xeb && b[0] != 0xe9 {
		return false
	}
	power := func(n int) bool { return n > 0 && n&(n-1) == 0 }
	bytes, perCluster := int(binary.LittleEndian.Uint16(b[11:])), int(b[13])
	reserved, fats, media := binary.LittleEndian.Uint16(b[14:]), b[16], b[21]
	return power(bytes) && bytes >= 512 && bytes <= 4096 && power(perCluster) &&
		reserved > 0 && (fats == 1 || fats == 2) && (media == 0xf0 || media >= 0xf8)
}

// isBootSector reports whether a sector that has the signature of an MBR
// begins a file system.
func isBootSector(b []byte) bool {
	return isFAT(b) || string(b[3:11]) == "NTFS    " || string(b[3:11]) == "EXFAT   "
}
