"""What goes wrong in a run, and which errors that excuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from nbray.testing.programs import Features


@dataclass
class Plan:
    """The faults of one run; drawn from its seed. Times are seconds after the start.

    ``busy``: how often a connection has too much to read for pushed results; ``forks``: whether processes that workers forked outlive them;
    ``portable``: whether the store takes its room from the disk.
    """

    random: Random
    kills: list[float] = field(default_factory=list)
    head_crashes: list[float] = field(default_factory=list)
    full_disks: list[tuple[float, float]] = field(default_factory=list)
    driver_death: float = 0.0
    pressures: list[float] = field(default_factory=list)
    installs: list[float] = field(default_factory=list)
    slow: float = 0.0002
    busy: float = 0.0
    bad_disk: float = 0.0
    forks: bool = False
    portable: bool = False
    disk_seconds: float = 0.001

    def latency(self) -> float:
        """Seconds that a message of a new stream takes at most."""
        return self.random.choice([0.0001, self.slow])

    def words(self) -> str:
        """For the line of a seed."""
        parts = []
        if self.kills:
            parts.append(f"{len(self.kills)} kills")
        if self.head_crashes:
            parts.append(f"{len(self.head_crashes)} head crashes")
        if self.full_disks:
            parts.append("full disk")
        if self.bad_disk:
            parts.append("bad disk")
        if self.driver_death:
            parts.append("driver death")
        if self.pressures:
            parts.append("memory pressure")
        if self.installs:
            parts.append("installs")
        if self.slow > 0.001:
            parts.append("slow streams")
        if self.busy:
            parts.append("busy connections")
        return ", ".join(parts) or "no faults"


def draw_plan(random: Random, features: Features) -> Plan:
    """A fault plan: a quarter of the runs have none."""
    plan = Plan(random)
    if random.random() < 0.4:
        plan.slow = random.choice([0.002, 0.02])
    if random.random() < 0.25:
        return plan
    span = random.choice([0.01, 0.05, 0.3])
    if random.random() < 0.6:
        plan.kills = sorted(random.uniform(0.002, span) for _ in range(random.randint(1, 5)))
    if random.random() < 0.3:
        plan.head_crashes = sorted(random.uniform(0.0, span) for _ in range(random.randint(1, 2)))
    if features.large and random.random() < 0.25:
        start = random.uniform(0.0, span)
        plan.full_disks = [(start, start + random.choice([0.01, 1.0]))]
    if features.large and random.random() < 0.2:
        plan.bad_disk = 0.3
    if random.random() < 0.2:
        plan.driver_death = random.uniform(0.002, span)
    if random.random() < 0.15:
        plan.pressures = [random.uniform(0.002, span)]
    if random.random() < 0.2:
        plan.busy = 0.3
    plan.forks = random.random() < 0.2
    plan.disk_seconds = random.choice([0.001, 0.02])
    if random.random() < 0.15:
        plan.installs = sorted(random.uniform(0.002, span) for _ in range(random.randint(1, 2)))
    plan.portable = random.random() < 0.3
    return plan


def excused(plan: Plan, features: Features) -> frozenset[str]:
    """Names of the errors that a get may end in although the program raises none."""
    found: set[str] = set()
    if plan.kills:
        found |= {"WorkerCrashedError"}
        if features.actors:
            found |= {"ActorDiedError", "ActorUnavailableError"}
    if features.cancels:
        found |= {"TaskCancelledError"}
        if features.actors:
            found |= {"ActorDiedError"}
    if features.kills:
        found |= {"ActorDiedError", "ActorUnavailableError"}
    if features.frees:
        found |= {"ObjectFreedError", "ObjectLostError"}
    if plan.pressures:
        found |= {"OutOfMemoryError", "WorkerCrashedError"}
    if features.large:
        found |= {"StoreFullError"}
    if plan.full_disks:
        found |= {"DiskFullError"}
    if plan.bad_disk:
        found |= {"ObjectLostError"}
    return frozenset(found)
