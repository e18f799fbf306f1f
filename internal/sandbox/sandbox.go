// Package sandbox takes from a process what it has no more use for, so that
// whoever takes the process over finds little that could be done with it.
//
// What is taken is taken for good, from all threads: there is no way back, and
// no way to try it twice. Files, sockets and mappings that are open stay as
// they are; it is about what could be opened, started and changed from then on.
package sandbox

// A Policy says what the process still does. The zero Policy serves what is
// open: it opens, makes, renames and removes no file.
type Policy struct {
	// Read are files that are opened again and again, for reading. They may be
	// replaced, also by means of symbolic links that stay in the directories
	// that the path leads through now.
	Read []string

	// RemoveIn are directories in which, or below which, something will be
	// removed.
	RemoveIn []string

	// Signal says that the process sends signals to its children.
	Signal bool
}

// A Result says how far [Enter] has come. What is nil holds.
type Result struct {
	// Calls is why system calls are not filtered: then nothing holds.
	Calls error

	// Files is why paths are not confined to those of the Policy. Without
	// that, a Policy with Read lets every file be read, and one with RemoveIn
	// every file be removed, as far as the user may; the rest is forbidden by
	// the filter of system calls all the same.
	Files error
}

// A User is who a process may become.
type User struct {
	Name     string // as it was asked for
	UID, GID int
	Groups   []int // besides GID
}
