"""Reading values: without copying, read-only, or as private copies; and how long what was read keeps its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.objects.states import await_empty, eventually, in_store, memory, objects

LARGE = 100_000


@pytest.fixture(autouse=True)
def nbray(shared_cluster: Any) -> Iterator[Any]:
    """Each test leaves nothing in the store."""
    yield shared_cluster
    await_empty()


def address(array: Any) -> int:
    return int(array.ctypes.data)


def test_small_values_lie_in_the_nodes_table_and_large_ones_in_the_arena(nbray: Any) -> None:
    small, large = nbray.put(b"x" * 1000), nbray.put(b"x" * 100_000)
    rows = eventually(lambda: len(found := objects()) == 2 and found, "both objects are listed")
    assert rows[small.hex()]["state"] == "INLINE"
    assert rows[large.hex()]["state"] == "ARENA"
    assert rows[large.hex()]["size_bytes"] >= 100_000
    assert memory()["used"] >= 100_000
    assert nbray.get([small, large]) == [b"x" * 1000, b"x" * 100_000]


def test_a_result_is_read_where_it_lies(nbray: Any) -> None:
    @nbray.remote
    def make() -> Any:
        return np.arange(LARGE)

    ref = make.remote()
    first, second = nbray.get(ref), nbray.get(ref)
    assert address(first) == address(second)
    assert in_store(address(first))
    assert not first.flags.owndata
    assert not first.flags.writeable
    np.testing.assert_array_equal(first, np.arange(LARGE))


def test_all_processes_read_the_same_memory(nbray: Any) -> None:
    value = np.arange(LARGE)
    ref = nbray.put(value)

    @nbray.remote
    def look(refs: list[Any]) -> tuple[bool, bool, bool, int]:
        found = nbray.get(refs[0])
        return in_store(address(found)), found.flags.writeable, found.flags.owndata, int(found.sum())

    assert nbray.get(look.remote([ref])) == (True, False, False, int(value.sum()))


def test_inputs_of_tasks_can_be_written_and_nobody_else_sees_it(nbray: Any) -> None:
    ref = nbray.put(np.zeros(LARGE))

    @nbray.remote
    def add(x: Any, amount: int) -> tuple[float, bool]:
        x += amount
        return float(x.sum()), in_store(address(x))

    assert nbray.get([add.remote(ref, 1), add.remote(ref, 2), add.remote(ref, 3)]) == [
        (1.0 * LARGE, False),
        (2.0 * LARGE, False),
        (3.0 * LARGE, False),
    ]
    assert nbray.get(ref).sum() == 0


def test_arguments_by_value_can_be_written(nbray: Any) -> None:
    @nbray.remote
    def add(x: Any) -> float:
        x += 1
        return float(x.sum())

    for size in (100, LARGE):
        value = np.zeros(size)
        assert nbray.get(add.remote(value)) == size
        assert value.sum() == 0


def test_a_writable_copy_is_private(nbray: Any) -> None:
    for size in (100, 3000, LARGE):
        ref = nbray.put(np.zeros(size))
        mine = nbray.get(ref, writable=True)
        mine += 5
        assert mine.sum() == 5 * size
        assert nbray.get(ref).sum() == 0
        assert nbray.get(ref, writable=True).sum() == 0


def test_arrow_tables_are_read_where_they_lie(nbray: Any) -> None:
    table = pa.table({"number": np.arange(LARGE), "text": [f"row {i}" for i in range(LARGE)]})
    for value in (table, table.to_batches()[0]):
        ref = nbray.put(value)
        found = nbray.get(ref)
        assert found.equals(value)
        column = found.column("number")
        chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        assert in_store(chunk.buffers()[1].address)
        del found, column, chunk


def test_frames_of_pandas(nbray: Any) -> None:
    frame = pd.DataFrame(
        {
            "number": np.arange(LARGE),
            "real": np.linspace(0, 1, LARGE),
            "text": [f"row {i}" for i in range(LARGE)],
            "when": pd.date_range("2026-01-01", periods=LARGE, freq="s"),
        }
    )
    ref = nbray.put(frame)
    found = nbray.get(ref)
    pd.testing.assert_frame_equal(found, frame)
    assert in_store(address(found["number"].to_numpy()))
    with pytest.raises(ValueError, match="read-only"):
        found.loc[0, "number"] = 5
    mine = nbray.get(ref, writable=True)
    mine.loc[0, "number"] = 5
    assert mine.loc[0, "number"] == 5
    assert nbray.get(ref).loc[0, "number"] == 0

    @nbray.remote
    def change(frame: Any) -> float:
        frame["number"] += 1
        frame.loc[0, "real"] = 10.0
        return float(frame["number"].sum() + frame.loc[0, "real"])

    assert nbray.get(change.remote(ref)) == np.arange(LARGE).sum() + LARGE + 10.0
    pd.testing.assert_frame_equal(nbray.get(ref), frame)


def test_a_slice_keeps_its_memory_after_ref_and_array_are_gone(nbray: Any) -> None:
    ref = nbray.put(np.arange(LARGE))
    part = nbray.get(ref)[10:20:2]
    name = ref.hex()
    del ref
    eventually(
        lambda: objects()[name]["holders"] == [f"views in driver {os.getpid()}"], "only the slice is left"
    )
    # What is put now would take the block, were it free.
    others = [nbray.put(np.full(LARGE, n)) for n in range(3)]
    assert part.tolist() == [10, 12, 14, 16, 18]
    assert name in objects()
    del part
    eventually(lambda: name not in objects(), "the object is freed with its last view")
    assert [int(nbray.get(other)[0]) for other in others] == [0, 1, 2]


def test_a_view_of_an_arrow_column_keeps_its_memory(nbray: Any) -> None:
    ref = nbray.put(pa.table({"number": np.arange(LARGE)}))
    column = nbray.get(ref)["number"].chunk(0)[5:8]
    del ref
    others = [nbray.put(np.full(LARGE, n)) for n in range(3)]
    assert column.to_pylist() == [5, 6, 7]
    del column, others


def test_a_pin_ends_with_the_last_view_while_the_ref_is_held(nbray: Any) -> None:
    ref = nbray.put(np.arange(LARGE))
    views = [nbray.get(ref) for _ in range(10)]
    me = f"driver {os.getpid()}"
    assert objects()[ref.hex()]["holders"] == [me, f"views in {me}"]
    del views[3:]
    views.clear()
    eventually(lambda: objects()[ref.hex()]["holders"] == [me], "nothing pins it")
    assert int(nbray.get(ref)[7]) == 7


def test_what_an_actor_keeps_of_its_arguments_stays(nbray: Any) -> None:
    @nbray.remote
    class Keeper:
        def keep(self, array: Any) -> None:
            self.part = array[:5]

        def look(self) -> list[int]:
            return self.part.tolist()

        def drop(self) -> None:
            del self.part

    keeper = Keeper.remote()
    nbray.get(keeper.keep.remote(nbray.put(np.arange(LARGE))))
    others = [nbray.put(np.full(LARGE, n)) for n in range(3)]
    assert nbray.get(keeper.look.remote()) == [0, 1, 2, 3, 4]
    nbray.get(keeper.drop.remote())
    del others, keeper


def test_writing_into_a_read_only_result_says_whose_it_is_and_what_to_do(nbray: Any) -> None:
    ref = nbray.put(np.arange(LARGE))
    name = repr(ref)

    @nbray.remote
    def write(refs: list[Any]) -> None:
        shared = nbray.get(refs[0])
        shared[0] = 1

    with pytest.raises(ValueError, match="read-only") as caught:
        nbray.get(write.remote([ref]))
    text = str(caught.value)
    assert name in text
    assert "shared.copy()" in text
    assert "writable=True" in text


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("box.array[0] = 1", "box.array"),
        ("held['key'] += 1", "held['key']"),
        ("np.add(part, 1, out=part)", "part"),
        ("frame.loc[0, 'a'] = 5", "frame"),
        ("part.sort()", "part"),
    ],
)
def test_the_note_names_what_the_statement_writes_to(nbray: Any, line: str, name: str, tmp_path: Any) -> None:
    from nbray.api import readonly

    ref = nbray.put(pd.DataFrame({"a": np.arange(LARGE)}) if name == "frame" else np.arange(LARGE))
    value = nbray.get(ref)
    other = nbray.get(nbray.put(np.zeros(LARGE)))
    space = {"np": np, "frame": value, "other": other, "part": value[5:] if name == "part" else None}
    space |= {"box": type("Box", (), {})(), "held": {"key": value}}
    space["box"].array = value
    file = tmp_path / "program.py"
    file.write_text(line)
    with pytest.raises(ValueError, match="read-only") as caught:
        exec(compile(line, str(file), "exec"), space)
    readonly.explain(caught.value)
    assert caught.value.__notes__[0].startswith(f"{name} is a read-only view of {ref!r}: ")
    del caught, space, value, other


def test_small_arrays_are_explained_too(nbray: Any) -> None:
    @nbray.remote
    def write(refs: list[Any]) -> None:
        small = nbray.get(refs[0])
        small[0] = 1

    with pytest.raises(ValueError, match="read-only") as caught:
        nbray.get(write.remote([nbray.put(np.arange(10))]))
    assert "small is read-only, as all values from nbray.get are" in str(caught.value)
    assert "small = small.copy()" in str(caught.value)


def test_errors_about_other_arrays_get_no_note(nbray: Any) -> None:
    from nbray.api import readonly

    shared = nbray.get(nbray.put(np.arange(LARGE)))
    constant = np.arange(3)
    constant.flags.writeable = False
    with pytest.raises(ValueError, match="read-only") as caught:
        constant[0] = 1
    readonly.explain(caught.value)
    assert not hasattr(caught.value, "__notes__")
    del caught, shared


def test_a_script_that_ends_with_such_an_error_explains_it(runtime_dir: Any, tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import nbray, numpy as np\n"
        "nbray.init(num_cpus=1, name='script')\n"
        "ref = nbray.put(np.arange(100_000))\n"
        "result = nbray.get(ref)\n"
        "result[0] = 1\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "result is a read-only view of ObjectRef(" in done.stderr
    assert "result = result.copy()" in done.stderr


def test_a_cell_that_writes_into_a_shared_array_explains_it(runtime_dir: Any, tmp_path: Any) -> None:
    cells = (
        "import nbray, numpy as np\n"
        "nbray.init(num_cpus=1, name='cell')\n"
        "result = nbray.get(nbray.put(np.arange(100_000)))\n"
        "get_ipython().run_cell('result[0] = 1')\n"
        "nbray.shutdown()\n"
    )
    file = tmp_path / "cells.ipy"
    file.write_text(cells)
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "result is a read-only view of ObjectRef(" in done.stdout + done.stderr
    assert "result = result.copy()" in done.stdout + done.stderr
