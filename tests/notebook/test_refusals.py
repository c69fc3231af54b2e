"""What cannot be sent is refused before anything is submitted: which variable, what it is, how large, what to do. And the plan of a cell."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from nbray.errors import SerializationError
from nbray.notebook.cell import prepare
from nbray.notebook.plans import Plan, plan

SETUP = (
    """
import asyncio, collections, concurrent.futures, contextvars, io, logging, mmap, queue, socket, sqlite3, subprocess, sys, tempfile, threading, types, weakref
import ipywidgets
lock = threading.Lock(); event = threading.Event(); thread = threading.Thread(target=print); local = threading.local()
sock = socket.socket(); text = open('/dev/null'); binary = open('/dev/null', 'rb'); temporary = tempfile.NamedTemporaryFile()
connection = sqlite3.connect(':memory:'); cursor = connection.cursor(); memory = mmap.mmap(-1, 4096)
generator = (i for i in [1]); async def wait(): pass
""".replace("; async def", "\nasync def")
    + """
pool = concurrent.futures.ThreadPoolExecutor(); future = concurrent.futures.Future(); lines = queue.Queue(); process = subprocess.Popen(['true']); process.wait()
loop = asyncio.new_event_loop(); variable = contextvars.ContextVar('v'); weak = weakref.ref(thread); widget = ipywidgets.IntSlider()
made_here = types.ModuleType('made_here_'); sys.modules['made_here_'] = made_here
class Box: pass
box = Box(); box.inner = Box(); box.inner.db = connection
config = {'a': 1, 'deep': [1, {'lock': lock}]}; files = {'log': text}; panel = [widget]; library = {'m': made_here}
chain = []
for _ in range(5000): chain = [chain]
def uses(): return box.inner
def default(x=lock): return x
def closure():
    inside = lock
    def inner(): return inside
    return inner
enclosed = closure()
fine = dict(log=logging.getLogger('x'), path=io.StringIO('x'), data=io.BytesIO(b'x'), module=collections, stamp=types.ModuleType('by_value'))
"""
)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    module = types.ModuleType("__main__")
    kept = sys.modules["__main__"]
    sys.modules["__main__"] = module
    exec(SETUP, module.__dict__)
    yield module.__dict__
    sys.modules["__main__"] = kept
    del sys.modules["made_here_"]
    with contextlib.ExitStack() as stack:
        for name in ("sock", "text", "binary", "temporary", "connection", "memory", "loop", "widget"):
            stack.callback(module.__dict__[name].close)
        stack.callback(module.__dict__["pool"].shutdown)


CASES = [
    ("lock", "lock", "_thread.lock", "Make one in the cell"),
    ("event", "it is a lock", "threading.Event", "Make one in the cell"),
    ("thread", "a thread", "threading.Thread", "Start one in the cell"),
    ("local", "threads", "_thread._local", "in the cell"),
    ("sock", "network connection", "socket.socket", "Open it in the cell"),
    ("text", "open file", "_io.TextIOWrapper", "Send its path and open it in the cell"),
    ("binary", "open file", "_io.BufferedReader", "Send its path"),
    ("temporary", "open file", "tempfile._TemporaryFileWrapper", "Send its path"),
    ("memory", "open file", "mmap.mmap", "4096 items"),
    ("connection", "database connection", "sqlite3.Connection", "Connect in the cell"),
    ("cursor", "database connection", "sqlite3.Cursor", "Connect in the cell"),
    ("generator", "a generator", "generator", "list(...)"),
    ("pool", "pool of workers", "ThreadPoolExecutor", "nbray.map"),
    ("future", "a result that this process waits for", "Future", "result()"),
    ("lines", "a queue", "queue.Queue", "list(...)"),
    ("process", "handle of another process", "subprocess.Popen", "in the cell"),
    ("loop", "event loop", "EventLoop", "await"),
    ("variable", "contexts", "ContextVar", "value"),
    ("weak", "cannot be pickled", "weakref", "object itself"),
    ("widget", "a widget", "IntSlider", ".value"),
    ("made_here", "a module that no other process can import", "module", "a file"),
    ("library", "library['m'] is a module", "dict, 1 item", "a file"),
    ("config", "config['deep'][1]['lock'] is a lock", "dict, 2 items, ", "Make one"),
    ("files", "files['log'] is an open file", "dict, 1 item", "path"),
    ("panel", "panel[0] is a widget", "list, 1 item", ".value"),
    ("box", "box.inner.db is a database connection", "Box", "Connect"),
    ("uses()", "'box', which 'uses' reads", "box.inner.db is a database connection", "Connect"),
    ("default()", "variable 'x' of default is a lock", "function", "Make one"),
    ("enclosed()", "variable 'inside' of enclosed is a lock", "function", "Make one"),
    ("chain", "nested too deeply", "list", "flat"),
]


@pytest.mark.parametrize(("cell", "what", "kind", "advice"), CASES)
def test_refused_with_name_type_size_and_what_to_do(
    names: dict[str, Any], cell: str, what: str, kind: str, advice: str
) -> None:
    with pytest.raises(SerializationError) as caught:
        prepare(cell, "Cell", names)
    message = str(caught.value)
    variable = "box" if cell == "uses()" else cell.removesuffix("()")
    assert message.startswith(f"the variable {variable!r}")
    assert "cannot be sent to the cluster" in message
    assert " bytes)" in message or " kB)" in message
    for part in (what, kind, advice):
        assert part in message
    assert "0x" not in message


def test_what_looks_like_it_but_can_be_sent(names: dict[str, Any]) -> None:
    assert prepare("fine", "Cell", names).sizes["fine"] > 0


def test_a_broken_repr_or_length_is_no_obstacle(names: dict[str, Any]) -> None:
    exec(
        "class Rude(dict):\n  def __len__(self): raise ValueError\n  def __repr__(self): raise ValueError\n  def __sizeof__(self): raise ValueError\n"
        "rude = Rude(); rude.lock = lock",
        names,
    )
    with pytest.raises(SerializationError, match=r"the variable 'rude' \(Rude\) cannot be sent"):
        prepare("rude", "Cell", names)


def planned(names: dict[str, Any], source: str, **options: Any) -> Plan:
    prepared = prepare(source, "Cell", names, strict=False, apart=True, **options)
    return plan(prepared.names, prepared.packed, names, options.get("also", ()), options.get("out"))


def test_a_plan_says_what_why_and_what_not(names: dict[str, Any]) -> None:
    exec("import numpy as np, math\nx = np.ones(1000)\nscale = 2\ndef area(r): return math.pi * r * scale\nextra = 'e'", names)  # fmt: skip
    made = planned(names, "y = x.sum()\narea(y)\nconfig\nuses()\neval('1')", also=("extra",))
    items = {item.name: item for item in made.items}
    assert list(items)[:2] == ["x", "area"]
    assert (items["x"].kind, items["x"].why) == ("numpy.ndarray", "read in line 1")
    assert items["x"].size is not None
    assert items["x"].size > 8000
    assert (items["scale"].kind, items["scale"].why) == ("int", "read by area")
    assert (items["math"].kind, items["math"].size, items["math"].why) == (
        "module math",
        None,
        "read by area",
    )
    assert items["extra"].why == "-i"
    assert "config['deep'][1]['lock'] is a lock" in items["config"].refused
    assert "read in line 3" in items["config"].refused
    assert "read by uses" in items["box"].refused
    assert made.size == sum(item.size or 0 for item in made.items)
    card = made.card()
    first, head, *_ = card.text.splitlines()
    assert first.startswith("This cell would send 6 names, ")
    assert first.endswith(", and 2 would be refused")
    assert head.split() == ["name", "type", "size", "why"]
    assert "comes back: y" in card.text
    assert "<table>" in card.html
    assert "&#x27;lock&#x27;" in card.html


def test_a_plan_of_nothing(names: dict[str, Any]) -> None:
    card = planned(names, "1 + 1").card()
    assert card.text == "This cell would send nothing\nnothing comes back but the last value"
    assert planned(names, "a = b = 1", out=("a",)).card().text.endswith("comes back: a")


def test_a_plan_names_calls_that_see_everything(names: dict[str, Any]) -> None:
    assert (
        "exec(...) in line 1 may read names that cannot be seen" in planned(names, "exec(source)").card().text
    )
