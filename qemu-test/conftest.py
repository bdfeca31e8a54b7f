# SPDX-License-Identifier: GPL-2.0-only
"""What every scenario gets: its kernel, its pair, its machines, its logs.

The environment says where things are: RBLKIF_KERNELS is a list of NAME=DIRECTORY
of prepared kernels, RBLKIF_BUILD the directory with a directory of our modules
for each kernel release, RBLKIF_DOM0_KERNEL a kernel for dom0 where that of the
run cannot be it, RBLKIF_MODPROBE_D a directory in place of packaging/modprobe.d,
RBLKIF_LOGS where logs go if not to test-logs there, RBLKIF_TIERS the tiers of the
matrix that are run, see harness/matrix.py, RBLKIF_NAME a part of the names of the
scenarios that are run, all if it is empty.
"""

import os
import re
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from harness import features
from harness import matrix
from harness.guest import Kind
from harness.guest_snapshot import SnapshotWithGuest
from harness.kernel import Kernel
from harness.machine import Machine
from harness.native import NativeVm
from harness.pairs import Pair
from harness.pairs import pair as pair_called
from harness.snapshot import Snapshot
from harness.xenhost import XenHost

pytest_plugins = ["harness.reference_runs"]

NAME = os.environ.get("RBLKIF_NAME", "")
MATRIX = {name: runs for name, runs in matrix.read().items() if NAME in name}
BUILD = Path(os.environ.get("RBLKIF_BUILD", "build")).resolve()
LOGS = Path(os.environ.get("RBLKIF_LOGS", BUILD / "test-logs")).resolve()


def kernels() -> dict[str, str]:
    """Returns the directories of the kernels of this run by name."""
    return dict(item.split("=", 1) for item in os.environ["RBLKIF_KERNELS"].split())


@cache
def kernel_in(directory: str) -> Kernel:
    """Returns the kernel in a directory, the same object each time."""
    return Kernel(directory)


@cache
def snapshot_of(
    dom0_kernel: Kernel, vcpus: int, kernel: Kernel, waiting: Kind | None, icount: bool
) -> Snapshot:
    """Returns the snapshot of these parts; its hash reads hundreds of megabytes."""
    parts: dict[str, Any] = {"vcpus": vcpus, "guest_kernel": kernel, "icount": icount}
    if waiting:
        return SnapshotWithGuest(dom0_kernel, waiting=waiting, **parts)
    return Snapshot(dom0_kernel, **parts)


def scenario_of(function: Callable[..., object]) -> str:
    """Returns the name of a scenario in the matrix."""
    return function.__name__.removeprefix("test_")


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a scenario once for each kernel and pair of its entry in the matrix.

    Its name ends with these, behind parameters of the scenario's own.
    """
    scenario = scenario_of(metafunc.function)
    if scenario not in MATRIX and NAME in scenario:
        raise pytest.UsageError(f"{scenario} is not in {matrix.FILE}")
    if "other_kernel" in metafunc.fixturenames and len(kernels()) < 2:
        MATRIX.pop(scenario, None)
    runs = [run for run in MATRIX.get(scenario, ()) if run[0] in kernels()]
    metafunc.parametrize(
        "run", runs, ids=[f"{kernel}-{pair}" for kernel, pair in runs], indirect=True
    )


def pytest_report_header() -> str | None:
    """Says what is left out."""
    if len(kernels()) < 2:
        return "one kernel only: scenarios that need another one are left out"
    return None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Drops scenarios that are not run on the kernels of this run, and sorts by the matrix."""
    order = list(MATRIX)
    items[:] = [item for item in items if isinstance(item.callspec.params["run"], tuple)]
    items.sort(key=lambda item: order.index(scenario_of(item.function)))
    known = {number for number, *_ in features.features()}
    for item in items:
        named = {number for marker in item.iter_markers("feature") for number in marker.args}
        if named - known:
            raise pytest.UsageError(f"{item.nodeid}: no such feature: {sorted(named - known)}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fails if a scenario of the matrix does not exist, unless some were selected."""
    if session.config.option.keyword or any(".py" in argument for argument in session.config.args):
        return
    found = {
        scenario_of(item.function) for item in session.items if isinstance(item, pytest.Function)
    }
    wanted = {
        name for name, runs in MATRIX.items() if any(kernel in kernels() for kernel, _pair in runs)
    }
    if wanted - found:
        raise pytest.UsageError(
            f"{matrix.FILE} has entries without a scenario: {sorted(wanted - found)}"
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Generator[None, Any]:
    """Turns a skipped scenario into a failed one, and tells fixtures the result."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: every scenario of the matrix must run"
    if call.when == "call":
        item.failed = report.failed


@pytest.fixture
def run(request: pytest.FixtureRequest) -> matrix.Run:
    """Returns the names of this run's kernel and pair."""
    kernel, pair = request.param
    return kernel, pair


@pytest.fixture
def kernel(run: matrix.Run) -> Kernel:
    """Returns the kernel of this run."""
    return kernel_in(kernels()[run[0]])


@pytest.fixture
def other_kernel(kernel: Kernel) -> Kernel:
    """Returns another kernel that our modules are built for; else the scenario is dropped."""
    return kernel_in(next(path for path in kernels().values() if kernel_in(path) is not kernel))


@pytest.fixture
def build(kernel: Kernel) -> Path:
    """Returns the directory with our modules for this run's kernel."""
    return BUILD / kernel.release


@pytest.fixture
def test_modules(build: Path) -> Path:
    """Returns the same directory, for a scenario that loads modules of rust/samples."""
    return build


@pytest.fixture
def modprobe_d() -> Path:
    """Returns the directory with our files for modprobe."""
    return Path(os.environ.get("RBLKIF_MODPROBE_D", features.TREE / "packaging/modprobe.d"))


@pytest.fixture
def dom0_kernel(kernel: Kernel) -> Kernel:
    """Returns the kernel of dom0: that of this run, or the stock kernel if that cannot be dom0."""
    return kernel if kernel.can_be_dom0 else kernel_in(os.environ["RBLKIF_DOM0_KERNEL"])


@pytest.fixture
def pair(run: matrix.Run, kernel: Kernel, build: Path, dom0_kernel: Kernel) -> Pair:
    """Returns the frontend and backend of this run."""
    return pair_called(run[1], kernel, build, (dom0_kernel, BUILD / dom0_kernel.release))


@pytest.fixture
def logs(request: pytest.FixtureRequest) -> Path:
    """Returns the directory for this run's logs."""
    return LOGS / re.sub(r"[^\w.+-]+", "_", request.node.name.removeprefix("test_")).strip("_")


@pytest.fixture
def xen(
    request: pytest.FixtureRequest, kernel: Kernel, dom0_kernel: Kernel, pair: Pair, logs: Path
) -> Iterator[Callable[..., XenHost]]:
    """Yields a function that starts a Xen host: `host = xen()`; at the end its consoles must be
    clean.

    A guest of the kind `waiting` has booted there, unless that is `None`. With `icount` the clock
    of the machine is the number of its instructions, see snapshot.py; dom0 does not boot there with
    more than one of the `vcpus`, and has one.
    """
    with _machines(request) as boot:

        def start(
            vcpus: int = 1, waiting: Kind | None = Kind(), icount: bool = False, **options: Any
        ) -> XenHost:
            # With the host's clock, the debug checks and a busy host make a guest miss the
            # deadlines of xl. With instructions as the clock it behaves the same everywhere.
            icount = icount or kernel.has_checks
            vcpus = 1 if icount else vcpus
            snapshot = snapshot_of(dom0_kernel, vcpus, kernel, waiting, icount)
            host = XenHost(snapshot, pair, logs, **options)
            boot(host)
            return host

        yield start


@pytest.fixture
def host(xen: Callable[..., XenHost]) -> XenHost:
    """Starts a Xen host whose server has the pair's backend and a RAM disk, /dev/ram0."""
    host = xen()
    server = host.start_server()
    server.load_backend()
    server.ram_disks()
    return host


@pytest.fixture
def native_vm(
    request: pytest.FixtureRequest, kernel: Kernel, logs: Path
) -> Iterator[Callable[..., NativeVm]]:
    """Yields a function that starts a machine without Xen: `vm = native_vm(modules=[...])`."""
    with _machines(request) as boot:

        def start(**options: Any) -> NativeVm:
            vm = NativeVm(kernel, logs, **options)
            boot(vm)
            return vm

        yield start


@contextmanager
def _machines(request: pytest.FixtureRequest) -> Iterator[Callable[[XenHost | NativeVm], None]]:
    """Yields a function that boots a machine; at the end all machines are finished or examined."""
    booted: list[XenHost | NativeVm] = []

    def boot(thing: XenHost | NativeVm) -> None:
        booted.append(thing)
        try:
            thing.boot()
        except BaseException:
            _show_logs(thing.machine)
            raise

    yield boot
    for thing in booted:
        try:
            if not getattr(request.node, "failed", True):
                thing.finish()
        except BaseException:
            request.node.failed = True
            raise
        finally:
            if getattr(request.node, "failed", True):
                thing.collect()
                _show_logs(thing.machine)
            request.node.user_properties.append(
                ("qemu_cpu_seconds", round(thing.machine.cpu_seconds()))
            )
            thing.close()


def _show_logs(machine: Machine) -> None:
    print(f"logs: {machine.logs}")
    print("last lines of the console:")
    print("\n".join(machine.console().splitlines()[-25:]))
