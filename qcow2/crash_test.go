package qcow2

import (
	"fmt"
	"testing"
)

// simKinds are the images and workloads of the simulator.
var simKinds = []simKind{
	{name: "one writer 512 backing", options: "cluster_size=512", size: 128 << 10, hot: 16 << 10, workers: 1, ops: 120, backing: true},
	{name: "512 backing", options: "cluster_size=512", size: 128 << 10, hot: 8 << 10, workers: 4, ops: 240, backing: true},
	{name: "4k backing", options: "cluster_size=4k", size: 512 << 10, hot: 64 << 10, workers: 4, ops: 200, backing: true},
	{name: "4k", options: "cluster_size=4k", size: 512 << 10, hot: 64 << 10, workers: 4, ops: 200},
	{name: "512 64 bit counts", options: "cluster_size=512,refcount_bits=64", size: 256 << 10, hot: 128 << 10, workers: 4, ops: 400},
	{name: "512 1 bit counts backing", options: "cluster_size=512,refcount_bits=1", size: 128 << 10, hot: 4 << 10, workers: 6, ops: 300, backing: true},
	{name: "4k 64 bit counts backing", options: "cluster_size=4k,refcount_bits=64", size: 1 << 20, hot: 32 << 10, workers: 8, ops: 300, backing: true},
	{name: "1k 8 bit counts backing", options: "cluster_size=1k,refcount_bits=8", size: 128 << 10, hot: 16 << 10, workers: 3, ops: 200, backing: true},
	{name: "64k", options: "cluster_size=64k", size: 1 << 20, hot: 512 << 10, workers: 4, ops: 100},
	{name: "version 2", options: "compat=0.10,cluster_size=1k", size: 128 << 10, hot: 16 << 10, workers: 4, ops: 200},
	{name: "version 2 backing", options: "compat=0.10,cluster_size=4k", size: 256 << 10, hot: 32 << 10, workers: 4, ops: 200, backing: true},
}

func TestCrash(t *testing.T) {
	for i := range simKinds {
		k := &simKinds[i]
		t.Run(k.name, func(t *testing.T) {
			var tally simTally
			for seed := range uint64(2) {
				s := newSim(t, k, seed, defects{})
				if err := s.run(); err != nil {
					t.Fatal(err)
				}
				if s.failed > 0 {
					t.Fatalf("%d requests failed", s.failed)
				}
				if err := s.verify(250, &tally); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				s.judgeByQEMU(t, &tally)
			}
			t.Log(fmt.Sprintf("%+v", tally))
		})
	}
}
