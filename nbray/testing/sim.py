"""Deterministic simulation of one node with its drivers and workers: ``python -m nbray.testing.sim --seeds 100 --first 0``.

The production machines (`NodeMachine` with all its parts, `ClientMachine`, `WorkerMachine`, `GcsClient`, the GCS's `Tables`) run on one heap of
events, with drawn programs, drawn latencies and drawn faults. After every step of the node the invariants of ``nbray.testing.checks`` are
asserted; at the end every get has given what a serial run gives, or an error that the faults excuse, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from nbray.messages import World as WorldMessage
from nbray.node.machine import ORPHAN_SECONDS, NodeConfig
from nbray.testing.faults import Plan, draw_plan, excused
from nbray.testing.node import SimNode
from nbray.testing.oracle import Serial
from nbray.testing.processes import SimDriver, SimWorker, awaits
from nbray.testing.programs import Features, random_program
from nbray.testing.world import BrokenInvariantError, World

PATIENCE = 90.0
"""Simulated seconds after which unfinished drivers hang."""

MOST_STEPS = 400_000
REST = 6.0
"""Simulated seconds in which everything must have come to rest."""


@dataclass
class Report:
    """How a seed went. ``problem``: empty, or the invariant that failed and a story."""

    seed: int
    digest: str
    steps: int
    faults: str
    problem: str = ""

    def line(self) -> str:
        """For people and for comparisons."""
        return f"seed {self.seed:5d}  {self.digest}  {self.steps:6d} steps  {'FAILED' if self.problem else 'ok':6s}  {self.faults}"

    def replay(self) -> str:
        return f"python -m nbray.testing.sim --seeds 1 --first {self.seed} --trace"


class Simulation:
    """One run: a node, its drivers, a program and a fault plan, all drawn from the seed."""

    def __init__(self, seed: int, echo: Callable[[str], None] | None = None) -> None:
        self.world = world = World(seed, echo)
        random = world.random

        def maybe(probability: float) -> bool:
            return random.random() < probability

        self.features = Features(
            large=maybe(0.5), actors=maybe(0.5), streams=maybe(0.3), cancels=maybe(0.25), frees=maybe(0.15), kills=maybe(0.2), raises=maybe(0.3), timeouts=maybe(0.3)
        )  # fmt: skip
        self.plan = draw_plan(random, self.features)
        drivers = 2 if self.plan.driver_death or maybe(0.2) else 1
        self.program = random_program(random, self.features, drivers)
        limit = random.choice([128 * 1024, 256 * 1024, 1 << 20])
        config = NodeConfig(
            "node", "sim", b"simulated clust.", {"CPU": random.choice([1, 1, 2, 4]) * 10_000, "X": 10_000}, limit, limit * 8, ttl=1e9,
            spares=random.choice([0, 1, 2]), worker_limit=64, inline_limit=256, store_patience=1.0, inline_total=random.choice([2048, 1 << 20]),
        )  # fmt: skip
        self.node = SimNode(world, config, self.plan, self.program)
        self.drivers: list[SimDriver] = []
        self.dead: SimDriver | None = None

    def run(self) -> None:
        """Until rest. Raises BrokenInvariantError, or whatever a machine raises."""
        world, node = self.world, self.node
        for index in range(len(self.program.mains)):
            connection = node.connect()
            driver = SimDriver(world, node, connection.number, node.next_pid(), self.program, index)
            connection.client = driver
            self.drivers.append(driver)
            world.after(0.0, driver.begin)
        node.wake(0.0)
        self._schedule(self.plan)
        start = world.now
        while not all(driver.finished for driver in self.drivers if driver is not self.dead):
            self._step(start + PATIENCE, "drivers wait")
        self._compare()
        node.disk_full = False
        self._rest(REST + (ORPHAN_SECONDS if self.dead is not None else 0.0))
        if self.dead is not None:
            # A kernel's death takes no name; a later kernel of its notebook lets go of them.
            session = f"session{self.dead.index}"
            node.post("a later kernel", lambda: node.machine.names.end_session(session))
            self._rest(1.0)
        node.checks.at_rest()
        for driver in self.drivers:
            if driver is not self.dead:
                driver.start(driver.leave())
        self._rest(4.0 if self.plan.forks else 1.0)
        node.checks.at_rest()
        node.checks.history(node.submitted, reconstructed=bool(self.plan.bad_disk))
        world.log(f"ends after {world.steps} steps")

    def _step(self, deadline: float, what: str) -> None:
        world = self.world
        if not world.step() or world.now > deadline or world.steps > MOST_STEPS:
            raise BrokenInvariantError(
                f"a hang: {what} after {world.now - 1000:.1f} s and {world.steps} steps\n{self.story()}"
            )
        if self.node.stopped:
            raise BrokenInvariantError(f"the node has stopped: {self.node.stopped}")

    def _rest(self, seconds: float) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self._step(end + 10.0, "no rest")

    # -- faults

    def _schedule(self, plan: Plan) -> None:
        world = self.world
        for at in plan.kills:
            world.after(at, self._kill)
        for at in plan.head_crashes:
            world.after(at, self.node.head.crash)
        for start, end in plan.full_disks:
            world.after(start, setattr, self.node, "disk_full", True)
            world.after(end, setattr, self.node, "disk_full", False)
        for at in plan.pressures:
            world.after(at, self._pressure)
        for number, at in enumerate(plan.installs, 1):
            world.after(at, self._install, number)
        if plan.driver_death:
            world.after(plan.driver_death, self._driver_dies)

    def _kill(self) -> None:
        workers = [
            c.client for c in self.node.workers.values() if isinstance(c.client, SimWorker) and c.client.alive
        ]
        busy = [w for w in workers if w.running] or workers
        if busy:
            self.node.kill(self.world.random.choice(busy if self.world.chance(0.8) else workers))

    def _pressure(self) -> None:
        self.world.log("fault: memory pressure")
        self.node.post("memory", lambda: self.node.machine.pressure(99, 100, self.world.now))
        relieved = self.world.random.choice([0.01, 0.5])
        self.world.after(relieved, self.node.post, "memory", self.node.machine.relief)

    def _install(self, number: int) -> None:
        """A driver notices that packages were installed."""
        self.world.log("fault: packages are installed")
        self.node.say(self.drivers[0].number, [WorldMessage(b"", installed=number)])

    def _driver_dies(self) -> None:
        driver = self.drivers[-1]
        if driver.welcome is not None and not driver.finished:
            self.dead = driver
            self.node.driver_dies(driver)

    # -- the end

    def _compare(self) -> None:
        """Every get gave what a serial run gives, or an error that the faults excuse."""
        allowed = excused(self.plan, self.features)
        serial = Serial(self.program)
        for driver in self.drivers:
            if driver is self.dead:
                continue
            expected = serial.drive(driver.index)
            for key, outcome in expected.items():
                got = driver.gets.get(key)
                operation = self.program.mains[driver.index][key[0]]
                where = f"driver {driver.index}, operation {key[0]} {operation}"
                if got is None:
                    # What it needed came to an excused error, or a consumer stopped at one.
                    if not allowed:
                        raise BrokenInvariantError(f"{where}: no value, {outcome} is expected")
                elif isinstance(got, str):
                    if got not in allowed and got not in outcome.errors:
                        raise BrokenInvariantError(
                            f"{where}: {got}, which nothing excuses ({', '.join(sorted(allowed)) or 'no fault'}); expected {outcome}"
                        )
                elif outcome.errors or got != outcome.digest:
                    raise BrokenInvariantError(
                        f"{where}: the value is {got.hex()}, a serial run gives {outcome}"
                    )

    def story(self) -> str:
        """Who waits for what, and what happened last."""
        waiting = [f"  driver {d.index} {d.doing}: {awaits(d)}" for d in self.drivers]
        return "\n".join([*waiting, self.node.checks.story()])

    def close(self) -> None:
        """Let nothing of this run live on."""
        for connection in [*self.node.connections.values(), *self.node.workers.values()]:
            if connection.client is not None:
                connection.client.die()


def simulate(seed: int, echo: Callable[[str], None] | None = None) -> Report:
    """Run one seed. Never raises for what the simulation finds: the report says it."""
    collecting = gc.isenabled()
    gc.disable()  # a collection would run finalizers of refs at times that no seed decides
    problem = ""
    simulation = Simulation(seed, echo)
    try:
        simulation.run()
    except BrokenInvariantError as broken:
        problem = str(broken)
    except Exception:  # noqa: BLE001  (a machine that raises is a finding)
        problem = traceback.format_exc()
    digest = simulation.world.digest()
    if problem and "a hang" not in problem:
        problem += "\n" + simulation.story()
    if problem:
        problem += "\nlast lines of its log:\n" + "\n".join(f"  {line}" for line in simulation.world.lines)
    report = Report(seed, digest, simulation.world.steps, simulation.plan.words(), problem)
    simulation.close()
    del simulation
    if collecting:
        gc.enable()
    return report


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status is 1 when a seed failed."""
    parser = argparse.ArgumentParser(
        prog="python -m nbray.testing.sim", description="Simulate one node with drawn programs and faults."
    )
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="how many seeds")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first seed")
    parser.add_argument("--trace", action="store_true", help="print the log, with every message")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failure")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")

    failed = 0
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.seeds):
        report = simulate(seed, say if options.trace else None)
        gc.collect()
        say(report.line())
        if report.problem:
            failed += 1
            say(f"{report.problem}\nreplay: {report.replay()}")
            if not options.keep_going:
                break
    say(f"{options.seeds} seeds, {failed} failed, {time.perf_counter() - begun:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
