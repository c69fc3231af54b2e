"""What a run measured, and how it is shown: medians, ratios, targets; as text, Markdown and JSON."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.adapters import CPUS
from benchmarks.rows import ROWS, Row, Target

ROOT = Path(__file__).resolve().parent.parent

LIMIT_UNITS = {"round trips": "/s", "tasks": "/s", "warm copy": "GB/s"}

Lines = list[list[str]]
# Figure of benchmarks/limit.py -> round -> value.
Limits = dict[str, dict[int, float]]


@dataclass
class Options:
    """How long and how often each case is timed, and the limits that end what hangs (seconds)."""

    rounds: int = 3
    warm_up_s: float = 1.0
    window_s: float = 1.0
    windows: int = 2
    scale: float = 1.0
    case_limit_s: float = 240.0
    limit_s: float = 5400.0


@dataclass
class Measured:
    """What one system did in one row: the windows of each round; `status` says why there are none."""

    rounds: dict[int, list[float]] = field(default_factory=dict)
    status: str = ""

    def values(self) -> list[float]:
        return [value for windows in self.rounds.values() for value in windows]

    def median(self) -> float | None:
        values = self.values()
        return statistics.median(values) if values else None


@dataclass
class Results:
    """A run: `versions` has None for a system that is not installed, `table` is row -> system -> what it did."""

    options: Options
    versions: dict[str, str | None]
    table: dict[str, dict[str, Measured]]
    machine: dict[str, str]
    limits: Limits = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_text(self) -> str:
        """For the terminal."""
        parts = [
            "\n".join(f"{key}: {value}" for key, value in self.machine.items()),
            _aligned(self._comparison()).replace("**", ""),
            _aligned(self._limits()),
            "\n".join(f"note: {note}" for note in self.notes),
            "\n\n".join(f"problem: {problem}" for problem in self.problems),
        ]
        return "\n\n".join(part for part in parts if part)

    def as_markdown(self) -> str:
        """For RESULTS.md."""
        options, comparison = self.options, self._comparison()
        answers = [line[-1] for line in comparison[1:] if line[-1]]
        how = (
            f"Written by `python -m benchmarks.run`; [README.md](README.md) says what each row measures and how to read it. "
            f"Every system had {CPUS} CPUs. Figures are medians over {options.rounds} rounds of {options.windows} windows of "
            f"{options.window_s:g} s (start: one value per round; many tasks: one round). Ratios are medians of the rounds' "
            "ratios and say how many times better nbray is. – : the system has no equivalent."
        )
        parts = [
            "# Results",
            how,
            "\n".join(f"- {key}: {value}" for key, value in self.machine.items()),
            f"Targets reached: {answers.count('yes')} of {len(answers)}.",
            _piped(comparison),
            _piped(self._limits()),
            "## Spread",
            "Minimum … maximum of the windows (how many).",
            _piped(self._spread()),
        ]
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
        if self.problems:
            parts += ["## What went wrong", *(f"```\n{problem}\n```" for problem in self.problems)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def as_json(self) -> str:
        """Every window of every round."""
        rows = {
            name: {
                system: {"rounds": list(measured.rounds.values()), "status": measured.status}
                for system, measured in systems.items()
            }
            for name, systems in self.table.items()
        }
        everything = {
            "machine": self.machine,
            "options": vars(self.options),
            "rows": rows,
            "limits": self.limits,
            "notes": self.notes,
            "problems": self.problems,
        }
        return json.dumps(everything, indent=1) + "\n"

    def _comparison(self) -> Lines:
        systems = list(self.versions)
        peers = [system for system in systems if system != "nbray"] if "nbray" in systems else []
        lines = [["benchmark", "unit", *systems, *(f"nbray/{peer}" for peer in peers)]]
        lines[0] += ["nbray/limit", "target", "reached"]
        for name, measured in self.table.items():
            row = ROWS[name]
            ratios = [ratio(row, measured, peer) for peer in peers]
            answer = reached(row, measured, self.limits)
            lines.append(
                [
                    name,
                    row.unit,
                    *(self._cell(measured, system) for system in systems),
                    *("" if times is None else f"{_number(times)}x" for times in ratios),
                    f"{share:.0%}" if (share := limit_share(row, measured, self.limits)) is not None else "",
                    row.target.describe() if row.target else "",
                    {None: "?", True: "yes", False: "**no**"}[answer] if row.target else "",
                ]
            )
        return lines

    def _cell(self, measured: dict[str, Measured], system: str) -> str:
        if self.versions[system] is None:
            return "not installed"
        median = measured[system].median()
        if median is None:
            return "–" if measured[system].status == "none" else measured[system].status
        return _number(median)

    def _limits(self) -> Lines:
        if not self.limits:
            return []
        lines = [["limit of this machine (benchmarks/limit.py)", "unit", "median", "minimum … maximum"]]
        for name, rounds in self.limits.items():
            values = rounds.values()
            middle = _number(statistics.median(values))
            lines.append(
                [name, LIMIT_UNITS[name], middle, f"{_number(min(values))} … {_number(max(values))}"]
            )
        return lines

    def _spread(self) -> Lines:
        lines = [["benchmark", "unit", *self.versions]]
        for name, systems in self.table.items():
            texts = []
            for measured in systems.values():
                values = measured.values()
                texts.append(
                    f"{_number(min(values))} … {_number(max(values))} ({len(values)})" if values else ""
                )
            lines.append([name, ROWS[name].unit, *texts])
        return lines


def ratio(row: Row, measured: dict[str, Measured], peer: str) -> float | None:
    """How many times better nbray is: the median, over the rounds that both have, of the quotients of the rounds' medians."""
    ours, theirs = measured.get("nbray"), measured.get(peer)
    if ours is None or theirs is None:
        return None
    quotients = []
    for round_ in sorted(ours.rounds.keys() & theirs.rounds.keys()):
        mine, other = statistics.median(ours.rounds[round_]), statistics.median(theirs.rounds[round_])
        if row.lower:
            mine, other = other, mine
        if mine > 0 and other > 0:
            quotients.append(mine / other)
    return statistics.median(quotients) if quotients else None


def limit_share(row: Row, measured: dict[str, Measured], limits: Limits) -> float | None:
    """What part of the limit that its target names nbray reaches: the median of the rounds' quotients."""
    if "nbray" not in measured or row.target is None or row.target.limit is None:
        return None
    limit = limits.get(row.target.limit[0], {})
    rounds = measured["nbray"].rounds
    shares = [statistics.median(rounds[i]) / limit[i] for i in sorted(rounds.keys() & limit.keys())]
    return statistics.median(shares) if shares else None


def reached(row: Row, measured: dict[str, Measured], limits: Limits) -> bool | None:
    """Whether nbray meets the row's target; None when something that it is measured against is missing."""
    target = row.target or Target()
    ours = measured["nbray"].median() if "nbray" in measured else None
    if ours is None:
        return None
    answers: list[bool | None] = []
    for peer, factor in (("ray", target.ray), ("pool", target.pool)):
        if factor is not None:
            times = ratio(row, measured, peer)
            answers.append(None if times is None else times >= factor)
    if target.limit is not None:
        share = limit_share(row, measured, limits)
        answers.append(None if share is None else share >= target.limit[1])
    if target.at_most is not None:
        answers.append(ours <= target.at_most)
    if target.at_least is not None:
        answers.append(ours >= target.at_least)
    if False in answers:
        return False
    return None if None in answers else True


def machine(versions: dict[str, str | None]) -> dict[str, str]:
    """The machine and the versions, in words."""
    models = [line.partition(":")[2] for line in _cpuinfo() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    texts = [f"{name} {version}".strip() for name, version in versions.items() if version]
    return {
        "processor": f"{models[0].strip() if models else platform.processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "shared memory": f"{shutil.disk_usage('/dev/shm').total / 1e9:.1f} GB in /dev/shm",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": ", ".join(texts),
        "commit": commit or "unknown",
        "load before the run": f"{os.getloadavg()[0]:.2f} (1-minute average)",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


def _number(value: float) -> str:
    """Three significant digits; from 100 on whole numbers with separated thousands."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _aligned(lines: Lines) -> str:
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def _piped(lines: Lines) -> str:
    if not lines:
        return ""
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
