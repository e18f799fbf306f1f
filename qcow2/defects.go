package qcow2

// hooks are what tests of the package reach into an image by.
type hooks struct {
	defects defects
	stored  func(off int, b []byte) // told what changes in the journal's memory
}

// defects are rules switched off, one at a time, by the test that shows that
// the crash simulator notices. The zero value, which every image has outside
// of that test, keeps them all.
type defects struct {
	linkEarly        bool // R1: the entry before the data
	noFill           bool // R1: new clusters are not filled
	noSyncA          bool // R2: no barrier before pointers
	countsLate       bool // R2: counts with the pointers
	l1Early          bool // R2: an L1 entry with its table
	refTableEarly    bool // R2: a refcount table entry with its block
	noSyncB          bool // R3: a flush is acknowledged before its last barrier
	entriesOfNow     bool // R4: today's entries instead of those of the cut
	lowerEarly       bool // R5: counts fall in the batch that removes the pointer
	reuseAtOnce      bool // R6: no quarantine
	noGrace          bool // R6: requests in progress are not waited for
	alwaysFresh      bool // R7: every new cluster counts as never written
	noClaims         bool // R8
	growZeroes       bool // R9: zeroing a part of a cluster that reads as zero zeroes all of it
	tablesAnew       bool // R10: a table is new until a batch succeeds
	noRetrySync      bool // R11: no additional barrier after a failed batch
	noJournal        bool // R12
	listLate         bool // R12: the dirty list after the journal
	journalLate      bool // R12: the journal after the entry
	journalEarly     bool // R13: records are dropped at the cut
	replayLowers     bool // R14: replay lowers counts without quarantine
	forgetFailedSync bool // R15
	noSyncMark       bool // R16: a change before bitmaps are marked durably
	noSyncBits       bool // R16: a bitmap's place before its bits
	noSyncDirectory  bool // R16: the mark is taken off before a bitmap's place is durable
}
