"""Floods of output, as a pure machine decides on them: what is shown, what is folded, how much goes out per second."""

from __future__ import annotations

import json
import re
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from nbray.notebook.folding import TAIL_LINES, Outlet, Send, overwritten

CELL = "In[7] c d r"


def outlet(*, plain: bool = False) -> Outlet:
    made = Outlet(plain=plain)
    made.cell(CELL, "In[7]")
    return made


def shown(sent: list[Send]) -> str:
    return "".join(s.content["text"] for s in sent if s.kind == "stream")


def panel(sent: list[Send]) -> str:
    """The counting line as it stands after all updates."""
    texts = [s.content["data"]["text/plain"] for s in sent if "data" in s.content]
    return texts[-1] if texts else ""


def run_out(machine: Outlet, now: float) -> tuple[list[Send], float]:
    """Take until nothing is due any more."""
    sent: list[Send] = []
    while True:
        sent += machine.take(now)
        due = machine.due(now)
        if due is None:
            return sent, now
        now += due


def test_a_few_lines_go_at_once_and_unchanged() -> None:
    machine = outlet()
    machine.text(0.0, CELL, b"t", "", "stdout", "one\n")
    machine.text(0.0, CELL, b"t", "", "stdout", "two")
    assert shown(machine.take(0.0)) == "one\ntwo"
    assert machine.due(0.0) is None


def test_marks_stand_before_each_line_and_lines_of_tasks_are_kept_apart() -> None:
    machine = outlet()
    machine.text(0.0, CELL, b"a", "(a) ", "stdout", "one\ntw")
    machine.text(0.0, CELL, b"a", "(a) ", "stdout", "o\nthree")
    machine.text(0.0, CELL, b"b", "(b) ", "stdout", "x\n")
    assert shown(run_out(machine, 0.0)[0]) == "(a) one\n(a) two\n(a) three\n(b) x\n"


def test_a_flood_is_folded_counted_and_its_end_is_shown() -> None:
    machine = outlet()
    sent: list[Send] = []
    now, number = 0.0, 0
    for _ in range(100):
        for task in (b"a", b"b"):
            text = "".join(f"{task.decode()}{number + i}\n" for i in range(500))
            machine.text(now, CELL, task, "", "stdout", text)
        number += 500
        sent += machine.take(now)
        now += 0.01
    machine.text(now, CELL, b"a", "", "stdout", "the end of a\n", end=True)
    machine.text(now, CELL, b"b", "", "stdout", "the end of b\n", end=True)
    rest, _ = run_out(machine, now)
    sent += rest
    lines = shown(sent).splitlines()
    assert "the end of a" in lines[-10:] and "the end of b" in lines[-10:]
    found = re.fullmatch(
        r"\.\.\. ([\d,]+) lines of 2 tasks folded, %cluster logs In\[7\] shows all", panel(sent)
    )
    assert found, panel(sent)
    assert int(found[1].replace(",", "")) + len(lines) == 100_002


def test_folding_ends_when_the_flood_does() -> None:
    machine = outlet()
    machine.text(0.0, CELL, b"a", "", "stdout", "x\n" * 5000)
    for at in range(30):
        machine.text(0.01 * at, CELL, b"a", "", "stdout", "x\n" * 5000)
    run_out(machine, 1.0)
    machine.text(20.0, CELL, b"a", "", "stdout", "calm again\n")
    assert shown(machine.take(20.0)) == "calm again\n"


def test_order_within_a_task_with_displays_and_both_streams() -> None:
    machine = outlet()
    machine.text(0.0, CELL, b"a", "", "stdout", "1\n")
    machine.text(0.0, CELL, b"a", "", "stderr", "2\n")
    machine.display(0.0, CELL, b"a", "display_data", {"data": {"text/plain": "3"}}, 10)
    machine.text(0.0, CELL, b"a", "", "stdout", "4\n")
    sent, _ = run_out(machine, 0.0)
    assert [s.content.get("text") or s.content["data"]["text/plain"] for s in sent] == [
        "1\n",
        "2\n",
        "3",
        "4\n",
    ]


def test_updates_of_one_display_are_merged_while_they_wait() -> None:
    machine = outlet()
    machine.messages.take(0.0, machine.messages.burst)
    content = {"data": {"text/plain": "0"}, "transient": {"display_id": "d"}}
    machine.display(0.0, CELL, b"a", "display_data", content, 10)
    for number in range(1, 1000):
        content = {"data": {"text/plain": str(number)}, "transient": {"display_id": "d"}}
        machine.display(0.0, CELL, b"a", "update_display_data", content, 10)
    sent, _ = run_out(machine, 0.0)
    assert [(s.kind, s.content["data"]["text/plain"]) for s in sent] == [("display_data", "999")]


def test_clear_output_drops_what_waits() -> None:
    machine = outlet()
    machine.messages.take(0.0, machine.messages.burst)
    machine.text(0.0, CELL, b"a", "", "stdout", "old\n")
    machine.display(0.0, CELL, b"a", "clear_output", {"wait": True}, 0)
    machine.text(0.0, CELL, b"a", "", "stdout", "new\n")
    sent, _ = run_out(machine, 0.0)
    assert [s.kind for s in sent] == ["clear_output", "stream"]
    assert shown(sent) == "new\n"


def test_progress_bars_of_several_tasks_are_one_display() -> None:
    machine = outlet()
    sent: list[Send] = []
    now = 0.0
    for step in range(101):
        for task in ("a", "b"):
            machine.text(now, CELL, task.encode(), f"({task}) ", "stderr", f"\r{step}%")
        sent += machine.take(now)
        now += 0.05
    for task in ("a", "b"):
        machine.text(now, CELL, task.encode(), f"({task}) ", "stderr", "\n")
    rest, _ = run_out(machine, now)
    sent += rest
    assert panel(sent) == "(a) 100%\n(b) 100%"
    assert len(sent) < 20
    assert {s.content["transient"]["display_id"] for s in sent} == {
        sent[0].content["transient"]["display_id"]
    }


def test_own_progress_bar_stays_a_stream_and_is_thinned_out() -> None:
    machine = outlet()
    sent: list[Send] = []
    for step in range(1000):
        machine.text(step / 1000, CELL, b"a", "", "stderr", f"\r{step + 1}/1000")
        sent += machine.take(step / 1000)
    machine.text(1.0, CELL, b"a", "", "stderr", "\n")
    sent += run_out(machine, 1.0)[0]
    assert overwritten(shown(sent)).strip() == "1000/1000"
    assert len(sent) <= 25


def test_plain_output_shows_nothing_that_is_replaced() -> None:
    machine = outlet(plain=True)
    machine.text(0.0, CELL, b"a", "", "stdout", "x\n" * 900)
    machine.text(0.0, CELL, b"a", "", "stdout", "y\n" * 900)
    sent = machine.take(0.0, CELL, final=True)
    assert {s.kind for s in sent} == {"stream"}
    assert "795 lines folded" in shown(sent)


def test_what_a_worker_left_out_is_counted() -> None:
    machine = outlet()
    machine.text(0.0, CELL, b"a", "", "stdout", "last\n", skipped=84_213, tasks=3, end=True)
    sent, _ = run_out(machine, 0.0)
    assert shown(sent) == "last\n"
    assert panel(sent) == "... 84,213 lines of 4 tasks folded, %cluster logs In[7] shows all"


events = st.lists(
    st.tuples(
        st.integers(0, 3),  # cell
        st.integers(0, 5),  # task
        st.sampled_from(["stdout", "stderr"]),
        st.integers(1, 400),  # lines
        st.integers(0, 120),  # width
        st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.1]),
        st.booleans(),  # show something too
    ),
    max_size=150,
)


@settings(max_examples=60, deadline=None)
@given(events)
def test_bounds_hold_and_ends_are_shown(steps: list[tuple[int, int, str, int, int, float, bool]]) -> None:
    machine = Outlet()
    labels = [f"In[{number}] c d r" for number in range(4)]
    for label in labels:
        machine.cell(label, label.split()[0])
    now, serial = 0.0, 0
    sent: list[tuple[float, Send]] = []
    written: dict[tuple[str, bytes], list[str]] = defaultdict(list)

    def take() -> None:
        sent.extend((now, each) for each in machine.take(now))

    for cell, task, channel, count, width, pause, show in steps:
        label, source = labels[cell], b"%d" % task
        text = ""
        for _ in range(count):
            serial += 1
            line = f"{cell}.{task}.{serial}." + "x" * width
            written[label, source].append(line)
            text += line + "\n"
        machine.text(now, label, source, "", channel, text)
        if show:
            machine.display(now, label, source, "display_data", {"data": {"text/plain": "d" * 500}}, 800)
        take()
        now += pause
    while (due := machine.due(now)) is not None:
        now += due
        take()
    # No second has more than the bounds (a sliding window that ends at each message).
    sizes = [(at, len(json.dumps(each.content)) + 800) for at, each in sent]
    first = 0
    total = count = 0
    for at, size in sizes:
        total, count = total + size, count + 1
        while sizes[first][0] < at - 1.0:
            total, count, first = total - sizes[first][1], count - 1, first + 1
        assert total <= 1_000_000
        assert count <= 300
    for label in labels:
        times = [at for at, each in sent if each.cell == label and each.kind == "stream"]
        for index, at in enumerate(times):
            assert len([other for other in times[index:] if other < at + 1.0]) <= 21
    # The last lines of each task are there, in order, and so is the count of the others.
    for label in labels:
        text = shown([each for _, each in sent if each.cell == label])
        lines = text.splitlines()
        for (other, _), said in written.items():
            if other == label:
                last = said[-min(TAIL_LINES, len(said)) :]
                places = [lines.index(line) for line in last]
                assert places == sorted(places)
        total_written = sum(len(said) for (other, _), said in written.items() if other == label)
        panels: dict[str, str] = {}
        for _, each in sent:
            if each.cell == label and "transient" in each.content:
                panels[each.content["transient"]["display_id"]] = each.content["data"]["text/plain"]
        counts = [re.findall(r"([\d,]+) line", text)[0] for text in panels.values()]
        folded = sum(int(count.replace(",", "")) for count in counts)
        assert folded + len(lines) == total_written
