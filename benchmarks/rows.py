"""Every figure of the suite: its name, unit, which way is better, and the target that nbray has for it."""

from dataclasses import dataclass
from typing import Literal

Group = Literal["start", "tasks", "actors", "objects", "notebook", "million"]
GROUPS: tuple[Group, ...] = ("start", "tasks", "actors", "objects", "notebook", "million")


@dataclass(frozen=True)
class Target:
    """What nbray has to reach: all conditions that are given.

    `ray` and `pool` are factors by which nbray is better than that peer in the same run; `limit` is (name of a figure of
    benchmarks/limit.py, fraction of it); `at_most` and `at_least` are absolute, in the row's unit.
    """

    ray: float | None = None
    pool: float | None = None
    limit: tuple[str, float] | None = None
    at_most: float | None = None
    at_least: float | None = None

    def describe(self) -> str:
        parts = []
        if self.at_most is not None:
            parts.append(f"≤ {self.at_most:g}")
        if self.at_least is not None:
            parts.append(f"≥ {self.at_least:g}")
        if self.ray is not None:
            parts.append(f"≥ {self.ray:g}x Ray")
        if self.pool is not None:
            parts.append(f"≥ {self.pool:g}x pool")
        if self.limit is not None:
            parts.append(f"≥ {self.limit[1]:.0%} of the {LIMITS[self.limit[0]]}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One figure. `unit` is per second unless it says otherwise; `lower` means that less is better."""

    name: str
    unit: str = "/s"
    target: Target | None = None
    lower: bool = False


LIMITS = {"round trips": "bare star", "tasks": "bare star", "warm copy": "warm copy"}

_ROWS: dict[Group, list[Row]] = {
    "start": [
        Row("import + start + first result, cold process", "s", Target(at_most=1, ray=14), lower=True),
        Row("idle cluster memory without the driver (PSS)", "MB", Target(at_most=100), lower=True),
        Row("shutdown", "s", Target(at_most=0.3), lower=True),
        Row("shutdown until the last process is gone", "s", lower=True),
    ],
    "tasks": [
        Row("single client tasks sync", target=Target(ray=10, limit=("round trips", 0.4))),
        Row("single client tasks async", target=Target(ray=20, pool=3)),
        Row("single client tasks and get batch", "batches/s"),
        Row("multi client tasks async"),
        Row("nested: one task making 500", target=Target(ray=10)),
        Row("chain of 200 dependent tasks", target=Target(ray=12)),
        Row("single client wait 1k refs", target=Target(ray=12)),
        Row("8 MB argument by value", target=Target(ray=4)),
        Row("8 MB argument by ref", target=Target(ray=4)),
        Row("8 MB result", target=Target(ray=4)),
    ],
    "actors": [
        Row("1:1 actor calls sync", target=Target(ray=6)),
        Row("1:1 actor calls async", target=Target(ray=6)),
        Row("1:1 actor calls concurrent"),
        Row("1:n actor calls async"),
        Row("n:n actor calls async"),
        Row("n:n actor calls with arg async"),
        Row("1:1 async-actor calls sync"),
        Row("1:1 async-actor calls async", target=Target(ray=8)),
        Row("1:1 async-actor calls with args async"),
        Row("1:n async-actor calls async"),
        Row("n:n async-actor calls async"),
        Row("create + call + kill an actor", target=Target(ray=150)),
    ],
    "objects": [
        Row("single client get calls", target=Target(ray=5)),
        Row("single client put calls", target=Target(ray=10)),
        Row("multi client put calls"),
        Row("put 100 MB", "GB/s", Target(ray=4, limit=("warm copy", 0.5))),
        Row("get 100 MB", target=Target(ray=2)),
        Row("single client put gigabytes", "GB/s"),
        Row("multi client put gigabytes", "GB/s"),
        Row("single client get object containing 10k refs", target=Target(ray=10)),
    ],
    "notebook": [
        Row("magic overhead of %%remote", "ms", Target(at_most=1), lower=True),
        Row("magic overhead of %%remote, 7 MB captured", "ms", Target(at_most=1), lower=True),
    ],
    "million": [
        Row("many tasks, refs dropped", "tasks/s"),
        Row("many tasks, refs dropped: last tenth / first tenth", "", Target(at_least=0.9)),
        Row("many tasks, refs dropped: memory per finished task", "bytes", Target(at_most=1024), lower=True),
        Row("many tasks queued: submit", "tasks/s"),
        Row("many tasks queued: submit, last tenth / first tenth", "", Target(at_least=0.9)),
        Row("many tasks queued: run", "tasks/s"),
        Row("many tasks queued: run, last tenth / first tenth", "", Target(at_least=0.9)),
        Row(
            "many tasks queued, refs held: memory per finished task",
            "bytes",
            Target(at_most=2048),
            lower=True,
        ),
    ],
}

ROWS: dict[str, Row] = {row.name: row for rows in _ROWS.values() for row in rows}
GROUP_OF: dict[str, Group] = {row.name: group for group, rows in _ROWS.items() for row in rows}
