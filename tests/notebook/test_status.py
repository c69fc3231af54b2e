"""The status line of a cell through a real kernel: when it appears, what it ends as, and when it does not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.notebook.kernels import Kernel, Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("status")
    with Kernel({"JPY_SESSION_NAME": str(folder / "status.ipynb")}, cwd=str(folder)) as k:
        for cell in (
            "%load_ext nbray",
            "%cluster start --cpus 2",
            "import nbray, time\n@nbray.remote\ndef nap(seconds=0.2):\n    time.sleep(seconds)\n    return bytes(10)",
            "nbray.get(nap.remote(0))",
        ):
            assert k.run(cell).error is None
        yield k


def lines(run: Run) -> list[str]:
    """All versions of the status line of a cell."""
    found: list[str] = []
    for message in run.messages:
        content: dict[str, Any] = message["content"]
        if str(content.get("transient", {}).get("display_id", "")).startswith("nbray-status-"):
            assert message["msg_type"] == ("update_display_data" if found else "display_data")
            found.append(content["data"]["text/plain"])
    return found


def test_a_quick_cell_stays_clean(kernel: Kernel) -> None:
    for cell in ("nbray.get([nap.remote(0) for _ in range(10)])", "%%remote\n1 + 1"):
        began = time.monotonic()
        run = kernel.run(cell)
        assert run.error is None
        # A busy machine is not quick.
        assert lines(run) == [] or time.monotonic() - began > 0.3
    assert lines(kernel.run("time.sleep(0.5)")) == []


def test_a_plain_cell_that_waits(kernel: Kernel) -> None:
    run = kernel.run("found = nbray.get([nap.remote() for _ in range(12)])")
    assert run.error is None
    seen = lines(run)
    assert 3 <= len(seen) <= 8
    assert "2 running" in seen[0]
    assert "queued" in seen[0]
    assert any(" left" in line for line in seen)
    found = re.match(r"12 tasks: ([\d.]+) s of work in ([\d.]+) s \(([\d.]+)x\)", seen[-1])
    assert found, seen[-1]
    work, wall, ratio = map(float, found.groups())
    assert work >= 2.4
    assert abs(work / wall - ratio) < 0.3


def test_a_cell_on_the_cluster(kernel: Kernel) -> None:
    run = kernel.run("%%remote\ntime.sleep(0.8)\nbig = bytes(3_000_000)")
    assert run.error is None
    seen = lines(run)
    found = re.match(r"1 running \(([0-9a-f]{8})\); ", seen[0])
    assert found, seen[0]
    assert kernel.run(f"%cluster logs {found[1]}").error == "UsageError"  # it has printed nothing
    assert " of work in " in seen[-1]
    assert seen[-1].endswith(", out 2.9 MB")


def test_its_tasks_count_and_its_waiting_is_no_work(kernel: Kernel) -> None:
    run = kernel.run("%%remote\nimport nbray\nfound = nbray.get([nap.remote() for _ in range(8)])")
    assert run.error is None
    found = re.match(r"9 tasks: ([\d.]+) s of work in (\d+ ms|[\d.]+ s) \(([\d.]+)x\)", lines(run)[-1])
    assert found, lines(run)[-1]
    # On two CPUs no more than that can have been done, were it not for the cell itself, which waited.
    assert float(found[3]) <= 2.1


def test_quiet(kernel: Kernel) -> None:
    assert lines(kernel.run("%%remote -q\ntime.sleep(0.8)")) == []


def test_waiting_for_tasks_of_another_cell(kernel: Kernel) -> None:
    first = kernel.run("refs = [nap.remote(0.4) for _ in range(4)]")
    run = kernel.run("found = nbray.get(refs)")
    assert lines(run)[0].startswith(f"waiting for tasks of In[{first.number}]: ")
    assert lines(run)[-1].startswith("waited ")
    assert lines(run)[-1].endswith(f" for tasks of In[{first.number}]")


def test_small_tasks_are_hinted_at(kernel: Kernel) -> None:
    run = kernel.run(
        "@nbray.remote\ndef tiny(): pass\nend = time.time() + 1\nwhile time.time() < end: nbray.get([tiny.remote() for _ in range(1000)])"
    )
    assert run.error is None
    assert "hint: tasks take " in lines(run)[-1]
    assert "nbray.map(f, items)" in lines(run)[-1]


def test_equal_errors_are_one_card(kernel: Kernel) -> None:
    run = kernel.run(
        "@nbray.remote\ndef bad(n):\n    if n % 2: raise ValueError('odd number')\n    return n\n"
        "refs = [bad.remote(n) for n in range(100)]\nnbray.wait(refs, num_returns=100)\nnbray.get(refs)"
    )
    assert "ValueError" in (run.error or "")
    cards = [data["text/plain"] for data in run.shown() if "tasks failed" in data["text/plain"]]
    assert len(cards) == 1
    assert cards[0].splitlines()[0] == "50 of 100 tasks failed"
    assert "50 x ValueError: odd number (first bad " in cards[0]


def test_interrupted_cells_say_what_was_cancelled(kernel: Kernel) -> None:
    run = kernel.start("%%remote\nprint('go')\ntime.sleep(60)")
    kernel.read_until([run], lambda: bool(lines(run)))
    kernel.interrupt()
    kernel.finish(run)
    assert run.error == "KeyboardInterrupt"
    assert kernel.run("1").error is None


def test_nothing_of_it_in_static_notebooks(runtime_dir: object) -> None:
    with Kernel({"NBRAY_STATIC": "1"}) as k:
        assert k.run("%load_ext nbray\n%cluster start --cpus 1").error is None
        run = k.run("%%remote\nimport time; time.sleep(0.6)\nprint('done')")
        assert [m["msg_type"] for m in run.messages if m["msg_type"] not in ("status", "execute_input")] == [
            "stream"
        ]


def test_a_progress_bar_is_shown_instead(kernel: Kernel) -> None:
    run = kernel.run(
        "refs = nbray.progress([nap.remote() for _ in range(8)], label='naps')\nlen(nbray.get(refs))"
    )
    assert run.result == "8"
    assert lines(run) == []
    shown = [m for m in run.messages if m["msg_type"] in ("display_data", "update_display_data")]
    assert len({m["content"]["transient"]["display_id"] for m in shown}) == 1
    assert [m["msg_type"] for m in shown][:2] == ["display_data", "update_display_data"]
    assert "8 of 8 done" in shown[-1]["content"]["data"]["text/plain"]
    assert "<progress value='8' max='8'>" in shown[-1]["content"]["data"]["text/html"]


def test_a_progress_bar_in_a_task(kernel: Kernel) -> None:
    run = kernel.run(
        "%%remote\nimport nbray\nrefs = nbray.progress([nap.remote(0.01) for _ in range(4)])\ndel refs"
    )
    assert run.error is None
    texts = [
        m["content"]["data"].get("text/plain", "")
        for m in run.messages
        if m["msg_type"] in ("display_data", "update_display_data")
    ]
    assert any("4 of 4 done" in text for text in texts)


def test_a_cell_in_the_background_has_its_line(kernel: Kernel) -> None:
    first = kernel.run("%%remote -a\ntime.sleep(1.5)\nlate_value = 3")
    assert first.error is None
    runs = []
    while not any(" of work in " in line for line in lines(first)):
        runs.append(kernel.start("time.sleep(0.1)"))
        kernel.finish(runs[-1], first)
    assert "1 running (" in lines(first)[0]
    assert all(lines(run) == [] for run in runs)
    assert kernel.run("late_value").result == "3"


def test_somebody_who_watches_the_kernel_sees_that_work_goes_on(kernel: Kernel) -> None:
    def alive() -> int:
        return sum(
            m["content"].get("transient", {}).get("display_id") == "nbray-alive"
            for run in (first, second)
            for m in run.messages
        )

    first = kernel.run("from nbray.notebook import status\nstatus.KEEP_ALIVE = 0.2\nref = nap.remote(2)")
    second = kernel.run("status.__name__")
    kernel.read_until([first, second], lambda: alive() >= 2)
    kernel.finish(kernel.start("nbray.get(ref)\nstatus.KEEP_ALIVE = 50.0"), first, second)
