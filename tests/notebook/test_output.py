"""What tasks print and show, through a real kernel: in the cell that started them, in order, bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebook.kernels import Kernel, Run, is_status

pytestmark = pytest.mark.slow

HELPER = """
import warnings, logging, sys
from IPython.display import HTML, clear_output, display, update_display

def show(text):
    display(HTML(f"<b>{text}</b>"))

def say(text):
    print(text)
    print(text + " to stderr", file=sys.stderr)
    warnings.warn(text + " as a warning", stacklevel=1)
    logging.getLogger("helper").warning(text + " in the log")
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel under a front end, with a cluster of two CPUs."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "helper.py").write_text(HELPER)
    with Kernel({"JPY_SESSION_NAME": str(folder / "output.ipynb")}, cwd=str(folder)) as k:
        for cell in ("%load_ext nbray", "%cluster start --cpus 2", "import nbray, os, time, helper"):
            assert k.run(cell).error is None
        yield k


def ok(run: Run) -> Run:
    assert run.error is None, run.traceback or run.text("stderr")
    return run


def order(run: Run) -> list[str]:
    """Texts and displays of a cell, in the order in which they came; whole lines."""
    found: list[str] = []
    for message in run.messages:
        content: dict[str, Any] = message["content"]
        if message["msg_type"] == "stream":
            found += content["text"].splitlines()
        elif message["msg_type"] == "display_data" and not is_status(content):
            found.append(content["data"].get("text/html") or content["data"]["text/plain"])
    return found


def final(run: Run, *more: Run) -> dict[str, dict[str, Any]]:
    """Displays with an id, as the front end has them after all updates."""
    found: dict[str, dict[str, Any]] = {}
    for message in [m for each in (run, *more) for m in each.messages]:
        if message["msg_type"] in ("display_data", "update_display_data"):
            known = message["content"]["transient"].get("display_id")
            if (
                known
                and not is_status(message["content"])
                and (known in found or message["msg_type"] == "display_data")
            ):
                found[known] = message["content"]["data"]
    return found


def test_order_is_kept_across_streams_and_displays(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "%%remote\nimport sys\nprint('one')\nprint('two', file=sys.stderr)\nhelper.show('three')\nprint('four')\ndisplay('five')\nprint('six')"
        )
    )
    assert order(run) == ["one", "two", "<b>three</b>", "four", "'five'", "six"]


def test_prints_warnings_and_logging_of_a_helper_module(kernel: Kernel) -> None:
    run = ok(kernel.run("@nbray.remote\ndef f(): helper.say('hello')\nnbray.get(f.remote())"))
    assert ") hello\n" in run.text()
    err = run.text("stderr")
    for text in ("hello to stderr", "UserWarning: hello as a warning", "hello in the log"):
        assert text in err
    assert all(line.startswith("(f, pid ") for line in err.splitlines())


def test_displays_of_a_helper_module_in_a_task(kernel: Kernel) -> None:
    run = ok(kernel.run("@nbray.remote\ndef f(): helper.show('from a task')\nnbray.get(f.remote())"))
    assert {"text/html": "<b>from a task</b>"}.items() <= run.shown()[0].items()


def test_updates_find_their_display_and_tasks_do_not_meet(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "@nbray.remote\ndef f(n):\n    from IPython.display import display, update_display\n    display(f'first {n}', display_id='same')\n"
            "    time.sleep(0.2)\n    update_display(f'last {n}', display_id='same')\n"
            "nbray.get([f.remote(n) for n in range(2)])"
        )
    )
    shown = final(run)
    assert sorted(data["text/plain"] for data in shown.values()) == ["'last 0'", "'last 1'"]


def test_a_handle_of_the_built_in_display(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "%%remote\nhandle = display('a', display_id=True)\nfor n in range(1000): handle.update(n)\nhandle.update('z')\ndel handle"
        )
    )
    assert [data["text/plain"] for data in final(run).values()] == ["'z'"]
    assert len(run.messages) < 60


def test_clear_output_in_a_loop(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "%%remote\nfrom IPython.display import clear_output\nfor n in range(20_000):\n    clear_output(wait=True)\n    print(n)"
        )
    )
    cleared = [i for i, m in enumerate(run.messages) if m["msg_type"] == "clear_output"]
    after = "".join(m["content"]["text"] for m in run.messages[cleared[-1] :] if m["msg_type"] == "stream")
    assert after == "19999\n"
    assert len(cleared) < 100


def test_figures_that_are_left_open_are_shown(kernel: Kernel) -> None:
    pytest.importorskip("matplotlib")
    run = ok(
        kernel.run(
            "%%remote\nimport matplotlib.pyplot as plt\nprint('before')\nplt.plot([1, 2])\nprint('after');"
        )
    )
    assert sum("image/png" in data for data in run.shown()) == 1
    assert run.text() == "before\nafter\n"
    run = ok(
        kernel.run(
            "@nbray.remote\ndef plot():\n    import matplotlib.pyplot as plt\n    plt.figure(); plt.figure(); plt.plot([2, 1])\n    plt.show()\n"
            "    fig, ax = plt.subplots()\n    return fig\nfig = nbray.get(plot.remote())"
        )
    )
    # As in the notebook, a figure without anything in it is not shown.
    assert sum("image/png" in data for data in run.shown()) == 2
    run = ok(kernel.run("%%remote\nimport matplotlib.pyplot as plt\nlen(plt.get_fignums())"))
    assert run.result == "0"
    run = kernel.run("%%remote\nplt.plot([1, 2])\n1 / 0")
    assert run.error == "ZeroDivisionError"
    assert sum("image/png" in data for data in run.shown()) == 1


def test_frames_are_shown_as_tables(kernel: Kernel) -> None:
    run = ok(kernel.run("%%remote\nimport pandas as pd\ndisplay(pd.DataFrame({'a': [1]}))\ndel pd"))
    assert "<table" in run.shown()[0]["text/html"]


def test_widgets_are_left_out_with_a_note(kernel: Kernel) -> None:
    pytest.importorskip("ipywidgets")
    run = ok(kernel.run("%%remote\nimport ipywidgets\ndisplay(ipywidgets.IntSlider())\ndel ipywidgets"))
    (shown,) = run.shown()
    assert list(shown) == ["text/plain"]
    assert "IntSlider: widgets need the notebook's own process" in shown["text/plain"]


def test_threads_and_programs_of_a_task_write_into_its_cell(kernel: Kernel) -> None:
    first = ok(
        kernel.run(
            "@nbray.remote\ndef f():\n    import subprocess, threading\n    threading.Thread(target=print, args=('thread',)).start()\n"
            "    subprocess.run('echo program', shell=True)\n    os.write(1, b'descriptor\\n')\nref = f.remote()"
        )
    )
    second = kernel.start("nbray.get(ref)")
    ok(kernel.finish(second, first))
    words = ("thread", "program", "descriptor")
    kernel.read_until([first, second], lambda: all(word in first.text() for word in words))
    assert second.text() == ""


def test_late_output_of_a_task_of_a_task(kernel: Kernel, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = ok(
        kernel.run(
            f"@nbray.remote\ndef inner(word):\n    while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n    print(word)\n    display(word)\n    import helper; helper.show(word)\n"
            "@nbray.remote\ndef outer(word): return nbray.get(inner.remote(word))\nref = outer.remote('late')"
        )
    )
    second = kernel.start(f"open({str(gate)!r}, 'w').close()\nnbray.get(ref)\nprint('second')")
    kernel.finish(second, first)
    kernel.read_until([first, second], lambda: len(first.shown()) == 2 and "late" in first.text())
    assert second.text() == "second\n"
    assert second.shown() == []
    assert first.text().endswith(") late\n")


def test_bars_of_several_tasks_are_one_display(kernel: Kernel) -> None:
    run = ok(
        kernel.run(
            "@nbray.remote\ndef work(n):\n    import sys\n    for i in range(101):\n        print(f'\\r{n}: {i}%', end='', file=sys.stderr)\n        time.sleep(0.005)\n    print(file=sys.stderr)\n"
            "nbray.get([work.remote(n) for n in range(2)])"
        )
    )
    bars = [data for name, data in final(run).items() if "bars" in name]
    assert len(bars) == 1
    lines = bars[0]["text/plain"].splitlines()
    assert sorted(line.split(") ")[1] for line in lines) == ["0: 100%", "1: 100%"]


FLOOD = """
@nbray.remote
def flood(n, seconds):
    end = time.time() + seconds
    i = 0
    while time.time() < end:
        for _ in range(1000):
            print(n, i, 'x' * 40)
            i += 1
    print('the end of', n)
    return i
"""


def test_a_flood_is_bounded_folded_counted_and_wholly_in_the_log(kernel: Kernel) -> None:
    ok(kernel.run(FLOOD))
    run = kernel.start("counts = nbray.get([flood.remote(n, 3) for n in range(2)])")
    arrived: list[tuple[float, int]] = []
    seen = 0

    def done() -> bool:
        nonlocal seen
        now = time.monotonic()
        for message in run.messages[seen:]:
            arrived.append((now, len(json.dumps(message, default=str))))
        seen = len(run.messages)
        return any(
            m["msg_type"] == "status" and m["content"]["execution_state"] == "idle" for m in run.messages
        )

    kernel.read_until([run], done)
    lines = run.text().splitlines()
    for at, _ in arrived:
        window = [size for when, size in arrived if at <= when < at + 1.0]
        assert len(window) <= 300
        assert sum(window) <= 1_100_000
    assert any("the end of 0" in line for line in lines[-12:])
    assert any("the end of 1" in line for line in lines[-12:])
    folds = [data["text/plain"] for name, data in final(run).items() if "fold" in name]
    assert any("lines of 2 tasks folded, %cluster logs In[" in text for text in folds), folds
    kernel.client.get_shell_msg(timeout=10)
    total = int(ok(kernel.run("print(sum(counts))")).text())
    assert total > 20_000
    folded = sum(int(text.split()[1].replace(",", "")) for text in folds)
    assert folded + len(lines) == total + 2


def test_logs_of_a_cell_a_task_and_a_variable(kernel: Kernel, tmp_path: Path) -> None:
    run = ok(
        kernel.run(
            "@nbray.remote\ndef count(n):\n    for i in range(n): print('line', i)\nref = count.remote(5000)\nnbray.get(ref)"
        )
    )
    assert len(run.text().splitlines()) < 2000
    file = tmp_path / "log"
    ok(kernel.run(f"%cluster logs In[{run.number}] --save {file}"))
    assert file.read_text().splitlines() == [f"line {i}" for i in range(5000)]
    assert ok(kernel.run(f"%cluster logs {run.number} --tail 2")).text() == "line 4998\nline 4999\n"
    assert ok(kernel.run("%cluster logs ref --tail 1")).text() == "line 4999\n"
    short = ok(
        kernel.run(
            "table = nbray.state.logs(tail=1)\nfrom nbray import ids\nprint(ids.short(bytes.fromhex(table['task_id'][0].as_py())), table.num_rows, table['text'][0])"
        )
    ).text()
    word, rows, last = short.split(maxsplit=2)
    assert (rows, last) == ("1", "line 4999\n")
    assert ok(kernel.run(f"%cluster logs {word} --tail 1")).text() == "line 4999\n"
    text = ok(kernel.run(f"%cluster logs In[{run.number}]")).text()
    assert text.startswith("... the last 2,000 of 5,000 lines; ")
    assert "5,000 lines" in ok(kernel.run("%cluster logs")).shown()[0]["text/plain"]
    assert kernel.run("%cluster logs In[100000]").error == "UsageError"
    assert "test_logs" not in kernel.run("%cluster logs no_such").traceback


def test_the_prompt_answers_during_a_flood(kernel: Kernel) -> None:
    first = ok(kernel.run("refs = [flood.remote(n, 4) for n in range(2)]"))
    arrived: list[tuple[float, int]] = []
    waits: list[float] = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        began = time.monotonic()
        run = kernel.start("1 + 1")
        kernel.finish(run, first)
        waits.append(time.monotonic() - began)
        assert run.result == "2"
        assert run.text() == ""
        arrived += [
            (time.monotonic(), len(json.dumps(m, default=str))) for m in first.messages[len(arrived) :]
        ]
    assert sorted(waits)[len(waits) // 2] < 0.5
    run = ok(kernel.finish(kernel.start("sum(nbray.get(refs))"), first))
    total = int(run.result or 0)
    kernel.read_until([first], lambda: "the end of 0" in first.text() and "the end of 1" in first.text())
    for at, _ in arrived:
        window = [size for when, size in arrived if at <= when < at + 1.0]
        assert len(window) <= 300
        assert sum(window) <= 1_100_000
    assert total > 20_000
    assert len(first.text()) < 400_000


def test_late_output_is_in_its_cell_every_time(kernel: Kernel) -> None:
    ok(
        kernel.run(
            "@nbray.remote\ndef late(cell, pause):\n    time.sleep(pause)\n    print('printed', cell)\n"
            "    handle = display('shown %d' % cell, display_id='id')\n    handle.update('updated %d' % cell)\n    helper.show('rich %d' % cell)\n"
            "every = []"
        )
    )
    runs: list[Run] = []
    for number in range(100):
        pauses = [0.01 * ((number * 7 + k * 3) % 9) for k in range(2)]
        run = kernel.start(
            f"every += [late.remote({number}, pause) for pause in {pauses}]\nprint('own', {number})"
        )
        runs.append(run)
        kernel.finish(run, *runs[:-1])
    last = kernel.start("nbray.get(every)")
    ok(kernel.finish(last, *runs))

    def complete(number: int) -> bool:
        text = json.dumps([m["content"] for m in runs[number].messages])
        return text.count("rich") >= 2 and text.count("printed") >= 2

    kernel.read_until([last, *runs], lambda: all(map(complete, range(len(runs)))))
    words = ("printed", "shown", "updated", "rich", "own")
    for number, run in enumerate(runs):
        text = json.dumps(
            [m["content"] for m in run.messages if m["msg_type"] not in ("execute_input", "execute_reply")]
        )
        for other in range(len(runs)):
            if other != number:
                assert not any(f"{word} {other}\\" in text or f"{word} {other}<" in text for word in words)
        assert text.count(f"rich {number}<") >= 2
        assert f"updated {number}'" in text
    assert last.text() == "" and last.shown() == []
