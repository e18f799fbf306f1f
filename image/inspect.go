package image

// An Inspection is what `info` shows of an image: what its header says, and
// nothing that would have to be opened.
type Inspection struct {
	Format        string
	VirtualSize   int64 // bytes
	ClusterSize   int64 // bytes; 0 if the format has none
	Encrypted     bool
	Dirty         bool
	BackingName   string // as written in the image; "" if it has no backing
	BackingFormat string // as declared; "" if it is not
	DataFile      string // as written in the image; "" if it has none
	Snapshots     []Snapshot

	// Specific is encoded as the object "data" of "format-specific" by
	// encoding/json, with qemu-img's names and order; nil if there is nothing.
	Specific any

	// Problem is why Open refuses the image; nil if it does not.
	Problem error
}
