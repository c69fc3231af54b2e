"""The magics as plain functions, in a notebook and in a script."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("import nbray, os\nnbray.cluster('start --cpus 2')").error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def test_in_a_notebook(kernel: Kernel) -> None:
    ok(kernel.run("x, here = 2, os.getpid()"))
    assert ok(kernel.run("nbray.remote_cell('y = x + 1; pid = os.getpid()\\ny * 2')")).result == "6"
    assert kernel.run("(y, pid != here)").result == "(3, True)"
    run = kernel.run("nbray.remote_cell('''\n1 / 0''')")
    assert (run.error, f"Cell In[{run.number}], line 2" in run.traceback) == ("ZeroDivisionError", True)
    assert "nbray/" not in run.traceback
    ok(kernel.run("nbray.remote_cell('z = 5', background=True, quiet=True)"))
    assert ok(kernel.run("z")).result == "5"
    assert ok(kernel.run("nbray.remote_cell('n * n', over={'n': range(3)})")).result == "[0, 1, 4]"
    assert kernel.run("nbray.remote_cell('1', num_cpu=1)").error == "ValueError"
    assert kernel.run("nbray.remote_cell('1', out='a-b')").error == "ValueError"
    assert kernel.run("nbray.cluster('strat')").error == "ValueError"
    assert "2 of 2 free" in ok(kernel.run("nbray.cluster()")).shown()[0]["text/plain"]


SCRIPT = """
import nbray, os
factor = 3
here = os.getpid()
def f(v): return v * factor
nbray.init(num_cpus=2)
assert nbray.remote_cell("print('there'); y = f(2); pid = os.getpid()\\ny + 1") == 7
assert (y, pid != here) == (6, True)
assert nbray.remote_cell("f(n)", over={"n": [1, 2]}) == [3, 6]
try:
    nbray.remote_cell("f(1)\\n1 / 0")
except ZeroDivisionError as error:
    assert "line 2" in error.__notes__[0], error.__notes__
else:
    raise AssertionError
try:
    nbray.remote_cell("1", background=True)
except ValueError as error:
    assert "notebook" in str(error)
else:
    raise AssertionError
nbray.cluster("status")
nbray.shutdown()
print("end")
"""


def test_in_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("(remote_cell pid=")
    assert lines[0].endswith(") there")
    assert lines[-1] == "end"
    assert any("2 of 2 free" in line for line in lines)
