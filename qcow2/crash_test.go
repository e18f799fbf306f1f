package qcow2

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"reflect"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"unsafe"

	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// simKinds are the images and workloads of the simulator.
var simKinds = []simKind{
	{name: "one writer 512 backing", options: "cluster_size=512", size: 128 << 10, hot: 16 << 10, workers: 1, ops: 120, backing: true, journal: 4096},
	{name: "512 backing", options: "cluster_size=512", size: 128 << 10, hot: 8 << 10, workers: 4, ops: 240, backing: true, journal: 1024, tight: true},
	{name: "4k backing", options: "cluster_size=4k", size: 512 << 10, hot: 64 << 10, workers: 4, ops: 200, backing: true},
	{name: "4k", options: "cluster_size=4k", size: 512 << 10, hot: 64 << 10, workers: 4, ops: 200, journal: 64},
	{name: "512 64 bit counts", options: "cluster_size=512,refcount_bits=64", size: 256 << 10, hot: 128 << 10, workers: 4, ops: 400, journal: 256},
	{name: "512 1 bit counts backing", options: "cluster_size=512,refcount_bits=1", size: 128 << 10, hot: 4 << 10, workers: 6, ops: 300, backing: true, journal: 4096},
	{name: "4k 64 bit counts backing", options: "cluster_size=4k,refcount_bits=64", size: 1 << 20, hot: 32 << 10, workers: 8, ops: 300, backing: true},
	{name: "1k 8 bit counts backing", options: "cluster_size=1k,refcount_bits=8", size: 128 << 10, hot: 16 << 10, workers: 3, ops: 200, backing: true},
	{name: "64k", options: "cluster_size=64k", size: 1 << 20, hot: 512 << 10, workers: 4, ops: 100, journal: 4096},
	{name: "version 2", options: "compat=0.10,cluster_size=1k", size: 128 << 10, hot: 16 << 10, workers: 4, ops: 200},
	{name: "tiny cache", options: "cluster_size=512", size: 2 << 20, hot: 1 << 20, workers: 6, ops: 300, l2cache: "4096", journal: 512, tight: true},
	{name: "tiny cache backing", options: "cluster_size=1k", size: 2 << 20, hot: 2 << 20, workers: 4, ops: 200, l2cache: "8192", backing: true},
	{name: "snapshots", options: "cluster_size=1k", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 200, journal: 1024,
		before: []string{"write -P 1 0 128k", "write -z 32k 16k"}, after: [][]string{{"snapshot", "-c", "one"}, {"snapshot", "-c", "two"}}},
	{name: "snapshots 512 backing", options: "cluster_size=512,refcount_bits=2", size: 256 << 10, hot: 32 << 10, workers: 4, ops: 200, backing: true,
		before: []string{"write -P 1 0 128k", "write -z 32k 16k"}, after: [][]string{{"snapshot", "-c", "one"}}},
	{name: "compressed", options: "cluster_size=1k", size: 128 << 10, hot: 64 << 10, workers: 4, ops: 200, journal: 1024,
		before: []string{"write -c -P 1 0 64k", "write -c -P 3 96k 8k"}},
	{name: "compressed snapshots", options: "cluster_size=4k", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 200,
		before: []string{"write -c -P 1 0 64k", "write -c -P 3 96k 8k"}, after: [][]string{{"snapshot", "-c", "one"}}},
	{name: "growing refcount table", options: "cluster_size=512,refcount_bits=64", size: 3 << 20, hot: 3 << 20, workers: 4, ops: 200, journal: 4096,
		before: []string{"write -P 1 0 1700k"}},
	{name: "growing refcounts", options: "cluster_size=512,refcount_bits=64", size: 1 << 20, hot: 1 << 20, workers: 4, ops: 150, journal: 4096,
		before: []string{"write -P 1 0 14k"}},
	{name: "device", options: "cluster_size=1k", size: 256 << 10, hot: 128 << 10, workers: 4, ops: 200, device: 1 << 20, journal: 512},
	{name: "device backing", options: "cluster_size=512,refcount_bits=64", size: 256 << 10, hot: 128 << 10, workers: 4, ops: 200, device: 1 << 20, backing: true},
	{name: "full device", options: "cluster_size=1k", size: 256 << 10, hot: 128 << 10, workers: 4, ops: 200, device: 128 << 10},
	{name: "subclusters", options: "extended_l2=on,cluster_size=16k", size: 512 << 10, hot: 64 << 10, workers: 4, ops: 200, journal: 2048},
	{name: "subclusters backing", options: "extended_l2=on,cluster_size=16k", size: 512 << 10, hot: 32 << 10, workers: 4, ops: 200, backing: true, journal: 128},
	{name: "subclusters snapshots", options: "extended_l2=on,cluster_size=16k", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 200,
		before: []string{"write -P 1 0 100k", "write -z 32k 20k"}, after: [][]string{{"snapshot", "-c", "one"}}},
	{name: "data file", options: "cluster_size=4k", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 200, backing: true, dataFile: true, journal: 1024},
	{name: "raw data file", options: "cluster_size=4k,data_file_raw=on", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 200, dataFile: true},
	{name: "bitmaps", options: "cluster_size=512", size: 128 << 10, hot: 32 << 10, workers: 2, ops: 16, journal: 1024, bitmaps: []string{"512", "4k"}},
	{name: "bitmaps 64 bit counts backing", options: "cluster_size=512,refcount_bits=64", size: 1 << 20, hot: 1 << 20, workers: 2, ops: 60, backing: true, bitmaps: []string{"512", "64k"}},
	{name: "bitmaps device", options: "cluster_size=4k", size: 256 << 10, hot: 64 << 10, workers: 4, ops: 24, device: 512 << 10, journal: 512, bitmaps: []string{"1k", "512", "2M"}},
	{name: "version 2 backing", options: "compat=0.10,cluster_size=4k", size: 256 << 10, hot: 32 << 10, workers: 4, ops: 200, backing: true},
}

// bitmapKind does little but to mark and store a bitmap.
var bitmapKind = simKind{name: "bitmap", options: "cluster_size=512", size: 64 << 10, hot: 64 << 10, workers: 1, ops: 6,
	before: []string{"write -P 1 0 64k"}, bitmaps: []string{"512", "512"}}

// crashRuns returns how many runs to make of what is short by default: as many
// times more as IMGNBD_CRASH says.
func crashRuns(short uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv("IMGNBD_CRASH"), 10, 32); err == nil {
		return short * n
	}
	return short
}

// crashPoints is how many power cuts are looked at: so many more in the long
// form, IMGNBD_CRASH.
func crashPoints() int {
	if os.Getenv("IMGNBD_CRASH") != "" {
		return 100_000
	}
	return 5_000
}

func TestCrash(t *testing.T) {
	var all simTally
	kinds := 0
	for i := range simKinds {
		k := &simKinds[i]
		t.Run(k.name, func(t *testing.T) {
			var tally simTally
			defer func() {
				kinds++
				all.add(&tally)
			}()
			for seed := range crashRuns(2) {
				s := newSim(t, k, seed, defects{})
				if err := s.run(); err != nil {
					t.Fatal(err)
				}
				if s.failed > 0 && k.name != "full device" {
					t.Fatalf("%d requests failed", s.failed)
				}
				if err := s.verify(250, 6, &tally); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				s.judgeByQEMU(t, &tally)
			}
			t.Logf("%+v", tally)
		})
	}
	t.Logf("%d power cuts, and %d while a successor took over after %d kills", all.cuts, all.killCuts, all.kills)
	if n := all.cuts + all.killCuts; kinds == len(simKinds) && n < crashPoints() {
		t.Errorf("%d power cuts, but %d are promised", n, crashPoints())
	}
}

// faultKind is a kind of image in which errors are injected. Every other one
// makes tables and refcount blocks all the time.
func faultKind(seed uint64) *simKind {
	k := simKinds[seed/2%uint64(len(simKinds))]
	k.workers, k.ops = 1+int(seed%3), 80
	if seed%2 == 0 {
		k = simKind{name: "small blocks", options: "cluster_size=512,refcount_bits=64", size: 512 << 10, hot: 512 << 10, workers: 2, ops: 60}
	}
	return &k
}

// faulty makes a few operations of s fail: syncs, pointers, small writes or
// any writes.
func (s *sim) faulty(what int) {
	r := rand.New(rand.NewPCG(s.seed, 7))
	at, n := r.IntN([]int{12, 20, 100, 250}[what]), 1+r.IntN([]int{1, 3, 3, 3}[what])
	seen := 0
	s.log.Fail = func(e storagetest.Event) error {
		switch {
		case (what == 0) != (e.Kind == storagetest.EventSyncEnd),
			what == 1 && len(e.Data) >= 64,
			what == 2 && len(e.Data) > 512:
			return nil
		}
		if seen++; seen > at && seen <= at+n {
			return errInjected
		}
		return nil
	}
}

var errInjected = errors.New("injected")

func TestCrashAfterFaults(t *testing.T) {
	var tally simTally
	failed := 0
	for seed := range crashRuns(44) {
		s := newSim(t, faultKind(seed), seed, defects{})
		s.faulty(int(seed / 2 % 4))
		if err := s.run(); err != nil {
			t.Fatal(err)
		}
		if s.failed > 0 {
			failed++
		}
		if err := s.verify(60, 0, &tally); err != nil {
			t.Fatalf("seed %d, %s: %v", seed, s.kind.name, err)
		}
	}
	t.Logf("%+v; requests failed in %d runs", tally, failed)
	if failed == 0 {
		t.Error("no request failed")
	}
}

// A new block whose own count cannot be read at first is linked by a later
// batch, and before anything that it covers.
func TestCrashAfterUnreadCounts(t *testing.T) {
	kind := simKind{name: "half a block", options: "cluster_size=512,refcount_bits=64", size: 512 << 10, hot: 512 << 10, workers: 2, ops: 60,
		before: []string{"write -P 1 0 14k"}}
	h, err := parseHeader(simBlank(t, &kind))
	if err != nil {
		t.Fatal(err)
	}
	block := int64(binary.BigEndian.Uint64(simBlank(t, &kind)[h.refTableOffset:]))
	var tally simTally
	failed := 0
	for seed := range crashRuns(20) {
		s := newSim(t, &kind, seed, defects{})
		var reads atomic.Int64
		s.inject = func(op storagetest.Op) *storagetest.Failure {
			if op.Kind == storagetest.OpRead && op.Offset == block && reads.Add(1) <= 1+int64(seed%3) {
				return &storagetest.Failure{Err: syscall.EIO}
			}
			return nil
		}
		if err := s.run(); err != nil {
			t.Fatal(err)
		}
		if s.failed > 0 {
			failed++
		}
		if err := s.verify(60, 0, &tally); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%+v; requests failed in %d runs", tally, failed)
	if failed == 0 {
		t.Error("no request failed")
	}
}

// The simulator is worth as much as what it finds: with any rule switched off
// it has to.
func TestCrashFindsDefects(t *testing.T) {
	all := reflect.TypeFor[defects]()
	for i := range all.NumField() {
		f := all.Field(i)
		t.Run(f.Name, func(t *testing.T) {
			var d defects
			*(*bool)(unsafe.Add(unsafe.Pointer(&d), f.Offset)) = true
			for seed := range uint64(1000) {
				// Some show themselves only where errors strike, or where much is
				// made of what they are about.
				kind := &simKinds[seed%uint64(len(simKinds))]
				switch f.Name {
				case "tablesAnew", "noRetrySync", "forgetFailedSync", "refTableEarly":
					kind = faultKind(0)
				case "noSyncMark", "noSyncBits", "noSyncDirectory":
					kind = &bitmapKind
				case "growZeroes", "noGrace":
					kind = &simKind{name: "crowded", options: "cluster_size=4k", size: 128 << 10, hot: 8 << 10, workers: 8, ops: 400}
				}
				s := newSim(t, kind, seed, d)
				switch f.Name {
				case "tablesAnew", "noRetrySync":
					s.faulty(1)
				case "forgetFailedSync":
					s.faulty(0)
				}
				if err := s.run(); err != nil {
					t.Fatal(err)
				}
				if err := s.verify(250, 12, new(simTally)); err != nil {
					t.Logf("found after %d runs: %v", seed+1, err)
					return
				}
			}
			t.Error("not found")
		})
	}
}
