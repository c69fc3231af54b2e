"""Ways to run code on the cluster: ``%remote EXPR``, flags, ``--local``, other magics around and inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbray.notebook import arguments, options
from nbray.notebook.arguments import BadUsageError
from tests.notebook.kernels import Kernel, Run

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        assert k.run("import nbray, os\nhere = os.getpid()").error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def said(run: Run) -> str:
    return "\n".join(data["text/plain"] for data in run.shown())


# -- the command line


def read(line: str) -> options.CellOptions:
    return options.read(options.parser().read(arguments.split(line)))


def test_flags() -> None:
    given = read(
        "-o a,b -i c -n fit --num-cpus 2 --memory 1MB --timeout 3 --retries 2 --priority -1 --resources TPU=1 X=0.5"
        " --options max_calls=1 -q --no-stream --progress-after 2 --on-interrupt detach"
    )
    assert given.task == {
        "num_cpus": 2,
        "memory": 2**20,
        "priority": -1,
        "max_retries": 2,
        "retry_exceptions": True,
        "resources": {"TPU": 1, "X": 0.5},
        "max_calls": 1,
    }
    assert (given.out, given.also, given.name, given.timeout) == (("a", "b"), ("c",), "fit", 3)
    assert (given.quiet, given.stream, given.progress_after, given.on_interrupt) == (True, False, 2, "detach")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--resouces TPU=1", "did you mean --resources?"),
        ("--resources TPU", "--resources TPU=1"),
        ("--resources TPU=many", "'many' should be a number"),
        ("--options max_call=1", "max_calls"),
        ("--options num_returns=2", "one result"),
        ("--options max_calls=x", "max_calls"),
        ("--priority high", "whole number"),
        ("--map files", "--map x=files"),
        ("--map 2=files", "not a variable's name"),
        ("--local -a", "take -a"),
        ("-a --map x=files", "cannot run in the background"),
        ("--on-interrupt stop", "cancel"),
    ],
)
def test_flags_that_mean_nothing(line: str, said: str) -> None:
    with pytest.raises(BadUsageError, match=r"(?s).*" + said.replace("?", r"\?")):
        read(line)


@pytest.mark.parametrize(
    ("line", "words", "rest"),
    [
        ("f(3)", [], "f(3)"),
        ("-x + 1", [], "-x + 1"),
        ("--num-cpus 2 f(-3)", ["--num-cpus", "2"], "f(-3)"),
        ("--num-cpus=2 -q -n 'a b' f('a  b')", ["--num-cpus=2", "-q", "-n", "a b"], "f('a  b')"),
        ("--num-cpu 2 f(3)", ["--num-cpu"], "2 f(3)"),
        ("", [], ""),
    ],
)
def test_flags_of_a_line(line: str, words: list[str], rest: str) -> None:
    assert options.split_line(line, options.line_parser()) == (words, rest)


@pytest.mark.parametrize(
    ("line", "over"),
    [
        ("--map x=files", ("x", "files")),
        ("-q --map x=[1, 2, 3] -o a,b", ("x", "[1, 2, 3]")),
        ("""--map x=["a b", 'c']""", ("x", """["a b", 'c']""")),
        ("""--map 'x=f("a")' -q""", ("x", 'f("a")')),
        ("--map=x=range(3)", ("x", "range(3)")),
        ("--map x = range(3)", ("x", "range(3)")),
    ],
)
def test_items_are_python(line: str, over: tuple[str, str]) -> None:
    parser = options.parser()
    given = options.read(parser.read(options.split_cell_line(line, parser)))
    assert given.over == over
    assert given.out == (("a", "b") if "-o" in line else None)


# -- %remote


@slow
def test_an_expression(kernel: Kernel) -> None:
    ok(kernel.run("def f(x): return x + 1, os.getpid()"))
    assert ok(kernel.run("%remote f(3)[0]")).result == "4"
    assert ok(kernel.run("y = %remote --num-cpus 2 f(3)\n(y[0], y[1] != here)")).result == "(4, True)"
    assert ok(kernel.run("_ = [1]\nz = %remote -q [i for i in range(3)]\nz")).result == "[0, 1, 2]"
    run = kernel.run("\n%remote 1 / 0")
    assert run.error == "ZeroDivisionError"
    assert f"Cell In[{run.number}], line 2" in run.traceback
    assert "nbray/" not in run.traceback
    run = kernel.run("%remote --num-cpu 2 f(3)")
    assert (run.error, "did you mean --num-cpus?" in run.text("stderr")) == ("UsageError", True)
    assert kernel.run("%remote").error == "UsageError"


@slow
def test_names_and_resources(kernel: Kernel) -> None:
    run = kernel.run("%%remote -n fitting\n1 / 0")
    assert "task fitting, worker pid" in run.traceback
    assert kernel.run("%%remote --resources TPU=1\n1").error == "UnschedulableError"
    assert ok(kernel.run("%%remote --priority 3 --options max_calls=1\n1 + 1")).result == "2"


@slow
def test_no_stream(kernel: Kernel, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cell = f"print('first')\nopen({str(gate)!r}, 'w').close()\nimport time; time.sleep(0.3)\nprint('second')"
    run = kernel.start(f"%%remote --no-stream\n{cell}")
    kernel.read_until([run], gate.exists)
    assert run.text() == ""
    assert ok(kernel.finish(run)).text() == "first\nsecond\n"


# -- --local


@slow
def test_local(kernel: Kernel) -> None:
    assert ok(kernel.run("%%remote --local\nw = os.getpid()\nw == here")).result == "True"
    assert kernel.run("w == here").result == "True"
    assert ok(kernel.run("%%remote --local\n1 + 1;")).result is None
    run = kernel.run("%%remote --local\n\n1 / 0")
    assert (run.error, f"Cell In[{run.number}], line 3" in run.traceback) == ("ZeroDivisionError", True)
    assert "nbray/" not in run.traceback
    assert kernel.run("%%remote --local\nawait x").error == "UsageError"
    assert "--local" in kernel.run("%%remote\nbreakpoint()").traceback
    assert "--local" in kernel.run("%%remote\ninput()").traceback


# -- other magics


@slow
def test_capture_above(kernel: Kernel) -> None:
    run = ok(kernel.run("%%capture seen\n%%remote\nprint('inside')\ndisplay('shown')\n5"))
    assert (run.text(), run.shown(), run.result) == ("", [], None)
    assert kernel.run("(seen.stdout, len(seen.outputs))").result in ("('inside\\n', 2)", "('inside\\n', 1)")
    ok(
        kernel.run(
            "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as f:\n    %remote print('to f')"
        )
    )
    assert kernel.run("f.getvalue()").result == "'to f\\n'"
    assert ok(kernel.run("%%remote\nprint('outside')")).text() == "outside\n"


@slow
def test_time_above(kernel: Kernel) -> None:
    run = ok(kernel.run("%%time\n%%remote\nprint('inside')\n5"))
    assert run.result == "5"
    assert "Wall time" in run.text()
    assert "inside" in run.text()


@slow
def test_magics_inside(kernel: Kernel) -> None:
    run = ok(kernel.run("%%remote\n%time t = sum(range(10))\n%matplotlib inline\nt"))
    assert run.result == "45"
    assert "Wall time" in run.text()
    assert kernel.run("t").result == "45"
    assert "loops each" in ok(kernel.run("%%remote\n%timeit -n 10 -r 3 sum(range(10))")).text()
    run = ok(kernel.run("%%remote\nname = 'value'\n%env NBRAY_TEST_A={name}\nos.environ['NBRAY_TEST_A']"))
    assert (run.result, run.text()) == ("'value'", "env: NBRAY_TEST_A is set\n")
    assert kernel.run("'NBRAY_TEST_A' in os.environ").result == "False"
    assert ok(kernel.run("%%remote\n%cd -q /\nos.getcwd()")).result == "'/'"
    assert ok(kernel.run("%%remote\n%%time\nsum(range(4))")).result == "6"
    assert "in a cell without %%remote" in kernel.run("%%remote\n%pip install nothing").traceback
    assert (
        "5 loops each"
        in ok(kernel.run("%%remote\n%%timeit -n5 -r2 k = 3\nfor i in range(k):\n    pass")).text()
    )
    assert "above %%remote" in kernel.run("%%remote\n%%capture\n1").traceback


@slow
def test_awaiting_shell_commands_and_nested_calls(kernel: Kernel) -> None:
    cell = (
        "import asyncio\n@nbray.remote\ndef double(x): return 2 * x\n@nbray.remote\nclass Sum:\n    def __init__(self): self.n = 0\n"
        "    def add(self, x):\n        self.n += x\n        return self.n\n    async def slowly(self, x): return x\n"
        "s = Sum.remote()\nword = 'hello'\nout = !echo {word}\na = await double.remote(2)\nawait asyncio.sleep(0)\n"
        "(out[0], a, nbray.get([double.remote(i) for i in range(3)]), nbray.get(s.add.remote(3)), list(nbray.map(lambda x: x + 1, [1, 2])))"
    )
    assert ok(kernel.run(f"%%remote\n{cell}")).result == "('hello', 4, [0, 2, 4], 3, [2, 3])"
