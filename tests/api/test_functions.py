"""The function that is exported is the one in the notebook now: identity checks, epochs, content ids, sizes, sources."""

from __future__ import annotations

import gc
import linecache
import pickle
import re
import subprocess
import sys
import threading
import timeit
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from nbray.api import functions
from nbray.api.functions import FunctionExport, load_function
from nbray.api.remote import remote
from nbray.errors import SerializationError
from nbray.store import serialization


class Notebook:
    """Cells run one after the other in a namespace that looks like a kernel's ``__main__``."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.cells = 0

    def run(self, source: str) -> None:
        self.cells += 1
        filename = f"/tmp/ipykernel_test/{self.cells}.py"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def export(self, name: str = "f") -> FunctionExport:
        return FunctionExport(self.names[name], f"function {name}")


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    before = set(linecache.cache)
    yield Notebook()
    for filename in set(linecache.cache) - before:
        del linecache.cache[filename]


def run_exported(export: FunctionExport, *args: Any, epoch: int = 0) -> Any:
    """What a worker would return."""
    version = export.current(epoch)
    assert version.blob is not None
    function, _ = load_function(version.blob, version.function_id)
    return function(*args)


def test_same_version_as_long_as_nothing_changes(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f(x): return x + y")
    export = notebook.export()
    first = export.current(0)
    assert export.current(0) is first
    assert export.current(1) is first
    assert run_exported(export, 2) == 3


def test_rebound_global_is_seen(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f(): return y")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("y = 2")
    assert run_exported(export) == 2


def test_equal_but_other_global_is_seen(notebook: Notebook) -> None:
    """1, 1.0 and True are equal; the function must get the one that is there."""
    notebook.run("y = 1\ndef f(): return y")
    export = notebook.export()
    run_exported(export)
    notebook.run("y = 1.0")
    assert type(run_exported(export)) is float
    notebook.run("y = True")
    assert run_exported(export) is True


def test_rebound_back_is_the_first_version_again(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f(): return y")
    export = notebook.export()
    first = export.current(0).function_id
    notebook.run("y = 2")
    assert export.current(0).function_id != first
    notebook.run("y = 1")
    assert export.current(0).function_id == first


def test_new_name_is_seen(notebook: Notebook) -> None:
    notebook.run("def f():\n    try:\n        return late\n    except NameError:\n        return 'none'")
    export = notebook.export()
    assert run_exported(export) == "none"
    notebook.run("late = 5")
    assert run_exported(export) == 5


def test_deleted_name_is_seen(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f():\n    try:\n        return y\n    except NameError:\n        return 'none'")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("del y")
    assert run_exported(export) == "none"


def test_shadowed_builtin_is_seen(notebook: Notebook) -> None:
    notebook.run("def f(): return len([1, 2])")
    export = notebook.export()
    assert run_exported(export) == 2
    notebook.run("def len(x): return 'mine'")
    assert run_exported(export) == "mine"


def test_redefined_helper_is_seen_through_helpers(notebook: Notebook) -> None:
    notebook.run("def inner(): return 1\ndef outer(): return inner()\ndef f(): return outer()")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("def inner(): return 2")
    assert run_exported(export) == 2


def test_global_of_a_nested_function_is_seen(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f():\n    def g():\n        return [y for _ in range(1)]\n    return g()")
    export = notebook.export()
    assert run_exported(export) == [1]
    notebook.run("y = 2")
    assert run_exported(export) == [2]


def test_closure_cell_is_seen(notebook: Notebook) -> None:
    notebook.run(
        "def make():\n    n = 1\n    def f(): return n\n    def put(x):\n        nonlocal n\n        n = x\n    return f, put\nf, put = make()"
    )
    export = notebook.export()
    assert run_exported(export) == 1
    notebook["put"](2)
    assert run_exported(export) == 2


def test_global_read_by_a_class_is_seen(notebook: Notebook) -> None:
    notebook.run("y = 1\nclass C:\n    @property\n    def v(self): return y\ndef f(): return C().v")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("y = 2")
    assert run_exported(export) == 2


def test_global_read_by_another_remote_function_is_seen(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef g(): return y\ndef f(): return h.__wrapped__()")
    notebook.names["h"] = remote(notebook["g"])
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("y = 2")
    assert run_exported(export) == 2


def test_global_read_through_partial_and_cache_is_seen(notebook: Notebook) -> None:
    notebook.run(
        "import functools\ny = 1\n@functools.lru_cache(maxsize=7)\ndef g(a): return a + y\n"
        "h = functools.partial(g, 1)\ndef f(): return h()"
    )
    export = notebook.export()
    assert run_exported(export) == 2
    notebook.run("y = 2")
    # The cache travels empty: a worker computes anew.
    assert run_exported(export) == 3


def test_a_cached_function_travels_with_its_limits(notebook: Notebook) -> None:
    notebook.run("import functools\n@functools.lru_cache(maxsize=7)\ndef g(a): return a\ndef f(): return g")
    cached = run_exported(notebook.export())
    assert cached.cache_parameters() == {"maxsize": 7, "typed": False}
    assert cached(3) == 3


def test_in_place_change_is_seen_in_the_next_epoch(notebook: Notebook) -> None:
    notebook.run("data = [1]\ndef f(): return sum(data)")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook.run("data.append(2)")
    assert run_exported(export, epoch=0) == 1
    assert run_exported(export, epoch=1) == 3


def test_unchanged_content_stays_the_same_version(notebook: Notebook) -> None:
    notebook.run("data = {'a': [1], 'b': {3, 1, 2}}\nclass C:\n    k = 1\ndef f(): return data, C")
    export = notebook.export()
    first = export.current(0)
    for epoch in range(1, 5):
        assert export.current(epoch) is first


def test_names_reached_through_a_changed_list_are_watched(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef g(): return y\nhelpers = []\ndef f(): return [h() for h in helpers]")
    export = notebook.export()
    assert run_exported(export) == []
    notebook.run("helpers.append(g)")
    assert run_exported(export, epoch=1) == [1]
    notebook.run("y = 2")
    assert run_exported(export, epoch=2) == [2]


def test_changed_class_is_seen_in_the_next_epoch(notebook: Notebook) -> None:
    notebook.run("class C:\n    def m(self): return 1\ndef f(): return C().m()")
    export = notebook.export()
    first = export.current(0)
    notebook.run("C.m = lambda self: 2")
    assert export.current(1).function_id != first.function_id


def test_replaced_code_is_seen_in_the_next_epoch(notebook: Notebook) -> None:
    """%autoreload gives old function objects the new code."""
    notebook.run("def g(): return 1\ndef f(): return g()\ndef new(): return 2")
    export = notebook.export()
    assert run_exported(export) == 1
    notebook["g"].__code__ = notebook["new"].__code__
    assert run_exported(export, epoch=1) == 2


def test_changed_default_is_seen_in_the_next_epoch(notebook: Notebook) -> None:
    notebook.run("def f(x=[]): return len(x)")
    export = notebook.export()
    assert run_exported(export) == 0
    notebook["f"].__defaults__[0].append(1)
    assert run_exported(export, epoch=1) == 1


def test_functions_of_modules_travel_by_name(notebook: Notebook) -> None:
    notebook.run("from json import dumps\nimport math\ndef f(): return dumps, math")
    blob = notebook.export().current(0).blob
    assert blob is not None
    assert len(blob) < 1500
    assert functions.travels_by_value(notebook["f"])
    assert not functions.travels_by_value(notebook["dumps"])
    assert not functions.travels_by_value(types.SimpleNamespace)


def test_equal_functions_have_equal_ids(notebook: Notebook) -> None:
    source = "y = 'some text'\ndef f(x, /, k=(1, 'a b')):\n    return {x, y, 'a b', 'some text'}"
    notebook.run(source)
    first = notebook.export().current(0).function_id
    other = Notebook()
    other.run(source)
    assert other.export().current(0).function_id == first


def test_ids_are_equal_in_another_process(notebook: Notebook) -> None:
    """As after a restart of the kernel, with another hash seed."""
    code = (
        "import linecache, json\nfrom nbray.api.functions import FunctionExport\n"
        "names = {'__name__': '__main__'}\n"
        'exec(compile(\'import math\\ny = {"k": [1, (2.5, None)]}\\ndef g(a): return a\\n'
        "def f(x): return [g(x), y, math.pi]', '/tmp/ipykernel_test/1.py', 'exec'), names)\n"
        "print(FunctionExport(names['f'], 'f').current(0).function_id.hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert re.fullmatch(r"[0-9a-f]{32}\n", found.pop())


def test_watching_keeps_no_large_value_alive(notebook: Notebook) -> None:
    notebook.run("import numpy as np\nbig = np.zeros(1000)\ndef f(): return big.sum()")
    export = notebook.export()
    export.current(0)
    alive = weakref.ref(notebook["big"])
    notebook.run("del big")
    gc.collect()
    assert alive() is None
    notebook.run("big = np.ones(3)")
    assert run_exported(export) == 3


def test_stale_lists_are_released(notebook: Notebook) -> None:
    class Item:
        pass

    notebook.names["data"] = [Item()]
    alive = weakref.ref(notebook["data"][0])
    notebook.run("def f(): return len(data)")
    export = notebook.export()
    export.current(0)
    notebook.run("data = []")
    functions.release_stale()
    gc.collect()
    assert alive() is None
    assert run_exported(export) == 0


def test_loaded_function_is_not_pickled_again(notebook: Notebook) -> None:
    """A task that submits its own function does so under the id by which it came."""
    notebook.run("def f(n): return n")
    version = notebook.export().current(0)
    assert version.blob is not None
    function, _ = load_function(version.blob, version.function_id)
    again = FunctionExport(function, "function f").current(0)
    assert again.function_id == version.function_id
    assert again.blob is None


def test_loaded_function_whose_globals_change_is_pickled_again(notebook: Notebook) -> None:
    notebook.run("y = 1\ndef f(): return y")
    version = notebook.export().current(0)
    assert version.blob is not None
    function, _ = load_function(version.blob, version.function_id)
    export = FunctionExport(function, "function f")
    assert export.current(0).blob is None
    function.__globals__["y"] = 2
    assert run_exported(export) == 2


def test_retry_exceptions_travel_with_the_function(notebook: Notebook) -> None:
    notebook.run("class Mine(Exception): pass\ndef f(): pass")
    version = FunctionExport(notebook["f"], "function f", (notebook["Mine"], OSError)).current(0)
    assert version.blob is not None
    assert load_function(version.blob, version.function_id)[1] == (notebook["Mine"], OSError)


def test_sources_of_cells_travel(notebook: Notebook) -> None:
    notebook.run("def helper():\n    raise ValueError('here')")
    notebook.run("def f():\n    helper()")
    version = notebook.export().current(0)
    code = (
        "import sys, traceback\nfrom nbray.api.functions import load_function\n"
        "function, _ = load_function(sys.stdin.buffer.read(), b'x')\n"
        "try:\n    function()\nexcept ValueError:\n    print(traceback.format_exc())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=version.blob, capture_output=True, check=True)
    assert b"raise ValueError('here')" in done.stdout


# -- limits and errors


def test_large_capture_warns_with_name_and_size(notebook: Notebook) -> None:
    notebook.run("import numpy as np\nhuge = np.zeros(2_000_000)\ndef f(): return huge.sum()")
    with pytest.warns(
        UserWarning, match=r"function f takes 15\.3 MB.*'huge' \(15\.3 MB\).*nbray\.put\(huge\)"
    ):
        notebook.export().current(0)


def test_unchanged_large_capture_warns_once(notebook: Notebook) -> None:
    notebook.run("import numpy as np\nhuge = np.zeros(2_000_000)\ndef f(): return huge.sum()")
    export = notebook.export()
    with pytest.warns(UserWarning, match="huge"):
        export.current(0)
    assert export.current(1) is export.current(2)


def test_too_large_capture_is_refused(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "LIMIT_BYTES", 2**20)
    notebook.run("text = 'x' * 2**21\ndef f(): return text")
    with pytest.raises(SerializationError, match=r"more than 1 MB.*'text' \(2\.0 MB\)"):
        notebook.export().current(0)


def test_unpicklable_capture_is_named(notebook: Notebook) -> None:
    notebook.run("import threading\nguard = threading.Lock()\ndef f():\n    with guard: pass")
    with pytest.raises(SerializationError) as caught:
        notebook.export().current(0)
    text = str(caught.value)
    assert "function f" in text
    assert "guard" in text
    assert "lock" in text


def test_after_the_unpicklable_is_gone_it_works(notebook: Notebook) -> None:
    notebook.run("import threading\nguard = threading.Lock()\ndef f(): return guard")
    export = notebook.export()
    with pytest.raises(SerializationError):
        export.current(0)
    notebook.run("guard = 1")
    assert run_exported(export) == 1


def test_threads_share_an_export(notebook: Notebook) -> None:
    notebook.run("y = 0\ndef f(): return y")
    export = notebook.export()
    seen: list[set[bytes]] = []
    start = threading.Barrier(8)

    def submit() -> None:
        start.wait()
        seen.append({export.current(0).function_id for _ in range(500)})

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set.union(*seen)) == 1


# -- cost


def seconds_per_check(export: FunctionExport) -> float:
    export.current(0)
    return min(timeit.repeat(lambda: export.current(0), number=2000, repeat=5)) / 2000


def test_identity_check_costs_about_a_microsecond(notebook: Notebook) -> None:
    """Against the cost of a Python call here, because machines differ: a microsecond is some 25 to 60 calls."""
    names = "\n".join(f"v{i} = {i}" for i in range(10))
    reads = " + ".join(f"v{i}" for i in range(10))
    notebook.run(f"{names}\ndef f(): return {reads} + len([])")
    call = min(timeit.repeat("f()", "def f(): pass", number=20_000, repeat=5)) / 20_000
    assert seconds_per_check(notebook.export()) < 80 * call


# -- classes that come back


def test_an_instance_that_comes_back_leaves_its_class_alone(notebook: Notebook) -> None:
    """Cloudpickle alone would give the class methods with frozen copies of the notebook's globals."""
    notebook.run("y = 1\nclass C:\n    seen = []\n    def v(self): return y")
    packed = serialization.serialize(notebook["C"]())
    notebook.run("C.seen.append(1)")
    came_back = serialization.deserialize(packed.kind, packed.flat())
    assert type(came_back) is notebook["C"]
    assert notebook["C"].seen == [1]
    notebook.run("y = 2")
    assert came_back.v() == 2


def test_a_class_of_elsewhere_is_made_and_updated(notebook: Notebook) -> None:
    code = (
        "import sys, pickle\nfrom nbray.store import serialization\n"
        "names = {'__name__': '__main__'}\nexec('class C:\\n    def v(self): return 1', names)\n"
        "first = serialization.serialize(names['C']())\nnames['C'].v = lambda self: 2\n"
        "second = serialization.serialize(names['C']())\n"
        "sys.stdout.buffer.write(pickle.dumps([(p.kind, p.flat()) for p in (first, second)]))"
    )
    pickles = pickle.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )
    first, second = (serialization.deserialize(*each) for each in pickles)
    assert type(first) is type(second)
    assert first.v() == 2
