"""Inputs that a cell has changed without binding them are named; what it has only read is not."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nbray.notebook import changes
from nbray.notebook.cell import changed_note
from nbray.notebook.runner import CellError
from tests.notebook.test_cells import Notebook, Worker

SETUP = """
import collections, datetime, logging, random, re
import numpy as np, pandas as pd, pyarrow as pa
from dataclasses import dataclass, field
from functools import cached_property
@dataclass
class Model:
    weights: list = field(default_factory=list)
    scale: float = 1.0
    def fit(self, x): self.weights.append(x); return self
    def predict(self, x): return x * self.scale
class Lazy:
    def __init__(self): self.base = [1, 2]
    @cached_property
    def total(self): return sum(self.base)
lazy = Lazy(); grouped = pd.DataFrame({'a': [1, 1, 2], 'b': [1, 2, 3]}).groupby('a')
numbers = [1, 2.5, float('nan')]; nested = [[1], {'a': [2]}]; settings = {'a': 1, 'b': {'c': [1]}}; flat = {'a': 1}
tags = {'x', 'y', 'z'}; queue = collections.deque([1]); counter = collections.Counter('ab'); raw = bytearray(b'abc')
x = np.arange(1000.); objects = np.array([[1], None], dtype=object); df = pd.DataFrame({'a': [1, 2], 's': ['x', 'y'], 'o': [[1], [2]]})
df['later'] = 1.5; df['more'] = 2; series = pd.Series([1.0, None]); table = pa.table({'a': [1]})
model = Model(); rng = random.Random(1); generator = np.random.default_rng(1); pair = ([1], 2); plain = (1, 'x'); log = logging.getLogger('mine')
when = datetime.datetime(2020, 1, 1); pattern = re.compile('x'); word = 'text'; cache = {}
def remember(n): cache[n] = n; return n
def look(): return len(settings)
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


@pytest.fixture
def nb(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    notebook = Notebook(worker)
    monkeypatch.setitem(sys.modules, "__main__", notebook.module)
    notebook.cell(SETUP)
    return notebook


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        ("numbers.append(1)", "numbers"),
        ("numbers[0] = 5", "numbers"),
        ("nested[1]['a'].append(1)", "nested"),
        ("settings['b']['c'].clear()", "settings"),
        ("flat['z'] = 1; del flat['z']; flat['a'] = flat.pop('a')", ""),
        ("flat.update(b=2)", "flat"),
        ("tags.add('w')", "tags"),
        ("queue.rotate(); queue.append(2); counter['c'] += 1", "counter queue"),
        ("raw[0] = 1", "raw"),
        ("x[5] = -1", "x"),
        ("x.sort(); x += 0", ""),
        ("objects[0].append(1)", "objects"),
        ("df.loc[0, 'a'] = 9", "df"),
        ("df['new'] = 1", "df"),
        ("df.columns = list('abcde')", "df"),
        ("series[0] = 7", "series"),
        ("model.fit(1)", "model"),
        ("rng.random()", "rng"),
        ("generator.normal()", "generator"),
        ("pair[0].append(1)", "pair"),
        ("remember(5)", "cache"),
        ("numbers.append(2); numbers = numbers", ""),
        ("numbers += [2]", ""),
        ("y = numbers; y.append(1)", "numbers"),
        ("model.fit(1); model", "model"),
        # only looked at
        ("(numbers, nested, settings, flat, tags, queue, counter, raw, x, objects, series, pair, plain, when, pattern, word)", ""),
        ("a = df.describe(), df.groupby('a').sum(numeric_only=True), df.values, df.sort_values('s'), df['a'] + 1, df.T, df.to_string(); del a", ""),
        ("lazy.total; grouped.sum(); grouped.groups; grouped['b'].mean()", ""),
        ("lazy.total; lazy.base.append(1)", "lazy"),
        ("model.predict(2); look(); table.num_rows; log.warning('x'); sorted(tags); x.sum(); series.mean()", ""),
    ],
)  # fmt: skip
def test_what_a_cell_changes_without_binding_it(nb: Notebook, cell: str, changed: str) -> None:
    assert sorted(nb.run(cell).changed) == changed.split()


def test_also_when_the_cell_fails(nb: Notebook) -> None:
    with pytest.raises(CellError) as caught:
        nb.run("numbers.append(1); nothing")
    assert caught.value.result.changed == ["numbers"]


def test_large_values_are_not_looked_at(nb: Notebook) -> None:
    nb.cell("big = list(range(400_000)); wide = np.zeros(200_000); almost = np.zeros(130_000)")
    assert nb.run("big.append(1); wide[0] = 1; almost[0] = 1").changed == ["almost"]


def test_hostile_values_do_no_harm(nb: Notebook) -> None:
    nb.cell(
        "class Odd:\n"
        "  def __eq__(self, other): raise ValueError\n"
        "  def __reduce__(self): calls.append(1); return (Odd, ())\n"
        "  __hash__ = None\n"
        "calls = []; odd = Odd(); odds = [odd, 1]"
    )
    back = nb.run("odds.append(2); kept = len(odds)", out=("kept",))
    assert back.values == {"kept": 3}
    assert "odds" in back.changed


def test_pickling_is_bounded() -> None:
    dumped: list[str] = []

    def dump(value: Any) -> bytes:
        dumped.append(value.name)
        return bytes(changes.PICKLED // 2)

    values = {name: types.SimpleNamespace(name=name) for name in "abcd"}
    watch = changes.Watch(values, values, dump)
    assert dumped == ["a", "b"]
    assert watch.changed(values) == []


def test_types_that_cannot_change() -> None:
    fixed = [1, "x", (1, 2), frozenset("a"), len, changes, np.float64(1), np.dtype("i4"), range(3), None]
    assert not any(map(changes.may_change, fixed))
    assert all(map(changes.may_change, [[], {}, set(), ([],), np.zeros(1), types.SimpleNamespace()]))


def test_the_words() -> None:
    assert changed_note(["a"]) == "a changed on the cluster only: bind it in the cell (a = a) or return it"
    assert changed_note(["a", "b"]).startswith(
        "a, b changed on the cluster only: bind them in the cell (a = a)"
    )


def test_importing_it_is_light() -> None:
    code = "import sys; import nbray.notebook.changes; print('numpy' in sys.modules, 'pandas' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )
