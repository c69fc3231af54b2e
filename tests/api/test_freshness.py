"""On a real cluster: what runs is what the notebook says now."""

from __future__ import annotations

from typing import Any

import pytest

import nbray
from nbray.api import context


class Notebook:
    """Cells run one after the other in one namespace; each begins an epoch, as the extension makes it."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__", "nbray": nbray}

    def run(self, source: str) -> Any:
        runtime = context.current()
        assert runtime is not None
        runtime.epoch += 1
        exec(source, self.names)
        return self.names.get("result")


@pytest.fixture
def notebook(shared_cluster: Any) -> Notebook:
    return Notebook()


def test_rebound_global(notebook: Notebook) -> None:
    notebook.run("rate = 2\n@nbray.remote\ndef f(x): return x * rate")
    assert notebook.run("result = nbray.get(f.remote(3))") == 6
    assert notebook.run("rate = 5\nresult = nbray.get(f.remote(3))") == 15


def test_within_one_cell(notebook: Notebook) -> None:
    assert notebook.run(
        "n = 0\n@nbray.remote\ndef f(): return n\nresult = []\n"
        "for n in range(5):\n    result.append(f.remote())\nresult = nbray.get(result)"
    ) == [0, 1, 2, 3, 4]


def test_redefined_helper(notebook: Notebook) -> None:
    notebook.run("def helper(x): return x + 1\n@nbray.remote\ndef f(x): return helper(x)")
    assert notebook.run("result = nbray.get(f.remote(1))") == 2
    assert notebook.run("def helper(x): return x + 100\nresult = nbray.get(f.remote(1))") == 101


def test_in_place_change_at_the_next_cell(notebook: Notebook) -> None:
    notebook.run("table = {'a': 1}\n@nbray.remote\ndef f(): return dict(table)")
    assert notebook.run("result = nbray.get(f.remote())") == {"a": 1}
    assert notebook.run("table['b'] = 2\nresult = nbray.get(f.remote())") == {"a": 1, "b": 2}


def test_redefined_class_of_an_actor(notebook: Notebook) -> None:
    notebook.run("class C:\n    def m(self): return 1\nA = nbray.remote(C)\nold = A.remote()")
    assert notebook.run("result = nbray.get(old.m.remote())") == 1
    notebook.run("C.m = lambda self: 2\nnew = A.remote()")
    assert notebook.run("result = nbray.get([old.m.remote(), new.m.remote()])") == [1, 2]


def test_global_of_an_actors_class(notebook: Notebook) -> None:
    notebook.run("rate = 1\n@nbray.remote\nclass C:\n    def m(self): return rate\nfirst = C.remote()")
    notebook.run("rate = 2\nsecond = C.remote()")
    assert notebook.run("result = nbray.get([first.m.remote(), second.m.remote()])") == [1, 2]


def test_nested_remote_function(notebook: Notebook) -> None:
    notebook.run(
        "rate = 1\n@nbray.remote\ndef inner(): return rate\n@nbray.remote\ndef outer(): return nbray.get(inner.remote())"
    )
    assert notebook.run("result = nbray.get(outer.remote())") == 1
    assert notebook.run("rate = 7\nresult = nbray.get(outer.remote())") == 7


def test_classes_keep_their_identity(notebook: Notebook) -> None:
    notebook.run(
        "class Point:\n    made = 0\n    def __init__(self, x): self.x = x\n    def shifted(self): return self.x + shift\n"
        "shift = 10\n@nbray.remote\ndef move(p): p.x += 1; return p"
    )
    notebook.run("Point.made = 5\nresult = nbray.get(move.remote(Point(1)))")
    assert notebook.run("result = (type(result) is Point, result.x, Point.made)") == (True, 2, 5)
    assert notebook.run("shift = 20\nresult = Point(1).shifted()") == 21


def test_exceptions_of_the_notebook(notebook: Notebook) -> None:
    notebook.run(
        "class Mine(Exception):\n    level = 0\n@nbray.remote\ndef f(): raise Mine('x')\nMine.level = 3"
    )
    assert notebook.run(
        "try:\n    nbray.get(f.remote())\nexcept Mine as e:\n    result = (e.args, e.level, Mine.level)"
    ) == (("x",), 3, 3)


def test_cached_helper(notebook: Notebook) -> None:
    """functools.lru_cache objects of ``__main__`` are pickled by name by cloudpickle, and that name does not exist in a worker."""
    notebook.run(
        "import functools\n@functools.lru_cache\ndef square(x): return x * x\n"
        "@nbray.remote\ndef f(x): return square(x)"
    )
    assert notebook.run("result = nbray.get(f.remote(4))") == 16


def test_ref_in_a_closure_outlives_its_name(notebook: Notebook) -> None:
    notebook.run(
        "ref = nbray.put(list(range(5)))\n@nbray.remote\ndef f(): return sum(nbray.get(ref))\nwaiting = f.remote()\nref = None"
    )
    assert notebook.run("result = nbray.get(waiting)") == 10


def test_large_capture_warns(notebook: Notebook) -> None:
    notebook.run("import numpy as np\nhuge = np.ones(2_000_000)\n@nbray.remote\ndef f(): return huge.sum()")
    with pytest.warns(UserWarning, match=r"'huge' \(15\.3 MB\)") as caught:
        assert notebook.run("result = nbray.get(f.remote())") == 2_000_000
    assert caught[0].filename == "<string>"
