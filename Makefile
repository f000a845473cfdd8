# weft: `make help` lists what there is to make. As root on Debian 12, with Go
# and nothing else, every target installs what it lacks (test/prerequisites).

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DELETE_ON_ERROR:

# Where Go's own installation instructions put it.
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

# What `weft version` says. Without a tag, or outside git, it says so itself.
VERSION := $(shell git describe --tags --dirty=-changed 2>/dev/null)
COMMIT  := $(shell git describe --always --abbrev=40 --exclude='*' --dirty=-changed 2>/dev/null)

# The version is stamped here, so Go need not ask git, which refuses where the
# checkout is somebody else's.
BUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false \
	-ldflags '-s -w $(if $(VERSION),-X main.version=$(VERSION)) $(if $(COMMIT),-X main.commit=$(COMMIT))'

# Tools of one version each, kept beyond a checkout and shared between them.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft
GOLANGCI_LINT_VERSION := 2.15.0
GOLANGCI_LINT := $(CACHE)/tools/golangci-lint-$(GOLANGCI_LINT_VERSION)
CLANG_FORMAT  := clang-format-19

BPF_SOURCES := $(wildcard bpf/*.c bpf/*.h)
# Files that `make generate` writes.
GENERATED := ':(glob)**/*_bpfel.go' ':(glob)**/*_bpfel.o'

##@ Use

.PHONY: build
build: ## Build bin/weft and bin/weftlab
	test/prerequisites build
	mkdir -p bin
	$(BUILD) -o bin/ ./cmd/...

# The image's name, with its tag. No registry has it.
IMAGE := localhost/weft:dev
ARCHITECTURES := amd64 arm64

.PHONY: image
image: ## Build the container image, bin/image/weft.oci.tar, and what is in it as SPDX (IMAGE=name:tag)
	test/prerequisites image
	mkdir -p bin/image
	for arch in $(ARCHITECTURES); do
		GOARCH=$$arch $(BUILD) -o bin/image/weft-$$arch ./cmd/weft
	done
	go run ./deploy/image -cache $(CACHE)/image -out bin/image -name '$(IMAGE)' \
		$(foreach arch,$(ARCHITECTURES),-program $(arch)=bin/image/weft-$(arch)) \
		-version '$(or $(VERSION),unreleased)' -commit '$(or $(COMMIT),unknown)' -created "$$(git log -1 --format=%ct 2>/dev/null || echo 0)"

.PHONY: demo
demo: build ## Show weft at work between three nodes in namespaces (root; KEEP=1 leaves them up)
	test/prerequisites demo
	bin/weftlab demo $(if $(KEEP),--keep) $(ARGS)

.PHONY: cluster
cluster: ## Bring up a Kubernetes cluster with weft on this machine, and leave it up (root; ARGS=)
	test/prerequisites cluster
	mkdir -p bin
	go build -buildvcs=false -o bin/weftcluster ./test/cluster/weftcluster
	bin/weftcluster up $(ARGS)

# What is measured: a base, and what else may matter, one thing at a time.
# FULL=1 tries all combinations, for some hours; ARGS override.
BENCH := --modes host,flanneld,kernel,base,express --rounds 11,8 --time 500ms \
	--underlay virtual,wire --cpus 1,2 --peers 1,1000,5000 \
	--to pod,iptables:1,iptables:1000,nftables:1,nftables:1000

# Packets are stripped in the driver where their checksums are whole.
BENCH_XDP := --modes host,flanneld,express,xdp --rounds 8 --time 500ms --underlay summed --cpus 1,2

# What a stranger sends to the VXLAN port costs a node that drops it early or late.
BENCH_JUNK := --modes flanneld,express,enforce,xdp-enforce --tests TCP_RR --rounds 8 --time 500ms \
	--underlay summed --junk none,vni,source,malformed

.PHONY: bench
bench: build ## Measure weft against stock flanneld and the host, in about an hour (root; FULL=1, ARGS=)
	test/prerequisites bench
	programs=$$(test/peers flanneld etcd kube-apiserver kube-proxy)
	mkdir -p bin/bench
	bin/weftlab bench --programs "$$programs" --csv bin/bench/results.csv --svg bin/bench/plot.svg \
		$(BENCH) $(if $(FULL),--full --rounds 5) $(ARGS) | tee -i bin/bench/tables.txt
	bin/weftlab bench --programs "$$programs" --csv bin/bench/xdp.csv $(BENCH_XDP) $(ARGS) | tee -i -a bin/bench/tables.txt
	bin/weftlab bench --programs "$$programs" --csv bin/bench/junk.csv $(BENCH_JUNK) $(ARGS) | tee -i -a bin/bench/tables.txt
	echo 'All of it is in bin/bench: tables.txt, results.csv, plot.svg; xdp.csv has what the driver strips, junk.csv what strangers cost.'

##@ Change

.PHONY: generate
generate: ## Compile bpf/ and write its Go bindings
	test/prerequisites generate
	go generate ./...

.PHONY: format
format: $(GOLANGCI_LINT) ## Lay out Go and C sources
	test/prerequisites lint
	$(GOLANGCI_LINT) fmt
	$(if $(BPF_SOURCES),$(CLANG_FORMAT) -i $(BPF_SOURCES))

##@ Check

.PHONY: test
test: ## Run all tests that need no cluster; as root, none may be skipped (PACKAGES=./... RUN= SKIP=)
	test/run $(PACKAGES)

.PHONY: interop
interop: ## Run tests on kernels 6.1 and 6.12 too, and among stock flannel nodes (root; KERNELS=, PACKAGES=)
	test/interop

.PHONY: e2e
e2e: ## Try weft on real clusters, with kubelets and all, on this machine (root; RUN=)
	test/prerequisites cluster
	export WEFT_REQUIRE_ROOT=1
	go test -tags e2e -count=1 -timeout 40m -v -run '$(or $(RUN),.)' ./test/e2e

.PHONY: lint
lint: $(GOLANGCI_LINT) check-format ## Find faults in the Go sources and in the layout of all
	$(GOLANGCI_LINT) run

.PHONY: check-format
check-format: ## Find C sources that `make format` would change
	test/prerequisites lint
	$(if $(BPF_SOURCES),$(CLANG_FORMAT) --dry-run --Werror $(BPF_SOURCES))

.PHONY: check-generated
check-generated: generate ## Find generated files that are not what bpf/ gives
	changed=$$(git status --porcelain -- $(GENERATED))
	if [ -n "$$changed" ]; then
		git --no-pager diff --stat -- $(GENERATED)
		printf '%s\n' "$$changed" 'The generated files above are not those that are committed: run "make generate" and commit them.'
		exit 1
	fi

##@ Other

.PHONY: clean
clean: ## Remove what was built (tools and kernels stay in ~/.cache/weft)
	rm -rf bin

.PHONY: help
help: ## Show this text
	awk -F ':.*## ' '
		/^##@/ { printf "\n%s\n", substr($$0, 5) }
		/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

$(GOLANGCI_LINT):
	mkdir -p $(@D)
	own=$$(go env GOPATH)/bin/golangci-lint
	if "$$own" version 2>/dev/null | grep -qF 'version $(GOLANGCI_LINT_VERSION) '; then
		ln -sf "$$own" $@
	else
		echo 'Building golangci-lint $(GOLANGCI_LINT_VERSION), once; it takes some minutes.'
		GOBIN=$(@D)/build go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$(GOLANGCI_LINT_VERSION)
		mv $(@D)/build/golangci-lint $@
	fi

# A recipe is one script, and shows what it does by what that prints.
.ONESHELL:
$(VERBOSE).SILENT:
