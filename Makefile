# SPDX-License-Identifier: GPL-2.0-only
#
# Commands of this tree; `make help` lists them. Kbuild has the modules.

KREL ?= 7.3
export KDIR

.PHONY: all demo test test-all test-debug sabotage bench bench-page bench-disks bench-queues profile shell lint doc kernel kernel-debug install clean distclean help
all: ## the modules, for KREL= (a series or release, 7.3) or KDIR= (a build directory)
	@built=$$(scripts/build-modules $(KREL)) && ls -1 "$${built#$(CURDIR)/}"/rblk*.ko

demo: ## a guest whose root disk our pair carries, checked from outside
	@scripts/demo

test: ## the tests of each day; T=<name> for all scenarios with that name
	@scripts/run-tests $(T)

test-all: ## all tests on Debian's kernels, those of each day on the debug kernel: before a release
	@RBLKIF_TIERS="daily full" scripts/run-tests

test-debug: ## all scenarios that run on the debug kernel; T=<name> for those with that name
	@KERNEL=debug RBLKIF_TIERS="daily debug" scripts/run-tests $(T)

sabotage: ## takes features away from our drivers, and sees whether the scenarios notice; NAMES="..." for some
	@scripts/sabotage $(NAMES)

bench: ## what an I/O costs, counted, with the C pair and ours; BASE=<json> compares with an earlier run
	@scripts/bench $(if $(WORKLOADS),--workloads "$(WORKLOADS)") $(if $(BASE),--base "$(BASE)") \
		$(if $(TYPES),--types "$(TYPES)")

bench-page: ## the same, and writes the tables and the picture of Documentation/generated
	@scripts/bench --types pv,pvh --page Documentation/generated

bench-disks: ## what disks cost beside I/O: to connect, memory, wake-ups; with the table of that page
	@scripts/bench --disks --pairs C/C,R/R --page Documentation/generated

bench-queues: ## four queues on four virtual CPUs by the clock, as ratios; with the table of that page
	@scripts/bench --queues --page Documentation/generated

profile: ## where the instructions go, function by function; WORKLOADS="4k read qd1" names the loads
	@scripts/bench --profile --no-baselines --settings nosched --pairs C/C,R/R --out build/bench/profile.json \
		--workloads "$(or $(WORKLOADS),4k read qd32)"

shell: ## a dom0 with a guest, to play in
	@scripts/demo --shell

lint: ## what can be seen of the tree without running it
	@scripts/build-modules $(KREL) >/dev/null
	@scripts/lint

doc: ## the interfaces of the crates and the pages as HTML, in build/doc
	@scripts/doc

kernel: ## a small kernel of our own
	@scripts/lib/own-kernel plain

kernel-debug: ## a kernel of our own with KASAN, lockdep, kmemleak
	@scripts/lib/own-kernel debug

install: ## the modules for modprobe: of the running kernel, or KREL= or KDIR=, below DESTDIR=
	@scripts/install-modules $(if $(filter file,$(origin KREL)),,$(KREL))

clean: ## removes what was built in the tree
	rm -rf build target

distclean: clean ## removes the cache too, and says what that is
	@scripts/distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22
