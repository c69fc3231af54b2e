"""Before ``init``, after ``shutdown``, in a forked child: what each verb says; and what importing costs."""

# mypy: disable-error-code="attr-defined"
# (mypy does not look at what a class decorator returns)

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import nbray
from nbray.errors import ActorDiedError, NotInitializedError


@nbray.remote
def double(x: int) -> int:
    return 2 * x


@nbray.remote
class Box:
    def get(self) -> int:
        return 1


def test_questions_about_the_cluster_start_none() -> None:
    assert not nbray.is_initialized()
    for question in (nbray.nodes, nbray.cluster_resources, nbray.available_resources):
        with pytest.raises(NotInitializedError, match=r"nbray\.init"):
            question()
    assert not nbray.is_initialized()


def test_first_call_starts_a_cluster() -> None:
    """In a process of its own: in this one a cluster was shut down before, after which nothing starts by itself."""
    code = (
        "import nbray\n@nbray.remote\ndef f(): return 7\nassert nbray.get(f.remote()) == 7\n"
        "assert nbray.is_initialized()\nnbray.shutdown()\nassert not nbray.is_initialized()\n"
        "try:\n    f.remote()\nexcept nbray.exceptions.NotInitializedError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nbray.init()" in done.stdout


def test_refs_and_handles_of_an_ended_cluster() -> None:
    nbray.init(num_cpus=1)
    ref = double.remote(1)
    box = Box.remote()
    assert nbray.get([ref, box.get.remote()]) == [2, 1]
    nbray.shutdown()
    assert not nbray.is_initialized()
    uses = (
        lambda: nbray.get(ref),
        lambda: nbray.get([ref]),
        lambda: nbray.wait([ref]),
        lambda: nbray.cancel(ref),
        lambda: nbray.free(ref),
        lambda: nbray.kill(box),
    )
    for use in uses:
        with pytest.raises(NotInitializedError, match="no longer connected"):
            use()
    nbray.init(num_cpus=1)
    try:
        assert nbray.get(double.remote(4)) == 8
        for use in (lambda: nbray.get(ref), lambda: nbray.get([ref]), lambda: nbray.kill(box)):
            with pytest.raises(NotInitializedError, match="no longer connected"):
                use()
        with pytest.raises(NotInitializedError, match="no longer connected"):
            double.remote(ref)
        with pytest.raises(ActorDiedError, match="no longer connected"):
            box.get.remote()
    finally:
        nbray.shutdown()


def test_a_function_survives_a_restart_of_the_cluster() -> None:
    for _ in range(2):
        nbray.init(num_cpus=1)
        try:
            assert nbray.get(double.remote(3)) == 6
            assert nbray.get(Box.remote().get.remote()) == 1
        finally:
            nbray.shutdown()


def test_forked_child_is_told(cluster: Any) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            double.remote(1)
        except NotInitializedError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert "forked" in pipe.read()
    assert nbray.get(double.remote(1)) == 2


def test_everything_that_is_promised_is_there() -> None:
    for name in nbray.__all__:
        assert getattr(nbray, name) is not None
    assert set(nbray.__all__) <= set(dir(nbray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nbray.nothing
    assert nbray.actor.exit_actor is nbray.exit_actor


def test_import_takes_no_time() -> None:
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport nbray\nseconds = time.perf_counter() - start\n"
        "import json\nprint(json.dumps([seconds, sorted(m for m in sys.modules if m.startswith('nbray'))]))"
    )
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(__import__("json").loads(done.stdout))
    assert found[0][1] == ["nbray"]
    assert min(seconds for seconds, _ in found) < 0.05
