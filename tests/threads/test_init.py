"""``init`` and what goes wrong with it: arguments, twice, after the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbray
from tests.objects.states import await_empty


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_cpu": 2}, TypeError, "no argument 'num_cpu': did you mean 'num_cpus'?"),
        ({"storage_memory": 2}, TypeError, "did you mean 'object_store_memory'?"),
        ({"zzz": 2}, TypeError, "no argument 'zzz': it takes num_cpus, num_gpus, resources, "),
        ({"num_cpus": "2"}, ValueError, "num_cpus='2' should be a number of at least 0"),
        ({"num_cpus": -1}, ValueError, "num_cpus=-1 should be a number of at least 0"),
        ({"num_gpus": True}, ValueError, "num_gpus=True should be a number"),
        (
            {"object_store_memory": 5},
            ValueError,
            "object_store_memory=5 should be a number of at least 16777216",
        ),
        ({"resources": {"CPU": 1}}, ValueError, "use num_cpus= for this one"),
        ({"resources": {"tpu": -1}}, ValueError, "resources={'tpu': -1}: the amount should be"),
        ({"resources": ["tpu"]}, TypeError, "resources=['tpu'] should be a dict of amounts by name"),
        ({"address": "nowhere"}, ConnectionError, "no cluster 'nowhere' runs here"),
        ({"seed": "x"}, TypeError, "seed='x' should be a whole number"),
        ({"name": 5}, TypeError, "name=5 should be a text that is not empty"),
        ({"session": ""}, TypeError, "session='' should be a text that is not empty"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        nbray.init(**arguments)
    assert text in str(caught.value)
    assert not nbray.is_initialized()


def test_init_twice(cluster: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"connected to the cluster 'default' already; call nbray\.shutdown\(\)"
    ):
        nbray.init()
    again = nbray.init(ignore_reinit_error=True)
    assert not again.started
    assert nbray.get(nbray.put(1)) == 1


def test_another_size_than_it_has(cluster: Any) -> None:
    import subprocess
    import sys

    program = "import nbray\nnbray.init(num_cpus=7)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert "runs already and cannot be changed to num_cpus=7 (it has 2)" in done.stderr
    assert "start another one with name=" in done.stderr


def test_a_ref_of_another_cluster() -> None:
    """Its id means nothing here, whichever way it comes."""
    import pickle

    nbray.init(num_cpus=1, name="first")
    try:
        ref = nbray.put(np.ones(10_000))
        data = pickle.dumps(ref)
    finally:
        nbray.shutdown()
    nbray.init(num_cpus=1, name="second")
    try:
        with pytest.raises(nbray.exceptions.NotInitializedError, match="no longer connected"):
            nbray.get(ref)
        with pytest.raises(nbray.exceptions.NotInitializedError, match="belongs to a cluster that has ended"):
            nbray.put([ref])
        foreign = pickle.loads(data)
        with pytest.raises(nbray.exceptions.ObjectLostError, match="it was made in another cluster"):
            nbray.get(foreign, timeout=10)

        @nbray.remote
        def use(x: Any) -> Any:
            return x

        with pytest.raises(nbray.exceptions.ObjectLostError, match="it was made in another cluster"):
            nbray.get(use.remote(pickle.loads(data)), timeout=10)
        assert nbray.wait([pickle.loads(data)], timeout=10)[0]
        del foreign
        await_empty()
    finally:
        nbray.shutdown()


def test_values_outlive_the_cluster() -> None:
    nbray.init(num_cpus=1)
    try:
        array = nbray.get(nbray.put(np.arange(100_000)))
        frame = nbray.get(nbray.put({"a": np.ones(50_000)}), writable=True)
    finally:
        nbray.shutdown()
    assert array[-1] == 99_999
    frame["a"] += 1
    assert frame["a"].sum() == 100_000
    del array, frame
