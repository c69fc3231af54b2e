"""A cell sent away does to the notebook's names what it would have done here: programs that were drawn, and some that were written."""

from __future__ import annotations

import random
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nbray.notebook.cell import prepare, returned
from nbray.notebook.runner import CellError, execute
from tests.notebook.test_cells import Notebook, Worker

NAMES = ("a", "b", "c", "d", "f")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


def _program(draw: random.Random, depth: int = 0, function: bool = False) -> list[str]:
    return [
        line
        for _ in range(draw.randint(1, 4 if depth == 0 else 2))
        for line in _statement(draw, depth, function)
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _expression(draw: random.Random, depth: int = 0) -> str:
    name = draw.choice(NAMES)
    simple = [name, name, str(draw.randint(0, 3)), "(1, 2)", f"str({name})"]
    if depth > 1:
        return draw.choice(simple)
    inner = _expression(draw, depth + 1)
    return draw.choice(
        [
            *simple,
            f"({inner}, {name})",
            f"({name} if {inner} else {draw.choice(NAMES)})",
            f"({name} and {inner})",
            f"({name} := {inner})",
            f"[{name} for {draw.choice(NAMES)} in ({inner}, 1)]",
            f"[{draw.choice(NAMES)} for {name} in (1, 2) if {inner}]",
            f"[({name} := q) for q in (1, {inner})]",
            f"{{q: {name} for q in ({inner},)}}",
            f"(lambda {name}: ({name}, {draw.choice(NAMES)}))({inner})",
            f"(lambda q={inner}: (q, {name}))()",
            f"f'{{{name}}} {{{inner}!r}}'",
            f"callable({name})",
        ]
    )


def _statement(draw: random.Random, depth: int, function: bool) -> list[str]:
    name, other = draw.choice(NAMES), draw.choice(NAMES)
    value = _expression(draw)
    kinds = ["assign", "assign", "augment", "delete", "tuple", "expression", "annotated", "import"]
    if depth < 2:
        kinds += ["if", "for", "while", "try", "with", "def", "class", "match", "finally"]
    kind = draw.choice(kinds)
    body = _program(draw, depth + 1, function) if depth < 2 else []
    more = _program(draw, depth + 1, function) if depth < 2 else []
    if kind == "assign":
        return [f"{name} = {value}"]
    if kind == "augment":
        return [f"{name} += {draw.choice(['1', '(3,)', repr('x')])}"]
    if kind == "delete":
        return [f"del {name}"]
    if kind == "tuple":
        return [f"{name}, *{other} = {value}, 1" if name != other else f"{name} = {value}"]
    if kind == "annotated":
        return [f"{name}: int = {value}"]
    if kind == "import":
        return [draw.choice([f"import math as {name}", f"from string import digits as {name}"])]
    if kind == "if":
        return [f"if {value}:", *_indented(body), "else:", *_indented(more)]
    if kind == "for":
        end = draw.choice([[], ["else:", *_indented(more)]])
        stop = draw.choice([[], ["    if " + _expression(draw) + ": break"], ["    continue"]])
        return [f"for {name} in (1, 2)[:{draw.randint(0, 2)}]:", *_indented(body), *stop, *end]
    if kind == "while":
        return ["while True:", *_indented(body), "    break"]
    if kind == "try":
        caught = draw.choice(["NameError", "TypeError", "Exception"])
        return ["try:", *_indented(body), f"except {caught} as {other}:", *_indented(more)]
    if kind == "finally":
        return ["try:", *_indented(body), "finally:", *_indented(more)]
    if kind == "with":
        return [f"with __import__('contextlib').suppress(Exception) as {name}:", *_indented(body)]
    if kind == "match":
        return [f"match {value}:", "    case (1, *rest):", *_indented(_indented(body)), f"    case {name}:", *_indented(_indented(more))]  # fmt: skip
    if kind == "class":
        return [f"class {name}:", *_indented(body), f"{other} = getattr({name}, {other!r}, 0)"]
    if kind == "def":
        shared = [] if function else draw.choice([[], [f"    global {other}"]])
        inner = _program(draw, depth + 1, True)
        return [f"def {name}():", *shared, *_indented(inner), "    return 1", f"{draw.choice(['', f'{other} = '])}{name}()"]  # fmt: skip
    return [value]


def _picture(value: Any, depth: int = 0) -> str:
    """What a value is, whatever process it is in."""
    if isinstance(value, types.FunctionType | types.ModuleType | type):
        return f"<{type(value).__name__} {value.__name__}>"
    if isinstance(value, BaseException):
        return f"<{type(value).__name__} {value.args}>"
    if isinstance(value, tuple | list) and depth < 5:
        return f"{type(value).__name__}({', '.join(_picture(each, depth + 1) for each in value)})"
    if isinstance(value, dict) and depth < 5:
        return ", ".join(
            f"{_picture(key, depth + 1)}: {_picture(each, depth + 1)}" for key, each in value.items()
        )
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _pictures(names: dict[str, Any]) -> dict[str, str]:
    return {
        name: _picture(value)
        for name, value in names.items()
        if not (name.startswith("__") and name.endswith("__")) and name != "rest"
    }


def _start(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    names = types.ModuleType("__main__").__dict__
    choices = ["1", "'text'", "(1, 'x')", "2.5", "None"]
    for name in NAMES[:4]:
        if draw.random() < 0.7:
            exec(f"{name} = {draw.choice(choices)}", names)
    if draw.random() < 0.5:
        exec("def f(): return (a, b)", names)
    return names


def _here(source: str, names: dict[str, Any]) -> str:
    try:
        exec(compile(source, "Cell", "exec"), names)
    except Exception as error:
        return _text(f"{type(error).__name__}: {error}")
    return ""


def _text(error: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", error)


def _there(source: str, names: dict[str, Any]) -> str:
    error = ""
    try:
        back = returned(execute(prepare(source, "Cell", names, display=False).task), names)
    except CellError as failed:
        back = returned(failed.result, names)
        error = _text(str(failed))
    names.update(back.values)
    for name in back.deleted:
        names.pop(name, None)
    assert not back.notes
    return error


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)
@given(st.integers(0, 1 << 40))
def test_a_drawn_cell(seed: int) -> None:
    source = "\n".join(_program(random.Random(seed)))
    try:
        compile(source, "Cell", "exec")
    except SyntaxError:
        assume(False)
    here, there = _start(seed), _start(seed)
    assert (_there(source, there), _pictures(there)) == (_here(source, here), _pictures(here)), source


PROGRAMS = {
    "augmented, in every form": (
        "import numpy as np\nn = 1; l = [1]; s = 'a'; t = (1,); x = np.arange(4.); d = {'k': [1]}; st = {1}",
        "n += 1; l += [2]; s *= 2; t += (2,); x *= 2; d['k'] += [2]; d = d; st |= {2}; x[1:] -= 1",
    ),
    "frames in place": (
        "import pandas as pd\ndf = pd.DataFrame({'a': [3, 1, None], 'b': ['x', 'y', 'z']}); ser = pd.Series([1, None])",
        "df.sort_values('a', inplace=True); df['c'] = df['a'] * 2; df.loc[df['a'] > 1, 'b'] = 'big'; df = df\nser.fillna(0, inplace=True); ser = ser",
    ),
    "arrays in place, small, large, in Fortran order, read-only": (
        "import numpy as np\na = np.zeros(3); b = np.zeros(100_000); c = np.asfortranarray(np.ones((300, 300))); d = np.zeros(5000); d.flags.writeable = False",
        "a += 1; b += 1; c[0] = 5; a = a; c = c; e = d + 1",
    ),
    "structured, dates, bytes, masked": (
        "import numpy as np\nr = np.zeros(3, dtype=[('x', 'f8'), ('y', 'i4')]); t = np.array(['2020-01-01'], 'M8[D]'); m = np.ma.array([1, 2], mask=[0, 1])",
        "r['x'] += 1; t += 1; m += 1; r = r; q = memoryview(b'abc').tobytes()",
    ),
    "arrow": (
        "import pyarrow as pa\nt = pa.table({'a': [1, 2], 'b': ['x', None]})",
        "t = t.append_column('c', pa.array([1, 2])); n = t.num_rows; first = t.slice(1)",
    ),
    "two names for one object": (
        "a = [1]; b = a; c = {'a': a}; d = (a, a)",
        "b.append(2); same = (a is b, c['a'] is b, d[0] is d[1]); a = a; b = b; c = c; d = d",
    ),
    "cycles": ("a = []; a.append(a); b = {}; b['b'] = b", "ok = (a[0] is a, b['b'] is b); a = a; b = b"),
    "functions that call one another": (
        "base = 10\ndef even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\ndef shift(n): return n + base",
        "base = 20\nresult = (even(10), odd(7), shift(1), list(map(shift, range(2))))",
    ),
    "closures and defaults": (
        "def make(k):\n  total = 0\n  def add(x, by=[1]):\n    nonlocal total\n    total += x * k\n    return total\n  return add\nadd = make(3)",
        "r = [add(1), add(2)]; again = make(2); r.append(again(5))",
    ),
    "classes, inheritance, properties": (
        "class A:\n  count = 0\n  def __init__(self): type(self).count += 1; self.x = 1\n  @property\n  def double(self): return self.x * 2\nclass B(A):\n  def __init__(self): super().__init__(); self.y = 2\nb = B()",
        "b.x += 5; r = (b.double, isinstance(b, A), B().y); b = b",
    ),
    "properties that are computed once": (
        "from functools import cached_property\nclass A:\n  calls = 0\n  def __init__(self): self.x = 3\n  @cached_property\n  def square(self):\n    type(self).calls += 1\n    return self.x ** 2\na = A()",
        "r = (a.square, a.square, A.calls, A().square, A.calls); a = a",
    ),
    "dataclasses, enums, named tuples": (
        "from dataclasses import dataclass, replace\nfrom enum import Enum\nfrom collections import namedtuple, Counter, defaultdict\n@dataclass(frozen=True)\nclass P:\n  x: int = 1\nclass C(Enum):\n  RED = 1\nT = namedtuple('T', 'a b')\np = P(); c = C.RED; t = T(1, 2); k = Counter('aab'); dd = defaultdict(list)",
        "q = replace(p, x=2); ok = (c is C.RED, T(*t) == t, k.most_common(1)); dd['z'].append(1); dd = dd; k['b'] += 1; k = k",
    ),
    "comprehensions have names of their own": (
        "x = 5; rows = [[1, 2], [3]]",
        "flat = [x for row in rows for x in row]; s = {x for x in flat}; g = sum(x for x in flat); keep = x; w = [y := x, y]",
    ),
    "imports of every kind": (
        "import os.path\nimport numpy.linalg as la",
        "import json, xml.etree.ElementTree as ET\nfrom math import floor as fl\nfrom collections import OrderedDict as OD\nr = (json.dumps([1]), fl(2.5), os.path.join('a', 'b'), float(la.norm([3, 4])), ET.__name__)\ndel json",
    ),
    "global in a function": (
        "total = 0\ndef add(n):\n  global total, last\n  total += n\n  last = n",
        "for i in range(3): add(i)\ndef reset():\n  global last\n  del last\nreset()",
    ),
    "generators consumed in the cell": (
        "data = [3, 1, 2]",
        "gen = (n * k for n in data for k in data)\nr = sorted(gen); del gen\nit = 5",
    ),
    "exceptions": (
        "class Mine(Exception):\n  def __init__(self, a, b): super().__init__(a); self.b = b",
        "try:\n  raise Mine(1, 2)\nexcept Mine as e:\n  kept = (e.args, e.b)\nfinally:\n  done = True",
    ),
    "decorators and partials": (
        "import functools\ndef twice(f):\n  @functools.wraps(f)\n  def inner(*a): return f(f(*a))\n  return inner\n@twice\ndef inc(x): return x + step\nstep = 2\npart = functools.partial(pow, 2)",
        "r = (inc(1), part(5), inc.__name__)",
    ),
    "walrus, star, match": (
        "point = (1, [2, 3])",
        "match point:\n  case (x, [y, *z]): pass\nif (n := len(z)) > 0: m = n\nfirst, *rest2 = point",
    ),
}


@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.parametrize("title", list(PROGRAMS))
def test_a_written_cell(title: str, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, source = PROGRAMS[title]
    there = Notebook(worker)
    monkeypatch.setitem(sys.modules, "__main__", there.module)
    there.cell(setup)
    there.remote(source)
    here = Notebook(worker)
    monkeypatch.setitem(sys.modules, "__main__", here.module)
    here.cell(setup)
    here.cell(source)
    assert _pictures(there.names) == _pictures(here.names)
