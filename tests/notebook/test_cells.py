"""A cell goes to another process and comes back: everything but the cluster."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nbray.notebook.cell import Returned, prepare, returned
from nbray.notebook.runner import CellError, CellResult, CellTask

WORKER = """
import contextlib, io, pickle, sys
from nbray.notebook.runner import execute
requests, replies = sys.stdin.buffer, sys.stdout.buffer
while True:
    task = pickle.load(requests)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            answer = execute(task)
        except BaseException as error:
            answer = error
    pickle.dump((answer, output.getvalue()), replies, protocol=5)
    replies.flush()
"""


class Worker:
    """A process that runs one cell after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout

    def run(self, task: CellTask) -> tuple[CellResult, str]:
        pickle.dump(task, self.requests, protocol=5)
        self.requests.flush()
        answer, output = pickle.load(self.replies)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, CellResult)
        return answer, output

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.replies.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


class Notebook:
    """A namespace that is ``__main__``, cells that run in it, and cells that run elsewhere and return."""

    def __init__(self, worker: Worker) -> None:
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        self.worker = worker
        self.output = ""

    def cell(self, source: str) -> None:
        exec(compile(source, "here", "exec"), self.names)

    def remote(self, source: str, **options: Any) -> Any:
        back = self.run(source, **options)
        self.names.update(back.values)
        for name in back.deleted:
            self.names.pop(name, None)
        return back.value

    def run(self, source: str, **options: Any) -> Returned:
        result, self.output = self.worker.run(prepare(source, "Cell", self.names, **options).task)
        return returned(result, self.names)


@pytest.fixture
def nb(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    notebook = Notebook(worker)
    monkeypatch.setitem(sys.modules, "__main__", notebook.module)
    return notebook


def test_names_and_value_come_back(nb: Notebook) -> None:
    nb.cell("a = [1, 2]")
    assert nb.remote("b = a + [3]\nlen(b)") == 3
    assert nb.names["b"] == [1, 2, 3]


def test_only_the_last_expression_has_a_value(nb: Notebook) -> None:
    assert nb.remote("1 + 1\nx = 2") is None
    assert nb.remote("x * 2", display=False) is None
    assert nb.remote("") is None
    assert nb.remote("# nothing") is None


def test_two_names_for_one_object_stay_one_object(nb: Notebook) -> None:
    nb.cell("a = [1]; b = a; c = {'a': a}")
    assert nb.remote("(a is b, c['a'] is a)") == (True, True)
    nb.remote("x = [1]; y = x; z = (x,)")
    assert nb.names["x"] is nb.names["y"] is nb.names["z"][0]


def test_inputs_are_private_copies(nb: Notebook) -> None:
    nb.cell(
        "import numpy as np\nx = np.zeros(5000)\nsmall = np.zeros(3)\nfrozen = np.zeros(5000); frozen.flags.writeable = False\nl = [1]"
    )
    before = nb.names["x"]
    nb.remote("l.append(2); y = x; small += 1; frozen[0] = 7; first = frozen[0]; x[0] = 1")
    assert before[0] == 0
    assert nb.names["l"] == [1]
    assert nb.names["y"][0] == 1
    assert nb.names["small"].tolist() == [1, 1, 1]
    assert nb.names["first"] == 7
    assert nb.names["frozen"][0] == 0


def test_augmented_assignment_returns_the_new_value(nb: Notebook) -> None:
    nb.cell("n = 1; l = [1]")
    nb.remote("n += 1\nl += [2]")
    assert nb.names["n"] == 2
    assert nb.names["l"] == [1, 2]


def test_results_are_writable(nb: Notebook) -> None:
    nb.remote("import numpy as np\nx = np.arange(5000.)\ny = np.arange(3)")
    nb.names["x"][0] = 5
    nb.names["y"][0] = 5
    assert isinstance(nb.names["x"], np.ndarray)


def test_out_narrows(nb: Notebook) -> None:
    back = nb.run("a = 1; b = 2; c = 3", out=("a", "zz"))
    assert back.values == {"a": 1}
    assert back.notes == ["-o zz: the cell has not bound that name"]


def test_deleted_names_are_deleted(nb: Notebook) -> None:
    nb.cell("a = 1; b = 2; lock = __import__('threading').Lock()")
    nb.remote("del a, lock")
    assert "a" not in nb.names
    assert "lock" not in nb.names
    assert nb.names["b"] == 2


def test_names_that_are_bound_and_deleted_again_are_gone(nb: Notebook) -> None:
    nb.cell("a = 1; b = 2; e = 3; kept = 4")
    nb.remote("a = 5; del a\ntry: 1 / 0\nexcept ZeroDivisionError as e: pass\nif False: del kept")
    assert {"a", "b", "e", "kept"} & set(nb.names) == {"b", "kept"}
    assert nb.names["kept"] == 4


def test_functions_come_back_over_the_notebooks_names(nb: Notebook) -> None:
    nb.cell("scale = 2")
    nb.remote("def f(x): return g(x) * scale\ndef g(x): return x + 1")
    assert nb.names["f"](1) == 4
    nb.names["scale"] = 10
    assert nb.names["f"](1) == 20
    assert nb.names["f"].__globals__ is nb.names


def test_helpers_of_a_returned_function_come_along(nb: Notebook) -> None:
    back = nb.run("def f(x): return g(x)\ndef g(x): return x + k\nk = 1\nother = 5", out=("f",))
    assert set(back.values) == {"f", "g", "k"}


def test_classes_come_back(nb: Notebook) -> None:
    nb.cell("unit = 'm'")
    nb.remote(
        "class Base:\n"
        "  def text(self): return f'{self.x} {unit}'\n"
        "class Length(Base):\n"
        "  def __init__(self, x): self.x = x\n"
        "  def text(self): return super().text() + '!'\n"
        "one = Length(1)"
    )
    assert nb.names["one"].text() == "1 m!"
    nb.names["unit"] = "km"
    assert nb.names["Length"](2).text() == "2 km!"
    assert isinstance(nb.names["one"], nb.names["Length"])


def test_instances_of_notebook_classes_stay_instances(nb: Notebook) -> None:
    nb.cell(
        "from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\n  def twice(self): return P(self.x * k)\nk = 2\np = P(1)"
    )
    twice = nb.names["P"].twice
    nb.remote("q = p.twice()\nkinds = (type(q) is P, q == P(2))")
    assert nb.names["kinds"] == (True, True)
    assert type(nb.names["q"]) is nb.names["P"]
    assert nb.names["P"].twice is twice


def test_functions_see_what_the_cell_rebinds(nb: Notebook) -> None:
    nb.cell("k = 1\ndef f(): return k\ndef bump():\n  global k\n  k += 1")
    assert nb.remote("k = 5; f()") == 5
    assert nb.remote("bump(); f()") == 6
    assert nb.names["k"] == 6


def test_what_functions_read_is_sent(nb: Notebook) -> None:
    nb.cell(
        "import math\ndef area(r): return math.pi * square(r)\ndef square(x): return x ** power\npower = 2\nfs = [area]"
    )
    assert nb.remote("round(fs[0](1), 3)") == 3.142


def test_cached_and_nested_functions(nb: Notebook) -> None:
    nb.cell(
        "import functools\n@functools.lru_cache\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)"
    )
    assert nb.remote("fib(30)") == 832040
    nb.cell(
        "def counter():\n  n = 0\n  def up():\n    nonlocal n\n    n += 1\n    return n\n  def now(): return n\n  return up, now\nup, now = counter()"
    )
    assert nb.remote("(up(), up(), now())") == (1, 2, 2)
    nb.cell("def outer():\n  def rec(k): return 0 if k == 0 else rec(k - 1) + 1\n  return rec\nrec = outer()")
    assert nb.remote("rec(4)") == 4


def test_keys_whose_hash_reads_a_global(nb: Notebook) -> None:
    nb.cell(
        "salt = 7\ndef h(x): return hash((salt, x))\nclass K:\n  def __hash__(self): return h(1)\n  def __eq__(self, o): return True\nd = {K(): 1}\nd2 = {K(): d}"
    )
    assert nb.remote("list(d.values())[0] + len(d2)") == 2


def test_modules_travel_by_name(nb: Notebook) -> None:
    nb.cell("import xml.dom.minidom\nimport os.path as p")
    nb.remote(
        "import json as j, email.mime\nname = xml.dom.minidom.__name__, p.join('a', 'b'), email.mime.__name__"
    )
    assert nb.names["name"] == ("xml.dom.minidom", "a/b", "email.mime")
    assert nb.names["j"] is sys.modules["json"]
    assert nb.names["email"] is sys.modules["email"]


def test_star_import_brings_its_names(nb: Notebook) -> None:
    nb.remote("from string import *\nx = digits")
    assert nb.names["digits"] == "0123456789"
    assert callable(nb.names["capwords"])


def test_await_at_the_top(nb: Notebook) -> None:
    assert nb.remote("import asyncio\nawait asyncio.sleep(0)\nx = 3\nawait asyncio.sleep(0, result=x)") == 3


def test_future_flags(nb: Notebook) -> None:
    import __future__

    nb.remote("def f(a: not_there): ...", flags=__future__.annotations.compiler_flag)
    assert nb.names["f"].__annotations__ == {"a": "not_there"}


def test_what_cannot_be_pickled_stays(nb: Notebook) -> None:
    nb.cell("gen = 'old'")
    back = nb.run("import threading\ngen = (i for i in [1])\nlock = threading.Lock()\nx = 1\ngen")
    assert set(back.values) == {"threading", "x"}
    assert "gen could not be brought here (the notebook keeps the gen it has): " in back.notes[0]
    assert "lock could not be brought here: " in back.notes[1]
    assert repr(back.value).startswith("<generator object")


def test_names_the_analysis_cannot_see(nb: Notebook) -> None:
    nb.cell("alpha = 1; text = 'alpha + 1'")
    prepared = prepare("eval(text)", "Cell", nb.names)
    assert prepared.blind == (("eval(...)", 1),)
    assert nb.remote("eval(text)", also=("alpha",)) == 2
    with pytest.raises(NameError, match="did you mean 'alpha'"):
        prepare("1", "Cell", nb.names, also=("alpa",))


def failure(nb: Notebook, source: str, **options: Any) -> CellError:
    with pytest.raises(CellError) as caught:
        nb.run(source, **options)
    return caught.value


def test_an_error_has_the_users_frames_only(nb: Notebook) -> None:
    error = failure(nb, "\n\nx = 1\ndef f(): raise ValueError('bad')\nf()")
    assert [(f.filename, f.line, f.name) for f in error.report.frames] == [
        ("Cell", 5, "<module>"),
        ("Cell", 4, "f"),
    ]
    assert error.report.frames[1].text == "def f(): raise ValueError('bad')"
    assert error.report.lines == ["ValueError: bad"]
    assert str(error) == "ValueError: bad"


def test_what_was_bound_before_the_error_comes_back(nb: Notebook) -> None:
    nb.cell("class Mine(Exception): ...")
    error = failure(nb, "x = [1]\nimport numpy as np\nbig = np.zeros(10**6)\nraise Mine(x)")
    back = returned(error.result, nb.names)
    assert back.values["x"] == [1]
    assert type(back.value) is nb.names["Mine"]
    assert back.value.args[0] is back.values["x"]
    assert back.notes == [
        "big could not be brought here: the cell failed, and 8 MB are too much for an error"
    ]


def test_errors_in_awaited_code_and_chains(nb: Notebook) -> None:
    error = failure(
        nb,
        "import asyncio\nawait asyncio.sleep(0)\ntry: 1 / 0\nexcept ZeroDivisionError as e: raise KeyError('k') from e",
    )
    assert [f.line for f in error.report.frames] == [4]
    assert error.report.before is not None
    assert error.report.before.lines == ["ZeroDivisionError: division by zero"]
    assert "direct cause" in error.report.link
    group = failure(nb, "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])")
    assert [inner.lines for inner in group.report.group] == [["ValueError: 1"], ["TypeError: 2"]]


def test_an_error_that_cannot_be_pickled(nb: Notebook) -> None:
    error = failure(nb, "import threading\nraise ValueError(threading.Lock())")
    assert error.report.kind == "ValueError"
    assert returned(error.result, nb.names).value is None


def test_leaving_the_cell_by_exit_is_an_error_of_the_cell(nb: Notebook) -> None:
    error = failure(nb, "import sys\nsys.exit(3)")
    back = returned(error.result, nb.names)
    assert type(back.value) is SystemExit


def test_an_interrupt_is_not_an_error_of_the_cell(nb: Notebook) -> None:
    with pytest.raises(KeyboardInterrupt):
        nb.run("raise KeyboardInterrupt")


def test_syntax_errors_never_leave_the_notebook(nb: Notebook) -> None:
    with pytest.raises(SyntaxError) as caught:
        prepare("\n\nx = = 1", "Cell", nb.names)
    assert (caught.value.filename, caught.value.lineno) == ("Cell", 3)


def test_shell_commands(nb: Notebook) -> None:
    nb.cell("name = 'world'")
    nb.remote(
        "get_ipython().system('echo hello {name}')\nlines = get_ipython().getoutput('printf \"a\\\\n$name\"')"
    )
    assert nb.output == "hello world\n"
    assert list(nb.names["lines"]) == ["a", "world"]
    assert nb.names["_exit_code"] == 0


@pytest.mark.parametrize("source", ["input()", "breakpoint()"])
def test_what_works_in_the_notebook_only_says_so(nb: Notebook, source: str) -> None:
    assert "%%remote" in str(failure(nb, source))


def test_display_prints(nb: Notebook) -> None:
    nb.remote("display([1, 2])")
    assert nb.output == "[1, 2]\n"


def test_the_cell_is_main_while_it_runs(nb: Notebook) -> None:
    assert nb.remote(
        "import sys, pickle\nclass A: ...\npickle.loads(pickle.dumps(A())).__class__ is A and sys.modules['__main__'].A is A"
    )


def test_a_thread_that_outlives_the_cell_keeps_its_names(nb: Notebook) -> None:
    nb.remote(
        "import threading, types, sys\n"
        "keeper = sys.modules.setdefault('keeper', types.ModuleType('keeper'))\n"
        "keeper.go, keeper.seen, word = threading.Event(), [], 'kept'\n"
        "def late():\n  keeper.go.wait(20)\n  keeper.seen.append(word)\n"
        "keeper.thread = threading.Thread(target=late, daemon=True)\n"
        "keeper.thread.start()",
        out=(),
    )
    nb.remote(
        "import sys; k = sys.modules['keeper']; k.go.set(); k.thread.join(20); seen = k.seen", out=("seen",)
    )
    assert nb.names["seen"] == ["kept"]


def test_conditional_and_loop_names(nb: Notebook) -> None:
    nb.remote(
        "for i in range(3): last = i\nif False: never = 1\nwith open('/dev/null') as fh: text = fh.read()\ntry: 1/0\nexcept ZeroDivisionError as e: pass"
    )
    assert nb.names["i"] == nb.names["last"] == 2
    assert nb.names["text"] == ""
    assert "never" not in nb.names
    assert "e" not in nb.names
