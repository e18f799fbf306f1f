// Package asif reads Apple sparse images (ASIF), the disk image format of
// macOS 26. It never writes them.
//
// Apple has not published the format; what is known was found by others by
// looking at images (github.com/huven/asif-format). Integers are big-endian.
//
// The file consists of chunks, 1 MiB in all images that were seen. Chunk 0
// holds a header and two directories, of which the one with the higher sequence
// number is valid. A directory names the chunks that hold tables; a table is a
// run of groups; a group has one entry for each of N data chunks, and one for
// a chunk with a bitmap of two bits for each of their sectors:
//
//	N = 4 * sector size
//	group size = 8 * (N + 1) bytes
//	groups in a table = chunk size / group size
//
// An entry of a data chunk has its number in the low 55 bits, and in the two
// highest whether nothing of it was written (0), all (1) or, by the bitmap, a
// part (3). What was not written reads as zeros. Everything whose meaning is
// not known is an error rather than a guess.
//
// go-qcow2reader, which also knows this format, reads no more of it than the
// size of the disk.
package asif
