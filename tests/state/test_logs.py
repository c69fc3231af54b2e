"""The logs of tasks: files that are written, read back, bounded; and lines made of what was written in pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbray import ids, logs
from nbray.state.lines import lines, of_last_run, wanted

TASK = bytes(range(16))
OTHER = bytes(16)


def everything(directory: Path) -> list[logs.Record]:
    return list(logs.read(str(directory), lambda _task, _cell: True))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = logs.LogFile(str(tmp_path), "12")
    file.write(TASK, "f", 'In[1] "id" digest run', "stdout", "one\ntw")
    file.write(OTHER, "g", "", "stderr", "\x1e[\n\udcff")
    file.write(TASK, "f", 'In[1] "id" digest run', "stdout", "o\n")
    file.close()
    found = everything(tmp_path)
    assert [(r.task, r.name, r.stream, r.pid) for r in found] == [
        (TASK, "f", "stdout", 12), (OTHER, "g", "stderr", 12), (TASK, "f", "stdout", 12),
    ]  # fmt: skip
    assert [r.text for r in found] == ["one\ntw", "\x1e[\n?", "o\n"]
    assert found[0].cell == 'In[1] "id" digest run'
    assert [line.text for line in lines(r for r in found if r.task == TASK)] == ["one", "two"]


@given(st.lists(st.text(alphabet="ab\n", max_size=8), max_size=30))
def test_lines_do_not_depend_on_the_pieces(pieces: list[str]) -> None:
    records = [logs.Record(TASK, "f", "", "stdout", 1.0, 1, piece) for piece in pieces]
    text = "".join(pieces)
    wanted_lines = text.split("\n")
    if not wanted_lines[-1]:
        wanted_lines.pop()
    assert [line.text for line in lines(records)] == wanted_lines


def test_choosing() -> None:
    cell = "In[7] id digest run"
    assert wanted("In[7]")(TASK, cell)
    assert not wanted("In[7]")(TASK, "In[77] id digest run")
    assert wanted(ids.short(TASK)[:4])(TASK, cell)
    assert wanted(TASK.hex())(TASK, cell)
    assert not wanted(ids.short(TASK))(OTHER, cell)
    assert wanted("")(OTHER, "")
    with pytest.raises(ValueError, match="In\\[7\\]"):
        wanted("seven")


def test_the_last_run_of_a_cell_number_counts() -> None:
    records = [
        logs.Record(TASK, "f", f"In[1] a b {run}", "stdout", at, 1, "")
        for run, at in (("x-1", 1.0), ("y-1", 2.0))
    ]
    assert of_last_run(records) == records[1:]
    assert of_last_run([]) == []


def test_a_flood_displaces_its_own_beginning_only(tmp_path: Path) -> None:
    quiet = logs.LogFile(str(tmp_path), "1", segment=1000, total=10_000)
    quiet.write(TASK, "quiet", "", "stdout", "here\n")
    loud = logs.LogFile(str(tmp_path), "2", segment=1000, total=10_000)
    for number in range(300):
        loud.write(OTHER, "loud", "", "stdout", f"{number}" + "x" * 100 + "\n")
    quiet.close()
    loud.close()
    sizes = [os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)]
    assert sum(sizes) < 12_000
    found = everything(tmp_path)
    assert [r.text for r in found if r.task == TASK] == ["here\n"]
    numbers = [int(r.text.rstrip("x\n")) for r in found if r.task == OTHER]
    assert numbers == list(range(numbers[0], 300))
    assert len(numbers) > 30


def test_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    file = logs.LogFile(str(tmp_path / "none"), "1")
    file.write(TASK, "f", "", "stdout", "text")
    assert everything(tmp_path / "none") == []


def test_a_record_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    file = logs.LogFile(str(tmp_path), "1")
    file.write(TASK, "f", "", "stdout", "whole\n")
    file.close()
    path = tmp_path / os.listdir(tmp_path)[0]
    with open(path, "ab") as more:
        more.write(b'\x1e["00')
    assert [r.text for r in everything(tmp_path)] == ["whole\n"]
