"""``%cluster tasks actors objects where why free cancel`` in a real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow

SETUP = """
import nbray, time, re
@nbray.remote
def nap(seconds, *after):
    time.sleep(seconds)
    return seconds
@nbray.remote
def fail(): raise ValueError("no")
@nbray.remote
class Counter:
    def __init__(self): self.n = 0
    def add(self): self.n += 1; return self.n
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(cwd=str(tmp_path_factory.mktemp("notebook"))) as k:
        ok(k.run("%load_ext nbray\n%cluster start --cpus 2"))
        ok(k.run(SETUP))
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def said(run: Run) -> str:
    return "\n".join(bundle["text/plain"] for bundle in ok(run).shown())


def test_tasks_are_a_frame_with_ids_that_other_commands_take(kernel: Kernel) -> None:
    ok(kernel.run("x = nap.remote(0.01); bad = fail.remote(); nbray.wait([x, bad], num_returns=2)"))
    run = ok(
        kernel.run(
            "table = %cluster tasks\nlist(table.columns), table.loc[table.name == 'fail', ['state', 'error']].values.tolist()"
        )
    )
    assert "[['failed', 'ValueError']]" in str(run.result)
    assert "tasks, " in said(run)
    run = ok(
        kernel.run(
            "short = table.index[table.name == 'fail'][-1]\nget_ipython().run_line_magic('cluster', f'why {short[:6]}')"
        )
    )
    assert "failed with ValueError" in said(run)
    assert ok(kernel.run("%cluster tasks x")).result.count("nap") == 1  # type: ignore[union-attr]


def test_why_pending_follows_the_chain_to_its_cause(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "slow = [nap.remote(30), nap.remote(30)]\nwhile nbray.state.tasks(state='RUNNING').num_rows < 2: nbray.wait(slow, timeout=0.02)\nlast = nap.remote(0, nap.remote(0, nap.options(num_cpus=2).remote(0)))"
        )
    )
    text = said(kernel.run("%cluster why last"))
    assert text.count("waits for the result of nap") == 2
    assert "waits for 2 CPUs" in text
    assert "hold the rest" in text
    cell = ok(
        kernel.run("from IPython import get_ipython; len(get_ipython().history_manager.input_hist_raw) - 3")
    )
    assert "nap" in said(kernel.run(f"%cluster why In[{cell.result}]"))
    where = ok(kernel.run("%cluster where"))
    while "does not answer" in str(where.result):  # a machine with much else to do
        where = ok(kernel.run("%cluster where"))
    assert "line 4, in nap" in where.result.replace("  ", " ")  # type: ignore[union-attr]
    assert "time.sleep(seconds)" in where.result  # type: ignore[operator]
    assert "3 tasks cancelled" in said(kernel.run("%cluster cancel last slow"))
    ended = kernel.run("nbray.get(slow[0])")
    assert ended.error == "TaskCancelledError"


def test_why_a_task_can_never_run(kernel: Kernel) -> None:
    ok(kernel.run("big = nap.options(num_cpus=64).remote(1)"))
    text = said(kernel.run("%cluster why big"))
    assert "failed with UnschedulableError" in text
    assert "64 CPU" in text
    ok(kernel.run("%cluster cancel big"))


def test_objects_say_who_holds_them(kernel: Kernel) -> None:
    ok(kernel.run("import numpy as np\nbig = nbray.put(np.ones(2_000_000)); again = {'x': [big]}"))
    shown = ok(kernel.run("view = nbray.get(big)\nbig"))
    text = said(kernel.run("%cluster why big"))
    assert "shared memory, 15.3 MB" in text
    for name in ("big", "again", "view"):
        assert name in text
    frame = ok(kernel.run("o = %cluster objects big\no['held by'].iloc[0]")).result
    assert f"Out[{shown.number}]" in str(frame)
    assert "put" in ok(kernel.run("o['made by'].iloc[0]")).result  # type: ignore[operator]
    assert "1 object freed, 15.3 MB" in said(kernel.run("del view\n%cluster free big"))
    assert "has no value" in said(kernel.run("%cluster why big"))
    assert kernel.run("nbray.get(big)").error is not None


def test_objects_of_cells_are_held_under_their_names(kernel: Kernel) -> None:
    ok(kernel.run("%%remote\nkept = np.zeros(1_000_000)"))
    assert "kept" in said(kernel.run("%cluster why kept"))


def test_actors(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "c = Counter.remote(); d = Counter.options(name='named').remote(); nbray.get([c.add.remote(), d.add.remote()])"
        )
    )
    run = ok(kernel.run("%cluster actors"))
    assert "Counter" in str(run.result)
    assert "named" in str(run.result)
    assert "alive" in str(run.result)
    assert ok(kernel.run("a = %cluster actors\na['held by'].tolist()")).result == "['c', 'd']"


def test_ordinary_values_and_unknown_words(kernel: Kernel) -> None:
    ok(kernel.run("plain = 3; measurements = [1]"))
    assert "plain is an ordinary value of this notebook: a int" in said(kernel.run("%cluster why plain"))
    run = kernel.run("%cluster why measurments")
    assert "there is no variable, task or cell 'measurments'; did you mean measurements?" in run.text(
        "stderr"
    )
    assert "In[999] has started no tasks" in kernel.run("%cluster cancel In[999]").text("stderr")
    assert "did you mean objects" in kernel.run("%cluster objecs").text("stderr")
    assert "%cluster tasks has no flag --stat; did you mean --state?" in kernel.run(
        "%cluster tasks --stat x"
    ).text("stderr")


def test_help(kernel: Kernel) -> None:
    for line in ("%cluster help", "%cluster --help"):
        text = said(kernel.run(line))
        assert "  start " in text
        assert "  why " in text
    assert "--store-memory SIZE" in said(kernel.run("%cluster start --help"))
    assert said(kernel.run("%cluster help cancel")).startswith("usage: %cluster cancel")


def test_static_frames_have_nothing_that_varies(tmp_path_factory: pytest.TempPathFactory) -> None:
    shown = []
    for _ in range(2):
        with Kernel({"NBRAY_STATIC": "1"}, cwd=str(tmp_path_factory.mktemp("static"))) as k:
            ok(k.run("%load_ext nbray\n%cluster start --cpus 2"))
            ok(k.run(SETUP))
            ok(
                k.run(
                    "c = Counter.remote(); x = nbray.put(b'1' * 100_000); nbray.get([nap.remote(0), nap.remote(0), c.add.remote()])"
                )
            )
            shown.append([ok(k.run(f"%cluster {what}")).result for what in ("tasks", "actors", "objects")])
            shown[-1].append(ok(k.run("[x, c, {'x': x}]")).result)
    assert shown[0] == shown[1]
    assert shown[0][3] == "[ObjectRef(...), ActorHandle(Counter), {'x': ObjectRef(...)}]"
    assert "nap" in str(shown[0][0])


def test_why_stale_and_late(kernel: Kernel) -> None:
    ok(kernel.run("base = 1"))
    ok(kernel.run("%%remote -a\nimport time\ntime.sleep(30)\nlater = base"))
    assert "has run for" in said(kernel.run("%cluster why later"))
    assert "1 task cancelled" in said(kernel.run("%cluster cancel later"))


def test_doctor_is_one_block_with_the_front_end(kernel: Kernel) -> None:
    text = said(kernel.run("%cluster doctor"))
    assert text.startswith("```text\n")
    assert text.endswith("\n```")
    for words in ("ipykernel ", "cgroup", "front end", "none that restarts kernels", "runtime", "spill"):
        assert words in text
