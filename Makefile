# make help tells what there is.

GO     ?= go
VERSION = $(shell git describe --tags --always --dirty 2>/dev/null)
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# make run
IMAGE   = testdata/hello.qcow2
PORT    = 10809
OPTIONS = --read-only

# make test, race, interop, fuzz: what to test, and for how long
PKG      = ./...
FUZZTIME = 10s
SHORT    = -short

# make lint: all that other systems than Linux can use
PORTABLE = ./asif ./cmd/... ./export ./image/... ./internal/drivers ./internal/nbd ./qcow2 ./raw ./storage/...

.DEFAULT_GOAL = help

.PHONY: help
help: ## this text
	@echo 'usage: make TARGET [VARIABLE=value]'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

.PHONY: build
build: ## the program, as bin/imgnbd
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/imgnbd

.PHONY: run
run: build ## build it and export IMAGE=file on PORT=10809 of this machine, with OPTIONS=--read-only
	@echo
	@echo '$(IMAGE) is at  nbd://localhost:$(PORT)   until you type ctrl-C. In another terminal:'
	@echo
	@echo '  nbdinfo nbd://localhost:$(PORT)'
	@echo '  nbdcopy nbd://localhost:$(PORT) disk.raw'
	@echo '  qemu-img info nbd://localhost:$(PORT)'
	@echo '  sudo sh -c "modprobe nbd && nbd-client localhost $(PORT) /dev/nbd0 && mount -r /dev/nbd0 /mnt"'
	@echo
	@bin/imgnbd --bind 127.0.0.1 --port $(PORT) --persistent --shared 0 $(OPTIONS) -- '$(IMAGE)'

# -count=1 in what follows: to go's cache of results, tests that build the program
# have not changed when it has.
.PHONY: test
test: judges ## install what the tests need (Debian, Ubuntu) and run them all; a skip is a failure
	$(GO) run ./internal/test/strict -skips .ci/skips -- -count=1 -timeout 40m $(PKG)

.PHONY: race
race: judges ## the tests under the race detector, with fewer seeds; SHORT= for all
	$(GO) run ./internal/test/strict -skips .ci/skips -- -count=1 -race $(SHORT) -timeout 40m $(PKG)

.PHONY: interop
interop: judges ## only our server with others' clients, and our client with others' servers
	$(GO) run ./internal/test/strict -- -count=1 ./internal/test/interop ./internal/nbd ./cmd/imgnbd

.PHONY: judges
judges:
	@internal/test/install-judges

.PHONY: lint
lint: ## gofmt, vet, staticcheck, the rules of the house, and that other systems compile
	@test -z "$$(gofmt -l .)" || { echo 'gofmt would change:'; gofmt -l .; false; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) test -count=1 ./internal/test/house
	GOOS=linux GOARCH=arm64 $(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet $(PORTABLE)

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME=10s
	.ci/fuzz $(FUZZTIME) $(PKG)

.PHONY: bench
bench: judges ## speed beside qemu-nbd, nbdkit and nbd-server, 3 minutes; BENCH=-full for all of it
	$(GO) run ./internal/test/bench $(BENCH)

.PHONY: bench-device
bench-device: judges ## what an attached device costs its server, beside qemu-nbd, in a guest; 10 minutes
	$(GO) test ./internal/test/guest -run '^$$' -bench Device -benchtime 1x -timeout 2h -v

.PHONY: cover
cover: ## which lines the tests reach, as coverage.html
	$(GO) test -coverprofile coverage.out -coverpkg ./... $(PKG)
	$(GO) tool cover -html coverage.out -o coverage.html
	@$(GO) tool cover -func coverage.out | tail -n 1

.PHONY: man
man: ## the manual page, to read
	@man -l docs/man/imgnbd.1

.PHONY: release
release: ## build/: the program for each system, reproducible, with checksums
	rm -rf build && mkdir build
	set -e; for arch in amd64 arm64; do \
	    CGO_ENABLED=0 GOOS=linux GOARCH=$$arch $(GO) build -trimpath -buildvcs=false \
	        -ldflags '-s -w -buildid= -X main.version=$(VERSION)' \
	        -o build/imgnbd-$(VERSION)-linux-$$arch ./cmd/imgnbd; \
	done
	cd build && sha256sum imgnbd-* >SHA256SUMS && cat SHA256SUMS

.PHONY: nightly
nightly: lint test ## everything, in its long form
	$(MAKE) race SHORT=
	IMGNBD_GUESTS=full $(GO) test ./internal/test/guest -run 'TestTakeover|TestDeadTimeout|TestReplace|TestChain|TestMountJournal|TestLogWrites' -count=1 -timeout 6h
	IMGNBD_CRASH=100 $(GO) test ./qcow2 -run 'TestCrash$$|TestCrashAfterFaults|PowerCut|TestHostileImages' -count=1 -v -timeout 6h
	IMGNBD_CRASH=100 $(GO) test ./internal/test/program -run TestHostile -count=1 -timeout 2h
	$(MAKE) fuzz FUZZTIME=10m
	$(MAKE) bench BENCH=-full

.PHONY: clean
clean: ## remove what was built
	rm -rf bin build coverage.out coverage.html
