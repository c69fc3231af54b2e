"""What starts cost, in things that can be counted: imports before the next process starts or after the fork, memory pages of a worker's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nbray
from nbray import platform

MOST_PAGES = 2_500
"""It is 1,400 on x86-64: each page costs about 2 µs to copy, and more to unmap when the worker ends."""


def _probe(cluster: Any) -> Any:
    """An actor in a process that was forked from a complete zygote: the first one is not."""

    # Travels by value: this module's imports would be made in the worker, too.
    class Probe:
        def faults(self) -> int:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        def imported(self) -> list[str]:
            """Modules that this process has imported itself."""
            import sys

            from nbray.worker.modules import Finder

            inherited = next(finder._inherited for finder in sys.meta_path if isinstance(finder, Finder))
            return sorted(set(sys.modules) - inherited)

    remote = cluster.remote(Probe)
    probes = [remote.remote() for _ in range(3)]
    cluster.get([probe.faults.remote() for probe in probes])
    imported = cluster.get([probe.imported.remote() for probe in probes])
    return min(zip(map(len, imported), range(3), probes, strict=True))[2]


def test_a_worker_imports_nothing_that_all_workers_need(shared_cluster: Any) -> None:
    assert set(shared_cluster.get(_probe(shared_cluster).imported.remote())) <= {"resource"}


def test_a_worker_copies_few_pages_of_its_zygote(shared_cluster: Any) -> None:
    if not platform.LINUX:
        return
    faults = shared_cluster.get(_probe(shared_cluster).faults.remote())
    assert 0 < faults < MOST_PAGES


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        # The driver, up to where it starts the node.
        ("import nbray.api.session", {"asyncio", "cloudpickle", "inspect", "msgspec", "numpy"}),
        # The node, up to where it starts zygote and head.
        ("import nbray.node.start", {"asyncio", "cloudpickle", "inspect", "logging", "msgspec", "numpy"}),
        # The zygote, up to where it forks the first worker.
        ("from nbray.worker.zygote import _import_ahead; _import_ahead()", {"numpy", "pandas"}),
    ],
)
def test_what_starts_first_waits_for_few_imports(code: str, heavy: set[str]) -> None:
    print_names = "import sys; print(*sys.modules)"
    # Without site: what the .pth files of this environment import is not nbray's.
    path = [
        str(Path(nbray.__file__).parent.parent),
        *(entry for entry in sys.path if "site-packages" in entry),
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {path!r}\n{code}\n{print_names}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert heavy & set(done.stdout.split()) == set()
