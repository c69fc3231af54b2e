"""Large values of a notebook go to the store once: which are sent, which are found there, and that a change is never missed."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nbray import platform
from nbray.api import context
from nbray.api.remote import RemoteFunction
from nbray.notebook import stored, transfer
from nbray.notebook.cell import Prepared, prepare, returned
from nbray.notebook.runner import run_cell
from nbray.notebook.stored import Inputs, of_this_process

MB = 1 << 20


@pytest.fixture(autouse=True)
def _here(shared_cluster: Any) -> Iterator[None]:
    yield
    store = of_this_process()
    assert store is not None
    store.forget()


class Cells:
    """Cells of a namespace, run on the cluster."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self._run: RemoteFunction[Any, Any] = RemoteFunction(run_cell, {})

    def local(self, source: str) -> None:
        exec(source, self.names)

    def __call__(self, source: str) -> Any:
        self.last = self.prepare(source)
        ref = self._run.remote(self.last.task, *self.last.stored)
        result = context.require().engine.get([ref], 60, writable=True)[0]
        del ref
        back = returned(result, self.names)
        self.changed = back.changed
        self.names.update(back.values)
        return back.value

    def prepare(self, source: str) -> Prepared:
        prepared = prepare(source, "Cell", self.names, carried=transfer.carried_types(), apart=True)
        prepared.settle()
        return prepared

    @property
    def inputs(self) -> Inputs:
        return self.last.inputs


def kept() -> int:
    store = of_this_process()
    assert store is not None
    store.sweep()
    return store.size


def test_a_large_array_is_put_once_and_again_when_it_changed() -> None:
    cell = Cells()
    cell.names["x"] = x = np.ones(16 * MB // 8)
    assert cell("float(x.sum())") == len(x)
    assert (cell.inputs.stored, cell.inputs.reused, cell.inputs.compared) == (x.nbytes, 0, 0)
    assert cell("float(x[:5].sum())") == 5
    assert (cell.inputs.stored, cell.inputs.reused, cell.inputs.compared) == (0, x.nbytes, x.nbytes)
    x[-1] = 3
    assert cell("float(x[-1])") == 3
    assert (cell.inputs.stored, cell.inputs.reused) == (x.nbytes, 0)
    assert kept() == x.nbytes


def test_the_cell_may_write_into_what_it_was_given() -> None:
    cell = Cells()
    cell.names["x"] = np.zeros(16 * MB // 8)
    for _ in range(2):
        assert cell("x += 1; x.sort(); y = float(x[0]); del x\ny") == 1
        cell.names["x"] = np.zeros(16 * MB // 8) if "x" not in cell.names else cell.names["x"]
    assert cell("float(x[0])") == 0


def test_small_ones_are_simply_sent() -> None:
    cell = Cells()
    cell.names.update(x=np.ones(3 * MB // 8), y=np.ones(4 * MB // 8))
    cell("x[0] + y[0]")
    assert (cell.inputs.stored, cell.inputs.compared, len(cell.last.stored)) == (0, 0, 0)
    assert kept() == 0
    assert "7.0 MB" in cell.inputs.words()


def test_the_memory_is_released_with_the_variable() -> None:
    cell = Cells()
    cell.names.update(x=np.ones(16 * MB // 8), text="y" * (2 * MB), raw=bytes(2 * MB))
    cell("x[0], text[0], raw[0]")
    assert kept() == 20 * MB
    del cell.names["text"], cell.names["raw"]
    cell.last = None  # type: ignore[assignment]
    gc.disable()
    try:
        assert kept() == 16 * MB
        cell.names["x"] = 1
        assert kept() == 0
    finally:
        gc.enable()


def test_at_most_a_budget_is_kept() -> None:
    cell = Cells()
    store = of_this_process()
    assert store is not None
    kept_budget, store._budget = store._budget, 40 * MB
    try:
        for index in range(4):
            cell.names[f"x{index}"] = np.full(16 * MB // 8, index)
            assert cell(f"int(x{index}[0])") == index
        assert kept() == 32 * MB
        cell.names["big"] = np.ones(48 * MB // 8)
        assert cell("int(big[-1])") == 1
        assert kept() <= 40 * MB
    finally:
        store._budget = kept_budget


def test_arrow_tables_are_never_compared() -> None:
    cell = Cells()
    cell.names["t"] = pa.table({"a": np.arange(2 * MB), "b": pa.array(["x"] * (2 * MB))})
    assert cell("t.num_rows") == 2 * MB
    first = cell.inputs
    assert (first.compared, first.seconds) == (0, 0.0)
    assert first.stored > 16 * MB
    assert cell("(t['a'][7].as_py(), t['b'][0].as_py())") == (7, "x")
    assert (cell.inputs.stored, cell.inputs.compared) == (0, 0)
    assert cell.inputs.reused == first.stored
    cell.names["part"] = cell.names["t"].slice(5, 10)
    cell("part.num_rows")
    assert cell.inputs.size < MB


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_frames_by_their_blocks() -> None:
    cell = Cells()
    cell.names["df"] = df = pd.DataFrame(
        {"a": np.arange(MB), "b": np.ones(MB), "s": pd.Series(["text"] * MB), "c": np.zeros(MB)}
    )
    assert cell("int(df.a.sum()), df.s[3]") == (int(df.a.sum()), "text")
    assert cell.inputs.stored > 24 * MB
    assert cell("float(df.b.sum())") == MB
    assert cell.inputs.stored == 0
    assert cell.inputs.compared == 24 * MB
    df.loc[5, "b"] = 7.0
    assert cell("float(df.b[5]), int(df.a[5])") == (7.0, 5)
    assert 0 < cell.inputs.stored <= 16 * MB
    assert cell("df['z'] = df.a * 2; df.sort_values('a', ascending=False, inplace=True); df = df\nint(df.z.iloc[0])") == 2 * (MB - 1)  # fmt: skip
    assert list(cell.names["df"].columns) == ["a", "b", "s", "c", "z"]


def test_what_came_from_the_cluster_is_not_even_compared() -> None:
    cell = Cells()
    cell("import numpy as np\nx = np.arange(4_000_000)\nsmall = 1")
    x = cell.names["x"]
    assert cell("int(x[-1])") == 3_999_999
    assert (cell.inputs.stored, cell.inputs.reused, cell.inputs.compared) == (0, x.nbytes, 0)
    x[12345] = -1
    assert cell("int(x[12345])") == -1
    assert cell.inputs.stored == x.nbytes
    assert cell("int(x[12345]), int(x[-1])") == (-1, 3_999_999)
    assert (cell.inputs.stored, cell.inputs.reused) == (0, x.nbytes)


def test_views_from_get(shared_cluster: Any) -> None:
    cell = Cells()
    ref = shared_cluster.put(np.arange(4_000_000))
    cell.names["x"] = shared_cluster.get(ref)
    cell.names["part"] = cell.names["x"][1_000_000:3_000_000]
    assert cell("x[0] = 5; part += 1\nint(x[0]), int(part[0]), int(x[1_000_000])") == (
        5,
        1_000_001,
        1_000_000,
    )
    assert (cell.inputs.stored, cell.inputs.compared) == (0, 0)
    assert cell.inputs.reused == 48_000_000
    assert len(cell.last.stored) == 1
    del ref
    gc.collect()
    # Nobody holds the object: a copy is made once.
    assert cell("int(x[-1])") == 3_999_999
    assert cell("int(x[-2])") == 3_999_998
    assert (cell.inputs.stored, cell.inputs.compared) == (0, 0)


def test_lists_of_arrays_and_strided_ones() -> None:
    cell = Cells()
    whole = np.arange(4 * MB).reshape(2048, 2048)
    cell.names.update(parts={"a": [whole[:1024], whole[1024:]]}, every=whole[:, ::2])
    assert cell("int(parts['a'][1][0, 0]), int(every[0, 1])") == (2 * MB, 2)
    assert cell.inputs.stored == 48 * MB
    assert cell("int(every[1, 1])") == 2050
    assert cell.inputs.stored == 0
    whole[1, 2] = -5
    assert cell("int(every[1, 1]), int(parts['a'][0][1, 2])") == (-5, -5)
    assert cell.inputs.stored == 32 * MB


def test_two_names_for_one_stored_object_stay_one() -> None:
    cell = Cells()
    x = np.ones(2 * MB)
    table = pa.table({"a": x})
    cell.names.update(x=x, y=x, d={"x": x}, t=table, u=[table], view=x[:])
    assert cell("x is y, d['x'] is x, u[0] is t") == (True, True, True)
    assert cell("x[0] = 9\nfloat(view[0]), float(y[0])") == (1.0, 9.0)


def test_other_memory_at_the_same_place_is_not_mistaken() -> None:
    cell = Cells()
    for value in range(5):
        cell.names["x"] = np.full(16 * MB // 8, value)
        assert cell("int(x[0]), int(x[-1])") == (value, value)
        del cell.names["x"]


def test_a_value_that_was_freed_is_put_again() -> None:
    cell = Cells()
    cell.names["x"] = np.ones(16 * MB // 8)
    cell("x[0]")
    context.require().engine.free(list(cell.last.stored))
    assert cell("float(x[0])") == 1
    assert cell.inputs.stored == 16 * MB


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (Inputs(size=1000), ""),
        (Inputs(size=1200 * MB, reused=1200 * MB, compared=1200 * MB, seconds=0.09), "in 1.2 GB (reused; looking for changes took 0.09 s)"),
        (Inputs(size=20 * MB, stored=20 * MB), "in 20.0 MB"),
        (Inputs(size=20 * MB, reused=10 * MB, seconds=0.001), "in 20.0 MB (10.0 MB of them reused)"),
    ],
)  # fmt: skip
def test_words_for_the_end_of_a_cell(inputs: Inputs, words: str) -> None:
    assert inputs.words() == words


@pytest.mark.skipif(not platform.LINUX, reason="the page table is Linux's")
def test_the_page_table_says_what_was_written() -> None:
    fd = platform.shared_file(64 * platform.mmap.PAGESIZE)
    os.pwrite(fd, b"x" * (64 * platform.mmap.PAGESIZE), 0)
    page = platform.mmap.PAGESIZE
    address = platform.map_private(fd, 0, 64 * page)
    import ctypes

    try:
        array = np.ctypeslib.as_array((ctypes.c_ubyte * (64 * page)).from_address(address))
        assert int(array.sum()) == 64 * page * ord("x")
        if platform.unwritten(address, 64 * page) is None:
            pytest.skip("this system does not tell")
        assert platform.unwritten(address, 64 * page) is True
        array[10 * page + 5] = 1
        assert platform.unwritten(address, 64 * page) is False
        assert platform.unwritten(address + 11 * page, 20 * page) is True
        assert platform.unwritten(address + 9 * page, page + 1) is False
    finally:
        platform.unmap(address, 64 * page)
        os.close(fd)


def test_comparing_works_without_a_page_table(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: Callable[[int, int], None] = lambda address, length: None  # noqa: E731
    monkeypatch.setattr(platform, "unwritten", unknown)
    cell = Cells()
    cell("import numpy as np\nx = np.arange(4_000_000)\nsmall = 1")
    assert cell("int(x[-1])") == 3_999_999
    assert (cell.inputs.stored, cell.inputs.compared) == (0, 32_000_000)
    cell.names["x"][0] = 4
    assert cell("int(x[0])") == 4


def test_arrays_in_the_store_are_watched_without_a_copy() -> None:
    cell = Cells()
    cell.names.update(x=np.zeros(120_000), y=np.zeros(120_000), z=np.zeros((300, 300), order="F"))
    cell("x[5] = 1; y.sum(); z.T[0, 0]")
    assert cell.changed == ["x"]
    cell("x += 0; y[:] = y; z[3, 3] = 1; z.shape")
    assert cell.changed == ["z"]
    cell("y.shape = (120, 1000)")
    assert cell.changed == ["y"]


@pytest.mark.parametrize("seed", range(4))
def test_no_change_is_missed_whatever_happens(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Arrays, views, frames, results and tables, changed, replaced and deleted at random between cells: the cell sees what is here."""
    for module in (stored, transfer):
        monkeypatch.setattr(module, "APART", 8192)
    monkeypatch.setattr(stored, "COMPARED", 30_000)
    store = of_this_process()
    assert store is not None
    monkeypatch.setattr(store, "_budget", 400_000)
    draw = random.Random(seed)
    cell = Cells()
    names = cell.names
    cell.local(DIGEST)
    reused = 0
    for step in range(40):
        name = draw.choice("abcdef")
        value = names.get(name)
        kind = draw.randrange(9)
        if kind <= 1 or value is None:
            count = draw.choice([500, 2000, 6000, 20_000])
            names[name] = np.arange(step, step + count, dtype=draw.choice(["f8", "i4", "u1"])).copy()
        elif kind == 2 and isinstance(value, np.ndarray) and value.flags.writeable:
            value[draw.randrange(len(value))] = draw.randrange(100)
        elif kind == 3 and isinstance(value, np.ndarray):
            names[draw.choice("abcdef")] = value[draw.randrange(100) :: draw.choice([1, 1, 2])]
        elif kind == 4:
            names[name] = pd.DataFrame({"x": np.arange(3000.0) + step, "s": [f"row {step}"] * 3000})
        elif kind == 5 and isinstance(value, pd.DataFrame):
            value.loc[draw.randrange(3000), "x"] = -step
        elif kind == 6:
            names[name] = pa.table({"x": np.arange(4000) + step})
        elif kind == 7:
            # A result of the cluster, that may be changed here afterwards.
            cell(f"import numpy as np\n{name} = np.arange(30_000) + {step}; small = 1")
        else:
            del names[name]
        here = names["digest"]({each: names[each] for each in "abcdef" if each in names})
        there = cell(_looks(names))
        assert there == here
        reused += cell.inputs.reused
        assert kept() <= 400_000
    assert reused > 0


DIGEST = """
import hashlib
def digest(values):
    import numpy as np, pandas as pd, pyarrow as pa
    found = {}
    for name, value in sorted(values.items()):
        if isinstance(value, pa.Table):
            value = value.to_pandas()
        if isinstance(value, pd.DataFrame):
            found[name] = hashlib.sha1(value.to_csv().encode()).hexdigest()
        elif value is not None:
            found[name] = (value.dtype.str, value.shape, hashlib.sha1(np.ascontiguousarray(value).tobytes()).hexdigest())
    return found
"""


def _looks(names: dict[str, Any]) -> str:
    """A cell that reads every one of the names that there is."""
    return "digest({" + ", ".join(f"{each!r}: {each}" for each in "abcdef" if each in names) + "})"
