"""Names that the cluster holds for a notebook: freed with the variable, kept through restarts and crashes, brought back when asked for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbray.notebook.attaching import Left, offer, sort
from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow

HELD = """
from nbray.api import context as _context
[(row[1], row[8]) for row in _context.current().engine.query("held")]
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel of a notebook with a path, as Jupyter's servers start them."""
    folder = tmp_path_factory.mktemp("names")
    with Kernel({"JPY_SESSION_NAME": str(folder / "book.ipynb")}, cwd=str(folder)) as k:
        start(k)
        ok(k.run(HELD))
        yield k
        ok(k.run("%cluster stop"))


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel that may be killed."""
    environment = {"JPY_SESSION_NAME": str(tmp_path / "book.ipynb"), "NBRAY_CLUSTER": "book"}
    with Kernel(environment, cwd=str(tmp_path)) as k:
        start(k)
        ok(k.run(HELD))
        yield k
        ok(k.run("%cluster stop"))


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def said(run: Run) -> str:
    return "\n".join(str(bundle.get("text/plain")) for bundle in run.shown())


def start(k: Kernel) -> str:
    return said(ok(k.run("%load_ext nbray\n%cluster start --cpus 2")))


def crash(k: Kernel) -> None:
    """SIGKILL, and a new kernel."""
    k.kill()
    k.client.stop_channels()
    k.manager.restart_kernel(now=True)
    k._killed = False
    k._connect()


def held(k: Kernel) -> dict[str, str]:
    """Names that the cluster holds -> their state."""
    found: list[tuple[str, str]] = eval(ok(k.run(HELD)).result or "[]")
    return dict(found)


def eventually(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def used(k: Kernel) -> int:
    text = "_context.current().engine.query('memory')['used']"
    return int(ok(k.run(text)).result or "0")


# -- one run of the kernel


def test_names_are_held_until_they_are_bound_anew_or_deleted(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nimport numpy as np\nlarge = np.ones(500_000)\nsmall, other = 1.5, [2]"))
    assert {"large", "small", "other"} <= held(kernel).keys()
    ok(kernel.run("small = 3"))
    ok(kernel.run("del other"))
    assert {"large", "small", "other"} & held(kernel).keys() == {"large"}


def test_del_frees_a_large_value_though_its_cell_bound_others(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nimport numpy as np\nlarge = np.ones(500_000)\nhandful = {'a': np.zeros(3)}"))
    before = used(kernel)
    ok(kernel.run("del large"))
    eventually(lambda: used(kernel) <= before - 4_000_000)
    assert "handful" in held(kernel)
    assert ok(kernel.run("handful['a'].sum()")).result == "np.float64(0.0)"


def test_two_names_of_one_value_stay_one(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "%%remote\nimport numpy as np\none = np.ones(500_000)\nsame = [one]\nthird = np.ones(400_000)"
        )
    )
    assert ok(kernel.run("same[0] is one, third.sum() == 400_000")).result == "(True, np.True_)"
    ok(kernel.run("del one"))
    assert ok(kernel.run("same[0].sum()")).result == "np.float64(500000.0)"
    ok(kernel.run("del same, third"))


def test_a_later_cell_takes_a_name_over(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nimport numpy as np\ngrown = np.ones(1_000_000)"))
    before = used(kernel)
    ok(kernel.run("%%remote\ngrown = 1"))
    eventually(lambda: used(kernel) <= before - 8_000_000)
    assert held(kernel)["grown"] == "READY"


def test_what_a_failed_cell_bound_is_not_held(kernel: Kernel) -> None:
    assert kernel.run("%%remote\npartial = 1\n1 / 0").error == "ZeroDivisionError"
    assert ok(kernel.run("partial")).result == "1"
    assert "partial" not in held(kernel)


def test_a_name_bound_here_is_not_taken_by_a_cell_that_was_submitted_before(kernel: Kernel) -> None:
    ok(kernel.run("%%remote -a\nimport time\ntime.sleep(0.5)\nraced = 'there'"))
    ok(kernel.run("raced = 'here'"))
    eventually(lambda: "raced" not in held(kernel))
    assert ok(kernel.run("raced")).result == "'here'"


def test_free_lets_a_name_go(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nfreed = list(range(10))"))
    ok(
        kernel.run(
            "_e = _context.current().engine\n_e.free([_e.ref(r[2]) for r in _e.query('held') if r[1] == 'freed'])"
        )
    )
    assert "freed" not in held(kernel)


def test_a_killed_head_forgets_no_name(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nremembered = 1"))
    code = "[(row[1], row[4]) for row in _context.current().engine.query('names', {'name': 'remembered'})['rows']]"
    before = eventually(lambda: ok(kernel.run(code)).result)
    assert "remembered" in before
    pid = int(ok(kernel.run("_context.current().engine.query('head')['pid']")).result or "0")
    os.kill(pid, signal.SIGKILL)
    assert ok(kernel.run(code)).result == before
    assert held(kernel)["remembered"] == "READY"
    ok(kernel.run("del remembered"))
    eventually(lambda: ok(kernel.run(code)).result == "[]")


# -- runs after one another


def test_a_crash_loses_nothing_and_only_attach_brings_it_back(book: Kernel) -> None:
    ok(book.run("%%remote\nimport numpy as np\nkept_array = np.arange(400_000.0)\nkept_text = 'text'"))
    ok(
        book.run(
            "%%remote\ndef twice(x): return 2 * x\nclass Model: pass\nmodel = Model()\nmodel.weights = [1, 2]"
        )
    )
    ok(book.run("%%remote -a\nimport time\nprint('begins')\ntime.sleep(3)\nprint('ends')\nslow = 42"))
    crash(book)
    card = start(book)
    assert "From earlier runs of this notebook: " in card
    assert "1 task running: %cluster attach" in card
    assert book.run("kept_text").error == "NameError"
    ok(book.run("kept_text = 'mine'"))
    text = said(ok(book.run("%cluster attach")))
    assert "kept_array (3.1 MB)" in text
    assert "still running; it will bind" in text
    assert "so far:\nbegins" in text
    assert (
        "not bound, because this notebook has its own: kept_text (%cluster fetch NAME binds the kept one)"
        in text
    )
    assert ok(
        book.run("kept_array.sum(), kept_text, twice(4), type(model).__name__, model.weights")
    ).result == ("(np.float64(79999800000.0), 'mine', 8, 'Model', [1, 2])")
    assert ok(book.run("kept_array += 1; kept_array[0]")).result == "np.float64(1.0)"
    ok(book.run("%cluster fetch kept_text"))
    assert ok(book.run("kept_text")).result == "'text'"
    assert ok(book.run("slow")).result == "42"
    ok(book.run("del kept_array"))
    assert "kept_array" not in held(book)


@pytest.mark.parametrize("how", [Kernel.restart, crash])
def test_a_cell_that_the_kernel_waits_for_goes_on_without_it(
    book: Kernel, how: Callable[[Kernel], None]
) -> None:
    """Jupyter interrupts a kernel before it restarts it: that is no interrupt of the cell."""
    folder = ok(book.run("import os; os.getcwd()")).result
    run = book.start(
        "%%remote\nimport os, time\nprint('begins', flush=True)\nwhile not os.path.exists('gate'):\n    time.sleep(0.01)\nwaited = 6"
    )
    book.read_until([run], lambda: "begins" in run.text())
    how(book)
    assert "1 task running" in start(book)
    ok(book.run("%cluster attach"))
    ok(book.run(f"open({folder} + '/gate', 'w').close()"))
    assert ok(book.run("waited")).result == "6"


def test_a_cell_that_ends_while_no_kernel_is_there_binds_its_names_and_its_output_is_shown(
    book: Kernel,
) -> None:
    ok(book.run("%%remote -a\nimport time\ntime.sleep(1.5)\nprint('said to nobody')\nalone = 5"))
    crash(book)
    start(book)
    eventually(lambda: held(book).get("alone") == "READY")
    run = ok(book.run("%cluster attach alone"))
    assert "attached 1 name" in said(run)
    assert "while no kernel was there:\nsaid to nobody" in said(run)
    assert ok(book.run("alone")).result == "5"


def test_what_failed_while_no_kernel_was_there_is_told(book: Kernel) -> None:
    ok(book.run("%%remote -a\nimport time\ntime.sleep(1)\nnever = 1 / 0"))
    crash(book)
    start(book)
    eventually(lambda: held(book).get("never") == "FAILED")
    text = said(ok(book.run("%cluster attach")))
    assert "never: In[3] failed while no kernel was there: ZeroDivisionError: division by zero" in text
    assert "nothing is left" in said(ok(book.run("%cluster attach")))


def test_output_of_a_running_cell_goes_to_the_cell_that_attached_it(book: Kernel) -> None:
    gate = ok(book.run("import os; os.getcwd()")).result
    ok(
        book.run(
            "%%remote -a\nimport os, time\nwhile not os.path.exists('gate'):\n    time.sleep(0.01)\nprint('through')\nopened = True"
        )
    )
    crash(book)
    start(book)
    run = ok(book.run("%cluster attach"))
    ok(book.run(f"open({gate} + '/gate', 'w').close()"))
    assert ok(book.run("opened")).result == "True"
    after = [m for m in book.others if m["parent_header"].get("msg_id") == run.msg_id]
    assert any("through" in str(m["content"]) for m in after)


def test_a_late_name_can_be_fetched(kernel: Kernel) -> None:
    ok(kernel.run("%%remote -a\nimport time\ntime.sleep(0.3)\ntardy = 4"))
    ok(kernel.run("%cluster fetch tardy"))
    assert ok(kernel.run("tardy")).result == "4"
    assert "tardy" in held(kernel)
    ok(kernel.run("tardy = 5"))


def test_init_in_a_notebook_is_the_notebooks_session_too(book: Kernel) -> None:
    ok(book.run("%cluster stop"))
    ok(book.run("import nbray\nnbray.init(num_cpus=1)"))
    ok(book.run("%%remote\nfrom_init = 3"))
    crash(book)
    ok(book.run("%load_ext nbray\nimport nbray\nnbray.init()"))
    assert "from_init" in str(
        ok(book.run("nbray.attach('from_init')\nfrom_init, list(nbray.names())")).result
    )


def test_restart_and_run_all_is_clean_and_replaces_what_was_kept(book: Kernel) -> None:
    ok(book.run("%%remote\nagain = 'first'"))
    book.restart()
    start(book)
    ok(book.run("%%remote\nagain = 'second'"))
    assert ok(book.run("again")).result == "'second'"
    assert "again" not in said(ok(book.run("%cluster attach")))
    assert ok(book.run("again")).result == "'second'"


def test_lineage_comes_back_too(book: Kernel) -> None:
    ok(book.run("step = 2"))
    ok(book.run("%%remote\nwalked = step * 10"))
    crash(book)
    start(book)
    ok(book.run("%cluster attach"))
    ok(
        book.run(
            "from nbray.notebook.extension import cockpit_of\nlineage = cockpit_of(get_ipython()).trace.lineage\nmade = lineage.current['walked']"
        )
    )
    assert (
        ok(book.run("made.cell.title, lineage.sources[made.cell.digest]")).result
        == "('In[4]', '%%remote\\nwalked = step * 10')"
    )


def test_named_actors_come_back(book: Kernel) -> None:
    ok(
        book.run(
            "import nbray\n@nbray.remote\nclass Counter:\n    n = 0\n    def add(self):\n        self.n += 1\n        return self.n\n"
            "counter = Counter.options(name='counter').remote()\nnbray.get([counter.add.remote(), counter.add.remote()])"
        )
    )
    crash(book)
    assert "1 named actor" in start(book)
    run = book.run("import nbray\nnbray.get_actor('counter')")
    assert "was made by an earlier run of this notebook's kernel" in run.traceback
    assert "actors: counter" in said(ok(book.run("%cluster attach")))
    assert ok(book.run("import nbray\nnbray.get(counter.add.remote())")).result == "3"
    ok(book.run("nbray.kill(counter)\ndel counter"))


def test_a_later_run_makes_its_own_actor_of_the_same_name(book: Kernel) -> None:
    cell = (
        "import nbray\n@nbray.remote\nclass Tally:\n    n = 0\n    def add(self):\n        self.n += 1\n        return self.n\n"
        "tally = Tally.options(name='tally').remote()\nnbray.get(tally.add.remote())"
    )
    assert ok(book.run(cell)).result == "1"
    book.restart()
    start(book)
    assert ok(book.run(cell)).result == "1"
    assert "actors" not in said(ok(book.run("%cluster attach")))
    ok(book.run("del tally"))


def test_a_client_that_goes_and_comes_back_misses_nothing(book: Kernel) -> None:
    """Closing the tab, or restarting the Jupyter server: the kernel lives on without anybody listening."""
    book.start("%%remote\nimport time\ntime.sleep(1)\nunheard = 8")
    book.client.stop_channels()
    book._connect()
    eventually(lambda: book.run("unheard").result == "8")


def test_fetch_explains_and_suggests(book: Kernel) -> None:
    run = ok(book.run("%%remote\nimport threading\nlock = threading.Lock()\nnumber = 1"))
    assert "lock could not be brought here" in said(run)
    run = book.run("%cluster fetch lock")
    assert run.error == "NbrayError"
    assert "lock was not kept: " in run.traceback
    run = book.run("%cluster fetch numbr")
    assert run.error == "ValueError"
    assert "did you mean number?" in run.traceback


def test_keep_survives_the_cluster(book: Kernel) -> None:
    ok(book.run("%%remote\nimport numpy as np\nprecious = np.arange(300_000)\ncheap = 1"))
    text = said(ok(book.run("%cluster keep precious")))
    assert "precious (2.3 MB)" in text
    run = book.run("%cluster keep precius")
    assert "did you mean precious?" in run.traceback
    ok(book.run("%cluster stop"))
    crash(book)
    assert "1 result on disk, 2.3 MB: %cluster attach" in start(book)
    assert "precious (2.3 MB)" in said(ok(book.run("%cluster attach")))
    assert ok(book.run("precious.sum()")).result == "np.int64(44999850000)"
    assert "precious" in held(book)
    assert book.run("cheap").error == "NameError"
    assert "precious" in said(ok(book.run("%cluster keep")))
    assert "nothing of this notebook's results is on disk" in said(
        ok(book.run("%cluster keep --forget precious"))
    )


def test_results_outlive_a_cluster_that_ends_because_nobody_came_back(tmp_path: Path) -> None:
    book = str(tmp_path / "ttl.ipynb")
    with Kernel({"JPY_SESSION_NAME": book, "NBRAY_TTL": "1", "NBRAY_CLUSTER": "ttl"}, cwd=str(tmp_path)) as k:
        start(k)
        ok(k.run("%%remote\nimport numpy as np\nlarge = np.arange(200_000)\nsmall = 'text'"))
        ok(k.run("import nbray\nref = nbray.put(1)"))
        ok(k.run("%%remote\nholder = [ref]"))
        pid = int(ok(k.run("nbray.api.context.current().engine.details()['node_pid']")).result.strip("'"))  # type: ignore[union-attr]
        k.kill()
        eventually(lambda: not Path(f"/proc/{pid}").exists())
        crash(k)
        assert "results on disk, 1.5 MB" in start(k)
        text = said(ok(k.run("%cluster attach")))
        assert "large (1.5 MB)" in text
        assert ok(k.run("large.sum(), small")).result == "(np.int64(19999900000), 'text')"
        assert k.run("holder").error == "NameError"
        assert "nothing of this notebook's results is on disk" in said(ok(k.run("%cluster keep")))
        ok(k.run("%cluster stop"))


def test_another_notebook_reads_the_results(kernel: Kernel, tmp_path: Path) -> None:
    ok(
        kernel.run(
            "%%remote\nfactor = 3\ndef scaled(x): return factor * x\nimport numpy as np\nshared = np.ones(200_000)"
        )
    )
    script = str(tmp_path / "other.ipynb")
    with Kernel({"JPY_SESSION_NAME": script}, cwd=str(tmp_path)) as other:
        start(other)
        ok(other.run("import nbray\ntheirs = nbray.names('book.ipynb')"))
        assert (
            ok(other.run("theirs['shared'].sum(), theirs['scaled'](2)")).result == "(np.float64(200000.0), 6)"
        )
        assert "shared: 1.5 MB, In[" in str(ok(other.run("theirs")).result)
        assert "did you mean 'shared'?" in other.run("theirs['shard']").traceback
        assert (
            "no notebook on this cluster is called 'nook.ipynb'"
            in other.run("nbray.names('nook.ipynb')").traceback
        )
        assert ok(other.run("len(nbray.names())")).result == "0"


def test_the_verbs_have_twins(book: Kernel) -> None:
    ok(book.run("%%remote\ntwin = [1]\nlate = 2"))
    assert ok(
        book.run(
            "import nbray\nnbray.keep('twin'), nbray.keep('twin', forget=True), nbray.fetch('twin', 'late')"
        )
    ).result == ("(['late', 'twin'], [], ([1], 2))")
    crash(book)
    start(book)
    assert "attached 1 name" in str(ok(book.run("import nbray\nnbray.attach('twin')")).result)
    assert ok(book.run("nbray.fetch('late')")).result == "2"


def test_lists_of_a_fan_out_come_back(book: Kernel) -> None:
    run = book.run("%%remote --map n=[1, 0, 2]\nhalf = 1 / n")
    assert run.error == "ItemsFailedError"
    crash(book)
    start(book)
    assert "half" in said(ok(book.run("%cluster attach half")))
    assert (
        ok(book.run("half[0], type(half[1]).__name__, half[2]")).result == "(1.0, 'ZeroDivisionError', 0.5)"
    )


def test_a_server_that_shuts_its_kernels_down_loses_no_result(tmp_path: Path) -> None:
    environment = {"JPY_SESSION_NAME": str(tmp_path / "book.ipynb"), "NBRAY_CLUSTER": "ended"}
    with Kernel(environment, cwd=str(tmp_path)) as k:
        start(k)
        ok(k.run("%%remote\nimport numpy as np\nlarge = np.arange(200_000)\nsmall = 'text'"))
        node = ok(k.run("import nbray\nnbray.api.context.current().engine.details()['node_pid']")).result
    eventually(lambda: not Path(f"/proc/{str(node).strip(chr(39))}").exists())
    with Kernel(environment, cwd=str(tmp_path)) as k:
        assert "2 results on disk, 1.5 MB: %cluster attach" in start(k)
        ok(k.run("%cluster attach"))
        assert ok(k.run("large.sum(), small")).result == "(np.int64(19999900000), 'text')"
        ok(k.run("%cluster stop"))


def test_a_crash_in_the_middle_of_a_fan_out_loses_only_what_had_not_begun(book: Kernel) -> None:
    folder = ok(book.run("import os; os.getcwd()")).result
    cell = "import os, time\nwhile n > 5 and not os.path.exists('gate'):\n    time.sleep(0.01)\nsquare = n * n\nprint('did', n, flush=True)"
    run = book.start(f"%%remote --map n=range(40)\n{cell}")
    book.read_until([run], lambda: "did 5" in run.text())
    crash(book)
    start(book)
    ok(book.run(f"open({folder} + '/gate', 'w').close()"))
    ok(book.run("%cluster attach square"))
    assert ok(book.run("square[:8], len(square), type(square[-1]).__name__")).result == (
        "([0, 1, 4, 9, 16, 25, 36, 49], 40, 'TaskCancelledError')"
    )


def test_part_of_a_list_comes_back(book: Kernel) -> None:
    cell = "import nbray\nfrom nbray.notebook.extension import cockpit_of\nnames = cockpit_of(get_ipython()).names"
    ok(book.run("%%remote --map n=[1, 2]\ndouble = 2 * n"))
    ok(book.run(f"{cell}\nfrom nbray.api import context"))
    ok(
        book.run(
            "engine = context.current().engine\nrow = [r for r in engine.query('held') if r[1] == 'double'][0]\n"
            "names.gather(['double'], [*engine.get([engine.ref(row[2])], None)[0].results, None])"
        )
    )
    crash(book)
    start(book)
    ok(book.run("%cluster attach double"))
    assert ok(book.run("double[:2], type(double[2]).__name__")).result == "([2, 4], 'TaskCancelledError')"


# -- what is stale


def test_stale_results_are_told_once(kernel: Kernel) -> None:
    def cell(code: str, cell_id: str) -> str:
        message = kernel.client.session.msg(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
            metadata={"cellId": cell_id},
        )
        kernel.client.shell_channel.send(message)
        return said(ok(kernel.finish(Run(message["header"]["msg_id"]))))

    cell("rate = 3", "a")
    cell("%%remote\nfitted = rate * 2", "b")
    assert cell("fitted", "c") == ""
    cell("rate = 3", "a")
    assert cell("fitted", "c") == ""
    cell("rate = 4", "a")
    assert "nbray: fitted is stale: In[" in cell("fitted", "c")
    assert cell("fitted", "c") == ""
    assert cell("%%remote\nfitted = rate * 2", "b") == ""
    assert cell("fitted", "c") == ""
    cell("rate = 5", "a")
    assert "is stale" in cell("%%remote\nscore = fitted + 1", "d")
    cell("rate = 6", "a")
    ok(kernel.run("%cluster start --no-stale-hints"))
    assert cell("fitted", "c") == ""


# -- pure parts


def test_the_offer_names_what_there_is() -> None:
    assert offer(Left()) == ""
    assert offer(sort([], 3)) == ""
    assert (
        offer(sort([], 3, ["counter"]))
        == "From earlier runs of this notebook: 1 named actor: %cluster attach"
    )
