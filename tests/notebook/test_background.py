"""``%%remote -a``: cells in the background, and the names that they bind late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow

GATE = "import time\nwhile not (folder / {gate!r}).exists(): time.sleep(0.01)\n"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel({"JPY_SESSION_NAME": "late.ipynb"}, cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 3").error is None
        yield k


@pytest.fixture
def folder(kernel: Kernel, tmp_path: Path) -> Path:
    """Where gates are opened."""
    ok(kernel.run("%reset_selective -f ^[a-z]$"))
    ok(kernel.run(f"import nbray, os\nfrom pathlib import Path\nfolder = Path({str(tmp_path)!r})"))
    return tmp_path


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def gated(gate: str, code: str, flags: str = "-a") -> str:
    return f"%%remote {flags}\n{GATE.format(gate=gate)}{code}"


def said(run: Run) -> str:
    """What it displayed, and its status lines as they were at any time."""
    kinds = ("display_data", "update_display_data")
    contents = [message["content"] for message in run.messages if message["msg_type"] in kinds]
    return "\n".join(content["data"].get("text/plain", "") for content in contents)


def reads(kernel: Kernel, code: str, gate: Path) -> Run:
    """Start a cell that has to wait, see that it does, open the gate, and its end."""
    run = kernel.start(code)
    kernel.read_until([run], lambda: "waiting for" in said(run))
    gate.touch()
    return ok(kernel.finish(run))


def test_a_later_cell_waits_for_what_it_reads(kernel: Kernel, folder: Path) -> None:
    first = ok(kernel.run(gated("g", "x = 40\ny = [x]")))
    assert "runs in the background" in said(first)
    assert ok(kernel.run("1 + 1")).result == "2"
    run = reads(kernel, "x + 2", folder / "g")
    assert run.result == "42"
    assert f"waiting for x of In[{first.number}]" in said(run)
    assert kernel.run("(y, type(y) is list)").result == "([40], True)"


@pytest.mark.parametrize(
    ("setup", "code", "result"),
    [
        ("def f(): return x + 1", "f()", "41"),
        ("class C:\n    def m(self): return x + 1\nc = C()", "c.m()", "41"),
        ("@nbray.remote\ndef f(): return x + 1", "nbray.get(f.remote())", "41"),
        ("", "if True:\n    z = x\nz", None),
        ("", "import asyncio\nawait asyncio.sleep(0)\nx + 1", "41"),
        ("", "'a docstring'\nfrom __future__ import annotations\nx + 1", "41"),
        ("", "x += 1\nx", "41"),
        ("", "get_ipython().run_line_magic('time', 'x')", "40"),
        ("", "out = !echo {x}\nout[0]", "'40'"),
    ],
)
def test_ways_to_read(kernel: Kernel, folder: Path, setup: str, code: str, result: str | None) -> None:
    if setup:
        ok(kernel.run(setup))
    ok(kernel.run(gated("g", "x = 40")))
    run = reads(kernel, code, folder / "g")
    assert run.result == (result or "40")


def test_capture_and_time_above(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run(gated("g", "x = 40")))
    run = kernel.start("%%time\n%%remote\nx + 1")
    (folder / "g").touch()
    assert ok(kernel.finish(run)).result == "41"


def test_names_that_come_late_are_not_there_in_an_old_version(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run("x, keep = 1, 'kept'"))
    ok(kernel.run(gated("g", "x = 2")))
    assert kernel.run("('x' in globals(), keep)").result == "(False, 'kept')"
    assert reads(kernel, "x", folder / "g").result == "2"


def test_a_notebook_of_background_cells_is_a_graph(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run(gated("g", "def twice(v): return v * factor\nfactor = 2\na = 10")))
    ok(kernel.run("%%remote -a\nb = twice(a)"))
    ok(kernel.run("%%remote -a\nc = a + 1"))
    ok(kernel.run("%%remote -a\nd = b + c\nimport os\nwhere = os.getpid()"))
    # Nothing has waited yet.
    assert kernel.run("'started'").result == "'started'"
    run = kernel.start("%%remote\nd * 10")
    (folder / "g").touch()
    assert ok(kernel.finish(run)).result == "310"
    assert kernel.run("(a, b, c, d, where != os.getpid())").result == "(10, 20, 11, 31, True)"


def test_functions_from_the_background_see_the_notebooks_names(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run("unit = 'm'"))
    ok(kernel.run(gated("g", "def show(v): return f'{v} {unit}'")))
    ok(kernel.run("unit = 'km'"))
    run = kernel.start("%%remote\nshow(1)")
    (folder / "g").touch()
    assert ok(kernel.finish(run)).result == "'1 km'"
    assert kernel.run("show(2)").result == "'2 km'"


def test_what_the_notebook_binds_itself_is_not_late(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run(gated("g", "x = 1; y = 2; z = 3")))
    assert ok(kernel.run("x = 'mine'\nx")).result == "'mine'"
    ok(kernel.run("del y"))
    assert kernel.run("y").error == "NameError"
    assert reads(kernel, "z", folder / "g").result == "3"
    assert kernel.run("(x, 'y' in globals())").result == "('mine', False)"


def test_a_failure_is_shown_in_its_cell_and_raised_in_who_reads(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run("x = 'old'"))
    first = ok(kernel.run(gated("g", "before = 1\nx = 1 / 0")))
    (folder / "g").touch()
    kernel.read_until([first], lambda: "ZeroDivisionError" in first.traceback)
    assert f"Cell In[{first.number}], line 5" in first.traceback
    run = kernel.run("x")
    assert run.error == "ZeroDivisionError"
    assert f"x comes from In[{first.number}], which failed" in run.traceback
    assert f"Cell In[{first.number}], line 5" in run.traceback
    assert "nbray/" not in run.traceback
    assert kernel.run("(x, before)").result == "('old', 1)"


def test_a_failure_reaches_the_cells_that_depend_on_it(kernel: Kernel, folder: Path) -> None:
    first = ok(kernel.run(gated("g", "p = 1 / 0")))
    ok(kernel.run("%%remote -a\nq = p + 1"))
    (folder / "g").touch()
    run = kernel.run("%%remote\nq + 1")
    assert run.error == "ZeroDivisionError"
    assert f"needs what In[{first.number}] makes" in run.traceback
    assert kernel.run("q").error == "ZeroDivisionError"
    assert kernel.run("q").error == "NameError"


def test_waiting_can_be_interrupted_and_the_background_goes_on(kernel: Kernel, folder: Path) -> None:
    first = ok(kernel.run(gated("g", "x = 7")))
    run = kernel.start("print('never')\nx")
    kernel.read_until([run], lambda: "waiting for" in said(run))
    began = time.monotonic()
    kernel.interrupt()
    kernel.finish(run)
    assert time.monotonic() - began < 2.0
    assert run.error == "KeyboardInterrupt"
    assert run.text() == ""
    assert f"In[{first.number}], which makes it, goes on" in run.traceback
    assert reads(kernel, "x", folder / "g").result == "7"


def test_output_and_value_appear_in_the_cell(kernel: Kernel, folder: Path) -> None:
    first = ok(kernel.run(gated("g", "print('from the background')\nx = 5\nx * 2")))
    later = ok(kernel.run("print('meanwhile')"))
    (folder / "g").touch()
    kernel.read_until([first, later], lambda: "10" in said(first).split())
    assert first.text() == "from the background\n"
    assert later.text() == "meanwhile\n"


def test_detach(kernel: Kernel, folder: Path) -> None:
    run = kernel.start(
        gated("g", "x = 5\nx + 1", "--on-interrupt detach").replace(
            "import time\n", "import time\nprint('go')\n", 1
        )
    )
    kernel.read_until([run], lambda: "go" in run.text())
    kernel.interrupt()
    ok(kernel.finish(run))
    assert "runs in the background" in said(run)
    later = kernel.start("x")
    (folder / "g").touch()
    assert ok(kernel.finish(later, run)).result == "5"
    kernel.read_until([run], lambda: "6" in said(run).split())


def test_a_time_limit_in_the_background(kernel: Kernel, folder: Path) -> None:
    first = ok(kernel.run("%%remote -a --timeout 0.2\nimport time\ntime.sleep(60)\nx = 1"))
    kernel.read_until([first], lambda: "did not end within 0.2 s" in first.traceback)
    run = kernel.run("x")
    assert (run.error, "comes from In[" in run.traceback) == ("TaskCancelledError", True)


def test_a_name_promised_twice_is_that_of_the_later_cell(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run(gated("g", "x = 1")))
    ok(kernel.run("%%remote -a\nx = x + 1"))
    ok(kernel.run("%%remote -a\nif False: x = 0\ny = x"))
    assert reads(kernel, "y", folder / "g").result == "2"
    assert kernel.run("x").result == "2"


def test_imports_that_the_notebook_has_are_not_late(kernel: Kernel, folder: Path) -> None:
    ok(kernel.run(gated("g", "import os\nx = os.getpid()")))
    assert ok(kernel.run("os.path.basename('a/b')")).result == "'b'"
    assert reads(kernel, "x != os.getpid()", folder / "g").result == "True"


def test_a_cluster_that_stops_leaves_no_promise(tmp_path: Path) -> None:
    with Kernel() as k:
        ok(k.run(f"%load_ext nbray\nfrom pathlib import Path\nfolder = Path({str(tmp_path)!r})\nx = 'old'"))
        ok(k.run("%cluster start --cpus 1 --name other"))
        ok(k.run(gated("never", "x = 1")))
        ok(k.run("%cluster stop"))
        assert k.run("x").result == "'old'"


def test_where_nobody_looks_after_a_cells_end_a_failure_is_shown_with_a_later_one(tmp_path: Path) -> None:
    with Kernel() as k:
        ok(k.run(f"%load_ext nbray\nfrom pathlib import Path\nfolder = Path({str(tmp_path)!r})"))
        ok(k.run("%cluster start --cpus 1 --name headless"))
        first = ok(k.run(gated("g", "x = 1 / 0")))
        (tmp_path / "g").touch()
        later = k.run("x")
        assert later.error == "ZeroDivisionError"
        last = k.start("1 + 1")
        k.finish(last, first, later)
        assert any("ZeroDivisionError" in said(run) for run in (first, later, last))
