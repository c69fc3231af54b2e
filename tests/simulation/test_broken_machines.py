"""The simulator finds machines that were broken on purpose, each within a bounded number of seeds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from nbray.gcs.client import GcsClient
from nbray.node.actors import Actors
from nbray.node.pool import WorkerPool
from nbray.node.tasks import Tasks
from nbray.node.values import Values
from nbray.scheduler.local import LocalScheduler
from nbray.scheduler.resources import Ledger
from nbray.scheduler.task import RUNNING
from nbray.store.objects import INLINE, ObjectTable
from nbray.testing.sim import simulate

MOST_SEEDS = 60


def release_twice(patch: pytest.MonkeyPatch) -> None:
    release = Ledger.release

    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        release(self, *args, **kwargs)
        release(self, *args, **kwargs)

    patch.setattr(Ledger, "release", broken)


def free_what_others_hold(patch: pytest.MonkeyPatch) -> None:
    drop = Values.on_drop

    def broken(self: Any, peer: Any, message: Any) -> None:
        for object_id in message.objects:
            entry = self.table.objects.get(object_id)
            if entry is not None:
                entry.holders = peer.number
        drop(self, peer, message)

    patch.setattr(Values, "on_drop", broken)


def lose_a_token(patch: pytest.MonkeyPatch) -> None:
    prefetch = LocalScheduler.prefetch

    def broken(self: Any, worker: Any, now: float) -> None:
        prefetch(self, worker, now)
        if worker.tokens:
            worker.tokens.pop()

    patch.setattr(LocalScheduler, "prefetch", broken)
    # Taking back what waits behind a long task would heal it: the task would be found unstarted and run elsewhere.
    patch.setattr(LocalScheduler, "patience", lambda self, now: None)


def forget_what_came_back(patch: pytest.MonkeyPatch) -> None:
    returned = LocalScheduler.returned

    def broken(self: Any, worker: Any, runs: Any, now: float) -> Any:
        back = returned(self, worker, runs, now)
        for task in back[:1]:
            self.drop(task)
        return back

    patch.setattr(LocalScheduler, "returned", broken)


def forget_the_tasks_of_the_dead(patch: pytest.MonkeyPatch) -> None:
    queue = Tasks._queue

    def broken(self: Any, task: Any) -> None:
        if not task.attempt:
            queue(self, task)

    patch.setattr(Tasks, "_queue", broken)


def seal_twice(patch: pytest.MonkeyPatch) -> None:
    sealed = Values.sealed

    def broken(self: Any, entry: Any) -> None:
        sealed(self, entry)
        if entry.state == INLINE and len(entry.data) >= 16 and entry.kind == 0:
            entry.data = bytes(16) * (len(entry.data) // 16)

    patch.setattr(Values, "sealed", broken)


def evict_what_is_pinned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ObjectTable, "pin", lambda self, entry, client: None)


def swap_calls_of_actors(patch: pytest.MonkeyPatch) -> None:
    submit = Actors.submit

    def broken(self: Any, task: Any) -> None:
        submit(self, task)
        actor = self.actors.get(task.actor)
        if actor is not None and len(actor.backlog) > 1:
            actor.backlog.rotate(1)

    patch.setattr(Actors, "submit", broken)


def let_contained_refs_go(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, entry: Any, refs: list[bytes]) -> None:
        entry.refs = refs

    patch.setattr(ObjectTable, "_contain", broken)


def never_kill(patch: pytest.MonkeyPatch) -> None:
    end = WorkerPool.end

    def broken(self: Any, worker: Any, why: str = "") -> None:
        before = len(self.effects)
        end(self, worker, why)
        del self.effects[before:]

    patch.setattr(WorkerPool, "end", broken)


def believe_that_the_owner_keeps_it(patch: pytest.MonkeyPatch) -> None:
    """What a worker's task has made was sent to it once, so it is not sent again, although it has let go of it meanwhile."""
    get = Values.on_get

    def broken(self: Any, peer: Any, message: Any) -> None:
        for object_id in message.objects:
            entry = self.table.objects.get(object_id)
            if (
                entry is not None
                and entry.producer is not None
                and entry.producer.owner == peer.number
                and peer.worker
            ):
                entry.pushed = True
        get(self, peer, message)

    patch.setattr(Values, "on_get", broken)


def keep_the_cpu_of_who_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalScheduler, "blocked", lambda self, worker, task: None)


def run_before_the_inputs(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, task: Any) -> None:
        task.missing = 0
        if task.state != RUNNING and not task.terminal and not task.kind.is_call:
            self._queue(task)

    admit = Tasks.admit

    def early(self: Any, task: Any, **kwargs: Any) -> None:
        admit(self, task, **kwargs)
        if task.missing and not task.terminal:
            broken(self, task)

    patch.setattr(Tasks, "admit", early)


def lose_history(patch: pytest.MonkeyPatch) -> None:
    """What was sent to a head that died before it wrote is not sent again."""
    start = GcsClient._start

    def broken(self: Any, message: Any) -> None:
        under_way = len(self._batches) - self._unsent
        start(self, message)
        self._unsent = max(len(self._batches) - under_way, 0)

    patch.setattr(GcsClient, "_start", broken)


def accept_who_is_gone(patch: pytest.MonkeyPatch) -> None:
    """Another attempt starts while the worker of the last one still runs."""
    prefetch = LocalScheduler.prefetch

    def broken(self: Any, worker: Any, now: float) -> None:
        prefetch(self, worker, now)
        if len(worker.pending) > 2:
            task = worker.pending.pop()
            task.worker = None
            self.ready(task, now, front=True)

    patch.setattr(LocalScheduler, "prefetch", broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage",
    [
        release_twice,
        free_what_others_hold,
        lose_a_token,
        forget_what_came_back,
        forget_the_tasks_of_the_dead,
        seal_twice,
        evict_what_is_pinned,
        swap_calls_of_actors,
        let_contained_refs_go,
        never_kill,
        believe_that_the_owner_keeps_it,
        keep_the_cpu_of_who_waits,
        run_before_the_inputs,
        lose_history,
        accept_who_is_gone,
    ],
)
def test_a_broken_machine_is_found(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    for seed in range(MOST_SEEDS):
        report = simulate(seed)
        gc.collect()
        if report.problem:
            assert report.line().find("FAILED") > 0
            assert f"--first {seed}" in report.replay()
            return
    pytest.fail(f"{MOST_SEEDS} seeds did not find it")
