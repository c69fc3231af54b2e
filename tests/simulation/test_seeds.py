"""Simulated runs: a hundred seeds, the same under any hash seed."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbray.testing.sim import main, simulate

BLOCK = 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, BLOCK))
def test_seeds(first: int) -> None:
    for seed in range(first, first + BLOCK):
        report = simulate(seed)
        gc.collect()
        assert not report.problem, f"{report.line()}\n{report.problem}\nreplay: {report.replay()}"


def lines(hash_seed: str, first: int, count: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "nbray.testing.sim", "--first", str(first), "--seeds", str(count)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("seed ")]


@pytest.mark.slow
def test_a_log_does_not_depend_on_the_hash_seed() -> None:
    here = [simulate(seed).line() for seed in range(100, 108)]
    assert lines("1", 100, 8) == here
    assert lines("4242", 100, 8) == here


def test_a_seed_gives_its_log_again_and_another_seed_another() -> None:
    first, again, other = simulate(7), simulate(7), simulate(8)
    assert first.digest == again.digest
    assert first.digest != other.digest


def test_reading_along_does_not_change_the_run() -> None:
    trace: list[str] = []
    assert simulate(3, trace.append).digest == simulate(3).digest
    assert any("Submit" in line for line in trace)


def test_command_prints_a_line_per_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--first", "4", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^seed +4  [0-9a-f]{16} +\d+ steps  ok", out)
    assert "2 seeds, 0 failed" in out
