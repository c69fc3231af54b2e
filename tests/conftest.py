"""Fixtures of all tests: a private runtime directory, clusters, and the check that nothing is left behind."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import LeakCheck, Snapshot

# A Unix socket's path has 108 bytes at most, and the runtime adds names of its own.
LONGEST_TEMP_ROOT = 40

# What a clean shutdown may still be doing when it returns; far above what it takes.
SECONDS_TO_VANISH = 5.0

leak_check = pytest.StashKey[LeakCheck]()
session_start = pytest.StashKey[Snapshot]()
finishing = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Give this session folders of its own, before any test or fixture looks for one."""
    original = tempfile.gettempdir()
    root = original if len(original) <= LONGEST_TEMP_ROOT else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="nbt-", dir=root))
    check = LeakCheck(folder)
    for path in (check.runtime, check.temp, folder / "home"):
        path.mkdir(mode=0o700)
    # pytest's own folders stay where they were: they are kept for looking at after a failure.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", original)
    os.environ["NBRAY_RUNTIME_DIR"] = str(check.runtime)
    os.environ["NBRAY_DATA_DIR"] = str(folder / "home" / "data")
    os.environ["TMPDIR"] = str(check.temp)
    tempfile.tempdir = None
    # Else a process title overwrites the environment in /proc by which the leak check knows its processes.
    os.environ["SPT_NOENV"] = "1"
    # A developer's profile or startup files must not change what a kernel does in a test.
    os.environ["IPYTHONDIR"] = str(folder / "home" / "ipython")
    os.environ["JUPYTER_CONFIG_DIR"] = str(folder / "home" / "jupyter")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(folder / "home" / "kernels")
    _end_cleanly_when_terminated()
    config.stash[leak_check] = check
    config.stash[session_start] = check.snapshot()


def _end_cleanly_when_terminated() -> None:
    """SIGTERM (a time limit around the tests, say) unwinds like an interrupt, so that nothing is left running."""
    session = os.getpid()

    def terminate(number: int, _: object) -> None:
        if os.getpid() == session:
            pytest.exit("terminated by SIGTERM", returncode=128 + number)
        # A forked child of a test: none of our business.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, terminate)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Look once more at the very end: the fixtures below do not see what an interrupted test leaves.

    An interrupted session, or one at its --maxfail, ends its last fixtures in here, where pytest has no test left
    to report an error for.
    """
    check = session.config.stash[leak_check]
    session.config.stash[finishing] = True
    yield
    found = check.wait(session.config.stash[session_start], SECONDS_TO_VANISH)
    if found:
        check.remove(found)
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\nLeft behind at the end of the session:\n{found}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if leak_check in config.stash:
        shutil.rmtree(config.stash[leak_check].folder, ignore_errors=True)


def _check(config: pytest.Config, what: str) -> Iterator[None]:
    check = config.stash[leak_check]
    before = check.snapshot()
    yield
    if finishing in config.stash:
        return
    found = check.wait(before, SECONDS_TO_VANISH)
    if found:
        check.remove(found)
        check.forget_private()
        pytest.fail(
            f"{what} left this behind (still there after {SECONDS_TO_VANISH:.0f} s; now removed):\n{found}\n"
            "Stop what a test starts, also when it fails: fixtures `cluster` and `runtime_dir` do.",
            pytrace=False,
        )


@pytest.fixture(autouse=True, scope="module")
def _no_leaks_of_the_module(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from _check(request.config, f"Fixtures of {request.node.name}")


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, _no_leaks_of_the_module: None) -> Iterator[None]:
    yield from _check(request.config, request.node.name)
    request.config.stash[leak_check].forget_private()


@pytest.fixture
def runtime_dir(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh private directory with a short path, NBRAY_RUNTIME_DIR while the test runs.

    What the test leaves in it is reported as a leak.
    """
    check = request.config.stash[leak_check]
    path = Path(tempfile.mkdtemp(prefix="t", dir=check.runtime))
    check.private.add(path)
    monkeypatch.setenv("NBRAY_RUNTIME_DIR", str(path))
    return path


def _cluster(**options: Any) -> Iterator[Any]:
    # Not at the top: most tests need no cluster, and one of them measures the import.
    nbray: Any = importlib.import_module("nbray")
    nbray.init(**options)
    try:
        yield nbray
    finally:
        nbray.shutdown()


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cluster of this test's own with two CPUs; yields the module `nbray`.

    `@pytest.mark.cluster(num_cpus=4, seed=1)` gives other arguments to `nbray.init`.
    """
    marker = request.node.get_closest_marker("cluster")
    yield from _cluster(**{"num_cpus": 2, **(marker.kwargs if marker else {})})


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Any]:
    """A cluster with two CPUs for all tests of a module that do it no harm; yields the module `nbray`."""
    yield from _cluster(num_cpus=2)
