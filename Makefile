# SPDX-License-Identifier: GPL-2.0-only
#
# Commands of this tree; `make help` lists them. Kbuild has the modules.

KREL ?= 7.3
export KDIR

.PHONY: all demo demo-tap test test-all test-debug test-cluster mutation-test bench bench-page bench-disks bench-queues bench-tap bench-cluster profile shell lint doc kernel kernel-debug install install-tap deb test-packages test-host test-kernels clean distclean help
all: ## builds the modules, for KREL= (a series or release, 7.3) or KDIR= (a build directory)
	@built=$$(scripts/build-modules $(KREL)) && ls -1 "$${built#$(CURDIR)/}"/rblk*.ko

demo: ## runs a guest whose root disk our pair serves, and checks the disk from outside
	@scripts/demo

demo-tap: ## runs a guest whose root disk is a qcow2 image served by rblktap, which is killed meanwhile
	@scripts/demo tap

test: ## runs what a change must pass: lint, tests on the host, daily scenarios; T=<name> for all scenarios with that name
	@scripts/run-tests $(T)

test-all: ## runs all tests on Debian's kernels and the daily ones on the debug kernel: before a release
	@RBLKIF_TIERS="daily full" scripts/run-tests

test-debug: ## runs all scenarios of the debug kernel; T=<name> for those with that name
	@KERNEL=debug RBLKIF_TIERS="daily debug" scripts/run-tests $(T)

test-cluster: ## runs the tests of cluster storage, with Ceph, GlusterFS and etcd; T=<name> for those with that name
	@scripts/cluster-tests $(T)

mutation-test: ## removes features from our drivers, and checks that scenarios fail; NAMES="..." for some
	@scripts/mutation-test $(NAMES)

bench: ## counts instructions, hypercalls and copies per I/O, with the C pair and ours; BASE=<json> compares with an earlier run
	@scripts/bench $(if $(WORKLOADS),--workloads "$(WORKLOADS)") $(if $(BASE),--base "$(BASE)") \
		$(if $(TYPES),--types "$(TYPES)")

bench-page: ## does the same, and writes the tables and the picture of Documentation/generated
	@scripts/bench --types pv,pvh --page Documentation/generated

bench-disks: ## measures the cost of disks beside I/O: connecting, memory, wakeups; with the table of that page
	@scripts/bench --disks --pairs C/C,R/R --page Documentation/generated

bench-queues: ## measures four queues on four virtual CPUs by the clock, as ratios; with the table of that page
	@scripts/bench --queues --page Documentation/generated

bench-tap: ## counts the same with rblktap and with QEMU as the backend, with the table of that page
	@scripts/bench --tap --out build/bench/tap.json --page Documentation/generated \
		$(if $(WORKLOADS),--workloads "$(WORKLOADS)")

bench-cluster: ## measures the engine for Ceph beside QEMU and rbd bench, with the table of Documentation/volumes.rst
	@scripts/bench-cluster

profile: ## counts instructions by function; WORKLOADS="4k read qd1" selects workloads
	@scripts/bench --profile --no-baselines --settings nosched --pairs C/C,R/R --out build/bench/profile.json \
		--workloads "$(or $(WORKLOADS),4k read qd32)"

shell: ## starts a dom0 with a guest, and a shell in it
	@scripts/demo --shell

lint: ## checks the tree without running it: format, warnings, layers, unsafe, panics, mutations
	@scripts/build-modules $(KREL) >/dev/null
	@scripts/lint

doc: ## writes the documentation of crates and pages as HTML to build/doc
	@scripts/doc

kernel: ## builds a small kernel
	@scripts/lib/own-kernel plain

kernel-debug: ## builds a kernel with KASAN, lockdep, kmemleak
	@scripts/lib/own-kernel debug

install: ## installs the modules for modprobe: of the running kernel, or KREL= or KDIR=, below DESTDIR=
	@scripts/install-modules $(if $(filter file,$(origin KREL)),,$(KREL))

install-tap: ## installs rblktap, rblkd and rblk, which serve disks from user space, below DESTDIR=
	@scripts/install-tap

deb: ## builds the Debian packages rblkif-dkms, rblk, rblkd and rblkif-doc, in build/deb
	@scripts/deb

test-packages: ## builds the Debian packages twice, and installs and purges them in throw-away systems
	@scripts/lib/package-tests

test-host: ## installs the packages in a Debian dom0 with systemd and tests them there; T=<name> up to that test
	@scripts/test-host $(T)

test-kernels: ## builds, loads and boots with each Debian kernel with Rust, and writes a table; KERNELS="..." for some
	@scripts/test-kernels $(KERNELS)

clean: ## removes what was built in the tree
	rm -rf build target

distclean: clean ## also removes the cache, after showing its contents
	@scripts/distclean

help: ## prints this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22
