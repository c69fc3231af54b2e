"""The extension in a real kernel, seen from the front end's side of the protocol."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbray import clusters, config
from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow

BOUND = 5.0
"""Seconds within which an interrupt must have the prompt back on a busy machine (0.3 s where nothing else runs)."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with a cluster of two CPUs, for tests that do it no harm."""
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        assert k.run("%load_ext nbray").error is None
        assert k.run("%cluster start --cpus 2").error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


# -- %%remote


def test_names_value_and_output(kernel: Kernel) -> None:
    ok(kernel.run("a = 20"))
    run = ok(kernel.run("%%remote\nprint('there')\nb = a + 1\nb * 2"))
    assert run.result == "42"
    assert run.text() == "there\n"
    assert kernel.run("(b, _)").result == "(21, 42)"


def test_a_semicolon_silences(kernel: Kernel) -> None:
    assert ok(kernel.run("%%remote\n3 * 3;")).result is None
    assert ok(kernel.run("%%remote\n'3;'")).result == "'3;'"


def test_it_runs_in_another_process(kernel: Kernel) -> None:
    assert kernel.run("import os\nhere = os.getpid()").error is None
    assert kernel.run("%%remote\nos.getpid() != here").result == "True"


def test_out_and_in(kernel: Kernel) -> None:
    ok(kernel.run("hidden = 5; expression = 'hidden + 1'"))
    ok(kernel.run("%%remote -o first, second -i hidden\nfirst = eval(expression); second = 2; third = 3"))
    assert kernel.run("(first, second, 'third' in globals())").result == "(6, 2, False)"


def test_functions_and_classes_work_in_the_notebook(kernel: Kernel) -> None:
    ok(kernel.run("unit = 'm'"))
    ok(
        kernel.run(
            "%%remote\ndef show(x): return f'{x} {unit}'\nclass Length:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return show(self.x)\none = Length(1)"
        )
    )
    assert kernel.run("unit = 'km'\n(one, show(2), isinstance(one, Length))").result == "(1 km, '2 km', True)"


def test_an_error_reads_as_if_it_happened_here(kernel: Kernel) -> None:
    helper = ok(kernel.run("def divide(x):\n    # far from here\n    return 1 / x"))
    run = kernel.run("%%remote\nbefore = 1\n\ndivide(0)")
    assert run.error == "ZeroDivisionError"
    assert f"Cell In[{run.number}], line 4\n" in run.traceback
    assert f"Cell In[{helper.number}], line 3, in divide" in run.traceback
    assert "return 1 / x" in run.traceback
    assert "nbray/" not in run.traceback
    assert f"task In[{run.number}], worker pid" in run.traceback.splitlines()[-1]
    assert kernel.run("before").result == "1"


def test_functions_that_came_back_have_their_lines(kernel: Kernel) -> None:
    made = ok(kernel.run("%%remote\n\ndef fails(x):\n    return 1 / x"))
    run = kernel.run("fails(0)")
    assert run.error == "ZeroDivisionError"
    assert f"Cell In[{made.number}], line 4, in fails" in run.traceback
    assert "return 1 / x" in run.traceback


def test_the_users_own_exception_class(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "class Mine(Exception):\n    def __init__(self, code): super().__init__(f'code {code}'); self.code = code"
        )
    )
    run = kernel.run("%%remote\nraise Mine(7)")
    assert (run.error, run.reply["evalue"]) == ("Mine", "code 7")
    assert kernel.run("import sys\n(type(sys.last_value) is Mine, sys.last_value.code)").result == "(True, 7)"


def test_magics_above_do_not_shift_the_lines(kernel: Kernel) -> None:
    run = kernel.run("\n\n%%remote\n1 / 0")
    assert "line 4\n" in run.traceback
    run = kernel.run("%%time\n%%remote\n1 / 0")
    # Older versions of %%time show errors and go on.
    assert "line 3\n" in run.traceback
    assert "ZeroDivisionError" in run.traceback
    run = ok(kernel.run("%%capture seen\n%%remote\nprint('inside')\n5"))
    assert run.result is None


@pytest.mark.parametrize(
    ("cell", "name", "text"),
    [
        ("%%remote\nx = = 1", "SyntaxError", "line 2"),
        ("%%remote\nraise ExceptionGroup('two', [ValueError(1)])", "ExceptionGroup", "ValueError: 1"),
        ("%%remote\nnot_there", "NameError", "----> 2 not_there"),
        (
            "lock = __import__('threading').Lock()\nget_ipython().run_cell_magic('remote', '', 'lock')",
            "SerializationError",
            "'lock'",
        ),
        ("%%remote --timeout 0.2\nimport time; time.sleep(30)", "GetTimeoutError", "--timeout"),
        ("%%remote -i no_such\n1", "NameError", "no_such"),
        ("%%remote --num-cpus 500\n1", "UnschedulableError", "500"),
        ("%%remote\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)", "WorkerCrashedError", "In["),
    ],
)
def test_errors_are_short(kernel: Kernel, cell: str, name: str, text: str) -> None:
    run = kernel.run(cell)
    assert run.error == name
    assert text in run.traceback
    assert "nbray/" not in run.traceback
    assert kernel.run("%%remote\n'next'").result == "'next'"


def test_retries_run_a_cell_again(kernel: Kernel, tmp_path: Path) -> None:
    ok(kernel.run(f"mark = {str(tmp_path / 'mark')!r}"))
    cell = "import os\ntry: os.mkdir(mark)\nexcept FileExistsError: tries = 'second'\nelse: raise OSError('first')"
    assert kernel.run("%%remote\n" + cell).error == "OSError"
    (tmp_path / "mark").rmdir()
    ok(kernel.run("%%remote --retries 1\n" + cell))
    assert kernel.run("tries").result == "'second'"


def test_what_cannot_come_back_is_said(kernel: Kernel) -> None:
    run = ok(kernel.run("%%remote\nimport threading\nkey = threading.Lock()\nfine = 1"))
    assert "key could not be brought here" in run.shown()[0]["text/plain"]
    assert ok(kernel.run("%%remote -q\nimport threading\nkey = threading.Lock()")).shown() == []
    assert kernel.run("'key' in globals()").result == "False"


def test_await_shell_commands_and_displays(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "%%remote\nimport asyncio\nprint('one')\nawait asyncio.sleep(0)\n!echo two\nclass H:\n    def _repr_html_(self): return '<b>h</b>'\n    def __repr__(self): return 'h'\ndisplay(H())\nprint('three')"
        )
    )
    order = [
        m["content"].get("text") or m["content"]["data"]
        for m in run.messages
        if m["msg_type"] in ("stream", "display_data")
    ]
    assert "".join(x for x in order if isinstance(x, str)) == "one\ntwo\nthree\n"
    assert {"text/plain": "h", "text/html": "<b>h</b>"} in order
    assert order.index({"text/plain": "h", "text/html": "<b>h</b>"}) < len(order) - 1


def test_output_comes_while_the_cell_runs(kernel: Kernel, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    run = kernel.start(
        f"%%remote\nimport os, time\nprint('started')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nprint('done')"
    )
    kernel.read_until([run], lambda: "started" in run.text())
    assert "done" not in run.text()
    gate.touch()
    assert ok(kernel.finish(run)).text() == "started\ndone\n"


def test_refs_and_handles_travel_both_ways(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "import nbray\nref = nbray.put([1, 2])\n@nbray.remote\nclass Counter:\n    def __init__(self): self.n = 0\n    def up(self):\n        self.n += 1\n        return self.n\ncounter = Counter.remote()"
        )
    )
    ok(
        kernel.run(
            "%%remote\nvalue = nbray.get(ref)\nnbray.get(counter.up.remote())\nmade = nbray.put('made there')"
        )
    )
    assert (
        kernel.run("(value, nbray.get(counter.up.remote()), nbray.get(made))").result
        == "([1, 2], 2, 'made there')"
    )


def test_remote_functions_and_actor_classes_of_the_notebook(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "import nbray\noffset = 1\n@nbray.remote\ndef shifted(x): return x + offset\n"
            "@nbray.remote\nclass Sum:\n    def __init__(self): self.total = 0\n"
            "    def add(self, x):\n        self.total += x\n        return self.total"
        )
    )
    ok(
        kernel.run(
            "%%remote\noffset = 10\nadder = Sum.remote()\nsums = nbray.get([adder.add.remote(shifted.remote(i)) for i in range(3)])"
        )
    )
    assert kernel.run("(sums, nbray.get(adder.add.remote(shifted.remote(0))))").result == "([10, 21, 33], 43)"


def test_large_arrays_come_back_writable(kernel: Kernel) -> None:
    ok(kernel.run("import numpy as np\nx = np.zeros(300_000)"))
    ok(kernel.run("%%remote\nx += 1\ny = x * 2"))
    assert (
        kernel.run("x[0] = 9; y[1] = 9\n(float(x[0]), float(x[1]), float(y[0]), float(y[1]))").result
        == "(9.0, 1.0, 2.0, 9.0)"
    )


def test_bad_flags_and_subcommands(kernel: Kernel) -> None:
    run = kernel.run("%%remote --num-cpu 2\n1")
    assert run.error == "UsageError"
    assert "did you mean --num-cpus?" in run.text("stderr")
    run = kernel.run("%cluster strat")
    assert (run.error, "did you mean start?" in run.text("stderr")) == ("UsageError", True)
    run = kernel.run("%cluster start --cpu 2")
    assert (run.error, "did you mean --cpus?" in run.text("stderr")) == ("UsageError", True)
    run = kernel.run("%cluster start --store-memory much")
    assert (run.error, "500MB" in run.text("stderr")) == ("UsageError", True)


# -- output


def test_late_output_belongs_to_the_cell_that_started_it(tmp_path: Path) -> None:
    # With a front end, that is: where nobody looks after a cell's end, late output takes another way (test_headless.py).
    with Kernel({"JPY_SESSION_NAME": "late.ipynb"}, cwd=str(tmp_path)) as kernel:
        ok(kernel.run("%load_ext nbray\n%cluster start --cpus 2"))
        _late_output(kernel, tmp_path)


def _late_output(kernel: Kernel, tmp_path: Path) -> None:
    ok(
        kernel.run(
            "import nbray\n@nbray.remote\ndef late(gate, word):\n    import os, time\n    while not os.path.exists(gate): time.sleep(0.01)\n    print(word)"
        )
    )
    gate = tmp_path / "gate"
    first = ok(kernel.run(f"a = late.remote({str(gate)!r}, 'of the first')"))
    second = ok(kernel.run(f"b = late.remote({str(gate)!r}, 'of the second')"))
    third = kernel.start(f"open({str(gate)!r}, 'w').close()\nnbray.get([a, b])\nprint('of the third')")
    kernel.finish(third, first, second)
    kernel.read_until(
        [first, second, third], lambda: "of the first" in first.text() and "of the second" in second.text()
    )
    for run, word in ((first, "first"), (second, "second")):
        assert run.text().startswith("(late, pid ")
        assert run.text().endswith(f") of the {word}\n")
    assert third.text() == "of the third\n"


def test_output_of_tasks_that_a_remote_cell_starts(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "%%remote\nimport nbray\n@nbray.remote\ndef inner(): print('inner')\nprint('outer')\nnbray.get(inner.remote())"
        )
    )
    assert "outer\n" in run.text()
    assert ") inner\n" in run.text()


def test_loading_twice_and_unloading(kernel: Kernel) -> None:
    ok(kernel.run("%load_ext nbray\n%reload_ext nbray"))
    assert ok(kernel.run("%%remote\nprint('once')")).text() == "once\n"
    ok(kernel.run("%unload_ext nbray"))
    assert kernel.run("%cluster status").error == "UsageError"
    ok(kernel.run("%load_ext nbray"))
    assert ok(kernel.run("%%remote\nprint('again')")).text() == "again\n"


# -- interrupts


@pytest.mark.parametrize(
    "cell",
    [
        "%%remote\nimport time\nprint('go')\ntime.sleep(60)",
        "import nbray, time\n@nbray.remote\ndef slow():\n    print('go')\n    time.sleep(60)\nref = slow.remote()\nnbray.get(ref)",
    ],
)
def test_an_interrupt_gives_the_prompt_back(kernel: Kernel, cell: str) -> None:
    run = kernel.start(cell)
    kernel.read_until([run], lambda: "go" in run.text())
    began = time.monotonic()
    kernel.interrupt()
    kernel.finish(run)
    assert run.error == "KeyboardInterrupt"
    assert time.monotonic() - began < BOUND
    assert kernel.run("%%remote\n'next'").result == "'next'"
    if "ref" in cell:
        ok(kernel.run("nbray.cancel(ref)"))


def test_an_interrupted_cell_is_cancelled_with_what_it_started(kernel: Kernel, tmp_path: Path) -> None:
    ok(kernel.run(f"pids = {str(tmp_path)!r}"))
    run = kernel.start(
        "%%remote\nimport nbray, os, time\n@nbray.remote\ndef inner():\n    try:\n        open(f'{pids}/inner', 'w').close()\n        time.sleep(60)\n    finally: open(f'{pids}/ended', 'w').close()\n"
        "ref = inner.remote()\nprint('go')\nnbray.get(ref)"
    )
    kernel.read_until([run], lambda: (tmp_path / "inner").exists())
    kernel.interrupt()
    assert kernel.finish(run).error == "KeyboardInterrupt"
    kernel.read_until([run], lambda: (tmp_path / "ended").exists())
    # Both CPUs are free again.
    assert kernel.run("%%remote --num-cpus 2\n'next'").result == "'next'"


# -- %cluster


def test_cluster_subcommands(kernel: Kernel) -> None:
    text = ok(kernel.run("%cluster start")).shown()[0]["text/plain"]
    assert "was running already" in text
    text = ok(kernel.run("%cluster start --cpus 7")).shown()[0]["text/plain"]
    assert "--cpus 7: it has 2" in text
    bundle = ok(kernel.run("%cluster status")).shown()[0]
    assert "2 of 2 free" in bundle["text/plain"]
    assert "<table>" in bundle["text/html"]
    assert "(this notebook)" in ok(kernel.run("%cluster list")).shown()[0]["text/plain"]
    doctor = ok(kernel.run("%cluster doctor")).shown()[0]["text/plain"]
    for word in ("python", "ipykernel", "CPUs", "memory", "runtime", "cluster", "NBRAY_RUNTIME_DIR"):
        assert word in doctor


# -- life and death: each with a kernel and a cluster of its own


def node_pids(directory: Path) -> list[int]:
    settings = config.settings({"NBRAY_RUNTIME_DIR": str(directory)})
    return [record.pid for record in clusters.list_clusters(settings)]


def gone(pid: int) -> bool:
    """Whether a process has ended; it may be waiting for its parent, a kernel, to look."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_remote_without_a_cluster_starts_one(runtime_dir: Path) -> None:
    with Kernel() as k:
        ok(k.run("%load_ext nbray"))
        assert "No cluster is running" in ok(k.run("%cluster status")).shown()[0]["text/plain"]
        assert k.run("%%remote\nx = = 1").error == "SyntaxError"
        assert node_pids(runtime_dir) == []
        run = ok(k.run("%%remote\n1 + 1"))
        assert run.result == "2"
        assert "started" in run.shown()[0]["text/plain"]
        (pid,) = node_pids(runtime_dir)
        assert "stopped" in ok(k.run("%cluster stop")).shown()[0]["text/plain"]
        assert gone(pid)
        assert ok(k.run("%%remote -q\n2 + 2")).result == "4"


def test_a_clean_shutdown_leaves_nothing(runtime_dir: Path) -> None:
    with Kernel() as k:
        ok(k.run("%load_ext nbray\n%cluster start --cpus 1"))
        (pid,) = node_pids(runtime_dir)
    assert wait_for(lambda: gone(pid))
    assert [path.name for path in runtime_dir.iterdir() if path.is_dir()] == []


def test_a_restart_keeps_the_cluster(runtime_dir: Path) -> None:
    with Kernel() as k:
        ok(k.run("%load_ext nbray\n%cluster start --cpus 1"))
        (pid,) = node_pids(runtime_dir)
        k.restart()
        assert not gone(pid)
        text = ok(k.run("%load_ext nbray\n%cluster start")).shown()[0]["text/plain"]
        assert "was running already" in text
        assert node_pids(runtime_dir) == [pid]
        assert k.run("%%remote\n'works'").result == "'works'"
    assert wait_for(lambda: gone(pid))


def test_a_crash_leaves_the_cluster_to_its_time_to_live(runtime_dir: Path) -> None:
    environment = {"NBRAY_TTL": "1", "JPY_SESSION_NAME": "crash.ipynb"}
    with Kernel(environment) as k:
        ok(k.run("%load_ext nbray\n%cluster start --cpus 1"))
        (pid,) = node_pids(runtime_dir)
        k.kill()
        assert wait_for(lambda: gone(pid))
    assert [path.name for path in runtime_dir.iterdir() if path.is_dir()] == []


def test_a_killed_headless_run_leaves_nothing(runtime_dir: Path) -> None:
    """nbval ends its kernels so; nobody restarts them."""
    with Kernel() as k:
        ok(k.run("%load_ext nbray\n%cluster start --cpus 1"))
        (pid,) = node_pids(runtime_dir)
        k.kill()
        assert wait_for(lambda: gone(pid))
    assert [path.name for path in runtime_dir.iterdir() if path.is_dir()] == []


def test_stop_names_the_other_notebook(runtime_dir: Path) -> None:
    with Kernel({"JPY_SESSION_NAME": "one.ipynb"}) as one, Kernel({"JPY_SESSION_NAME": "two.ipynb"}) as two:
        ok(one.run("%load_ext nbray\n%cluster start --cpus 1"))
        assert (
            "was running already" in ok(two.run("%load_ext nbray\n%cluster start")).shown()[0]["text/plain"]
        )
        run = two.run("%cluster stop")
        assert run.error == "RuntimeError"
        assert "one.ipynb" in run.traceback
        assert "--force" in run.traceback
        (pid,) = node_pids(runtime_dir)
        assert one.run("%%remote\n'still there'").result == "'still there'"
        ok(two.run("%cluster start\n%cluster stop --force"))
        assert wait_for(lambda: gone(pid))


def test_init_in_a_cell_is_noticed(runtime_dir: Path) -> None:
    with Kernel() as k:
        ok(k.run("%load_ext nbray"))
        run = ok(
            k.run(
                "import nbray\nnbray.init(num_cpus=1)\n@nbray.remote\ndef f(): print('f says')\nnbray.get(f.remote())"
            )
        )
        assert run.text().endswith(") f says\n")
        (pid,) = node_pids(runtime_dir)
        k.restart()
        assert not gone(pid)
        os.kill(pid, signal.SIGTERM)
        assert wait_for(lambda: gone(pid))


def test_static_output_is_deterministic(runtime_dir: Path) -> None:
    with Kernel({"NBRAY_STATIC": "1"}) as k:
        card = ok(k.run("%load_ext nbray\n%cluster start --cpus 2")).shown()[0]
        assert list(card) == ["text/plain"]
        assert str(runtime_dir) not in card["text/plain"]
        assert k.run("%%remote\n1 / 0").traceback.endswith("This ran on the cluster")
        run = ok(k.run("import nbray\n@nbray.remote\ndef f(): print('x')\nnbray.get(f.remote())"))
        assert run.text() == "(f) x\n"
