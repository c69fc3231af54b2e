"""A worker process: takes runs from its node, executes them, reports. Runs in the process that the zygote has forked.

The main thread runs the user's code, so that signals, plots and debuggers behave as in a script. What a run is told comes through the socket; whether a
run that was dispatched ahead may start, through the token pipe (protocol section 5).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the functions behind ``signal``: those make enums, which costs each worker memory pages
import gc
import os
import select
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

from nbray import platform
from nbray.api import context
from nbray.engine.local import LocalEngine
from nbray.messages import (
    PROTOCOL,
    WORKER,
    Adopt,
    Configure,
    Function,
    Hello,
    Interrupt,
    NodeToClient,
    Run,
    StreamRoom,
    World,
)
from nbray.store.memory import SharedMemory
from nbray.transport.frames import decoder
from nbray.transport.link import Interrupts
from nbray.worker import display
from nbray.worker.adoption import Seeder
from nbray.worker.executor import Executor
from nbray.worker.largest import answer_asks
from nbray.worker.machine import NO_TOKEN, WorkerMachine
from nbray.worker.output import Channel, TaskStream
from nbray.worker.places import answer_looks
from nbray.worker.world import Surroundings

OOM_SCORE = 500
"""The kernel is to choose workers, never the notebook, when memory runs out."""


_SIGINT, _SIGKILL = int(signal.SIGINT), int(signal.SIGKILL)

TOKEN_LOOK = 20
"""Milliseconds between looks at what other threads have read, while a token is awaited."""


class WorkerInterrupts(Interrupts):
    """SIGINT reaches the user's code only if it is meant for the run that executes now (protocol section 9)."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self._pipe = pipe
        self.run = 0
        self.active = False
        """Whether the user's code executes."""
        self._deferred = False
        self._early: set[int] = set()
        _signal.signal(_SIGINT, self._signal)

    def enter(self) -> bool:
        if threading.get_ident() != self._main:
            return False
        self.depth += 1
        return True

    def leave(self) -> None:
        self.depth -= 1
        if self.depth == 0 and self._pending:
            self.raise_pending()

    def raise_pending(self) -> None:
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def prepare(self, run: int) -> None:
        """From now on interrupts meant for this run are kept for it."""
        self.run = run
        self._deferred = run in self._early
        if self._early:
            self._early = {other for other in self._early if other > run}

    def begin(self) -> None:
        """The user's code begins: raises KeyboardInterrupt if the run was cancelled before."""
        self._pending = False
        self.active = True
        if self._deferred:
            raise KeyboardInterrupt

    def end(self) -> None:
        """The user's code is over: what comes now comes too late."""
        self.active = False
        self._pending = False
        self._deferred = False

    def _signal(self, _number: int, _frame: FrameType | None) -> None:
        try:
            data = os.read(self._pipe, 4096)
        except BlockingIOError:
            meant = self.active  # Nobody asked the node: the user's code has sent itself a SIGINT.
        else:
            runs = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
            meant = self.run in runs
            # Told of by the node, but not begun: the message is still on its way through this process.
            self._early.update(run for run in runs if run > self.run)
        if not meant:
            return
        if not self.active:
            self._deferred = True
        elif self.depth and not self.waiting:
            self._pending = True
        else:
            self.waiting = False
            raise KeyboardInterrupt


class Common:
    """What all workers of a zygote have in common, made once, before they are forked: what a child makes itself costs it memory pages, too."""

    def __init__(self, told: dict[str, Any]) -> None:
        """``told``: what the node has told the zygote."""
        self.memory = SharedMemory.attach(told["arena"], told["span"])
        self.blobs: dict[bytes, bytes] = {}
        self.surroundings = Surroundings(self.blobs)
        self.seeder = Seeder(bytes.fromhex(told["cluster"]))
        decoder(NodeToClient)
        self.inherit()

    def inherit(self) -> None:
        """In the zygote, when it has imported something."""
        self.surroundings.inherit()
        self.seeder.seed(b"")


class WorkerLoop:
    """The main loop of a worker."""

    def __init__(
        self, engine: LocalEngine, tokens: int, interrupts: WorkerInterrupts, common: Common
    ) -> None:
        self.engine = engine
        self.interrupts = interrupts
        self.machine = WorkerMachine()
        self.queue = self.machine.queue
        self.kinds = self.machine.kinds
        self.common = common
        self.blobs = common.blobs
        self.surroundings = common.surroundings
        self.surroundings.begin()
        self._tokens = tokens
        self._poll = select.poll()
        self._poll.register(engine.link.sock, select.POLLIN)
        self._poll_both = select.poll()
        self._poll_both.register(engine.link.sock, select.POLLIN)
        self._poll_both.register(tokens, select.POLLIN)
        self.executor = Executor(self, engine, interrupts)
        engine.on_message = self._at_once

    @property
    def leaving(self) -> bool:
        """The node wants this worker to end after what it has."""
        return self.machine.leaving

    # -- what the node says

    def _at_once(self, message: Any) -> bool:
        """Messages about what runs already."""
        kind = type(message)
        if kind is StreamRoom:
            self.executor.take_room(message.task, message.consumed)
            return True
        if kind is Interrupt:
            self.executor.interrupt(message.task)
            return True
        return False

    def take_in(self) -> None:
        """Carry out what has come."""
        inbox = self.engine.inbox
        while inbox:
            message = inbox.popleft()
            kind = type(message)
            if kind is Run:
                self.surroundings.arrived(message.run)
            if self.machine.take_in(message):
                continue
            if kind is Function:
                self.blobs[message.function] = message.blob
            elif kind is World:
                if self.executor.actor:
                    self.surroundings.extend(message)
                else:
                    self.surroundings.coming(message)
            elif kind is Adopt:
                self.surroundings.adopt(message)
            elif kind is Configure:
                self.executor.configure(message)

    def _token(self) -> int:
        try:
            data = os.read(self._tokens, 1)
        except BlockingIOError:
            return NO_TOKEN
        return data[0] if data else NO_TOKEN

    def next_run(self) -> Run | None:
        """The next run to start; waits for it. None when the worker is to end."""
        link = self.engine.link
        machine = self.machine
        while True:
            if link.dead:
                # Also in a child that the user's code has forked and that came back here: what was dispatched is its parent's.
                return None
            if self.engine.inbox:
                self.take_in()
            run = machine.next_run()
            if run is not None:
                return run
            if machine.wants_token:
                machine.token = self._token()
                if machine.token < 0:
                    self._receive(self._poll_both)
                continue
            if machine.done:
                return None
            self._receive(self._poll)

    def _receive(self, poll: Any) -> None:
        """Send what is left, then wait until something comes."""
        link = self.engine.link
        link.flush()
        inbox = self.engine.inbox
        if poll is self._poll:
            link.take(lambda: bool(inbox))
            return
        # Threads of the user's may read too, and then nothing comes through the socket.
        while not inbox and not poll.poll(TOKEN_LOOK):
            pass
        link.poll_now()

    def run(self) -> None:
        """Until told to leave."""
        executor = self.executor
        while True:
            run = self.next_run()
            if run is None:
                break
            # While the user's code runs, the thread sends what it prints, and answers where it is.
            self.engine.link.start()
            executor.execute(run, self.kinds[run.number])
            if executor.mode != "serial":
                executor.serve(self)
                break
            if executor.ended:
                break
        self.executor.close()


def run_worker(number: int, fds: list[int], common: Common, parent: int) -> int:
    """Be worker ``number`` until it ends; the exit status."""
    sock_fd, tokens, interrupt, _life, out, err = fds
    platform.set_parent_death_signal(_SIGKILL)
    if os.getppid() != parent:
        return 1
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    interrupts = WorkerInterrupts(interrupt)
    platform.raise_out_of_memory_score(OOM_SCORE)
    platform.set_process_title("nbray worker")
    sock = socket.socket(fileno=sock_fd)
    engine = LocalEngine(sock, common.memory, Hello(PROTOCOL, WORKER, os.getpid(), "", number), interrupts)
    loop = WorkerLoop(engine, tokens, interrupts, common)
    channel = Channel(engine)
    sys.stdout, sys.stderr = TaskStream("stdout", 1, channel), TaskStream("stderr", 2, channel)
    before = engine.link.tidy

    def tidy() -> bool:
        held = channel.settle()
        return before() or held

    engine.link.tidy = tidy
    loop.executor.channel = channel
    display.install(channel)
    answer_looks(loop.executor, engine.link)
    answer_asks(loop.executor, engine.link)
    context.install(context.Runtime(engine, worker=True))
    gc.enable()
    try:
        loop.run()
        channel.settle()
        if not engine.link.dead:
            engine.link.flush()
    finally:
        engine.closed = "this worker has ended"
    return 0
