"""Which run a worker starts next, when messages and tokens come in any order that a socket and a pipe allow."""

from __future__ import annotations

from nbray.messages import Exit, Function, Register, Revoke, Run, TaskClass
from nbray.worker.machine import NO_TOKEN, WorkerMachine


def run(number: int, *, started: bool = False) -> Run:
    return Run(number, b"task", 0, 0, b"", started=started)


def machine(*messages: object) -> WorkerMachine:
    made = WorkerMachine()
    for message in messages:
        assert made.take_in(message)
    return made


def numbers(worker: WorkerMachine) -> list[int]:
    found = []
    while (next_run := worker.next_run()) is not None:
        found.append(next_run.run)
    return found


def test_runs_that_may_start_go_in_order() -> None:
    assert numbers(machine(run(1, started=True), run(2, started=True))) == [1, 2]


def test_a_run_dispatched_ahead_waits_for_its_token() -> None:
    worker = machine(run(1, started=True), run(2))
    assert numbers(worker) == [1]
    assert worker.wants_token
    worker.token = 2
    assert numbers(worker) == [2]
    assert worker.token == NO_TOKEN
    assert not worker.wants_token


def test_a_later_token_means_that_the_runs_before_it_were_taken_back() -> None:
    worker = machine(run(2), run(3), run(4))
    worker.token = 4
    assert numbers(worker) == [4]
    assert not worker.queue


def test_a_token_may_come_before_its_run() -> None:
    worker = machine(run(2))
    worker.token = 3
    assert worker.next_run() is None
    assert not worker.wants_token
    worker.take_in(run(3))
    assert numbers(worker) == [3]


def test_with_a_token_in_hand_a_run_that_needs_none_still_starts() -> None:
    """The node took 2 back, gave 3 to start at once and 4 ahead; this worker sees the token of 4 before it reads any of that."""
    worker = machine(run(2))
    worker.token = 4
    assert worker.next_run() is None
    for message in (Revoke([2]), run(3, started=True), run(4)):
        worker.take_in(message)
    assert numbers(worker) == [3, 4]


def test_tokens_are_one_byte_of_the_number() -> None:
    worker = machine(run(256 + 7))
    worker.token = 7
    assert numbers(worker) == [263]


def test_revoked_runs_are_gone() -> None:
    assert numbers(
        machine(run(1, started=True), run(2, started=True), run(3, started=True), Revoke([2, 9]))
    ) == [1, 3]


def test_it_ends_when_told_and_nothing_is_left() -> None:
    worker = machine(run(1, started=True), Exit(True))
    assert worker.leaving
    assert not worker.done
    assert numbers(worker) == [1]
    assert worker.done


def test_it_remembers_kinds_and_leaves_other_messages_alone() -> None:
    spec = TaskClass(0, b"f", "f", {})
    worker = machine(Register(4, spec))
    assert worker.kinds == {4: spec}
    assert not worker.take_in(Function(b"f", b"blob"))
