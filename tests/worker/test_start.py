"""What a worker's start costs, in things that can be counted: imports after the fork, memory pages of its own."""

from __future__ import annotations

import resource
import sys
from typing import Any

from nbray import platform

MOST_PAGES = 2_500
"""It is 1,400 on x86-64: each page costs about 2 µs to copy, and more to unmap when the worker ends."""


class _Probe:
    def faults(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def imported(self) -> list[str]:
        """Modules that this process has imported itself."""
        from nbray.worker.modules import Finder

        inherited = next(finder._inherited for finder in sys.meta_path if isinstance(finder, Finder))
        return sorted(set(sys.modules) - inherited)


def _probes(cluster: Any) -> list[Any]:
    """Actors in three processes, the last of which was forked from a complete zygote."""
    probe = cluster.remote(_Probe)
    probes = [probe.remote() for _ in range(3)]
    cluster.get([each.faults.remote() for each in probes])
    return probes


def test_a_worker_imports_nothing_that_all_workers_need(shared_cluster: Any) -> None:
    *_, last = _probes(shared_cluster)
    own = {"resource", "tests", "tests.worker", __name__}
    assert set(shared_cluster.get(last.imported.remote())) <= own


def test_a_worker_copies_few_pages_of_its_zygote(shared_cluster: Any) -> None:
    if not platform.LINUX:
        return
    *_, last = _probes(shared_cluster)
    faults = shared_cluster.get(last.faults.remote())
    assert 0 < faults < MOST_PAGES
