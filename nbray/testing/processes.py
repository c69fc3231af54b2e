"""Simulated drivers and workers: who runs the interpreter when, and what is reported."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.api.machine import Entry, Scope
from nbray.failure_codec import UserFailure, encode_system_error, encode_user_failure
from nbray.messages import (
    CREATE_ACTOR,
    DRIVER,
    PROTOCOL,
    WORKER,
    ActorOptions,
    Bye,
    Configure,
    Done,
    DoneMany,
    Failed,
    Hello,
    Interrupt,
    Item,
    Run,
    StreamRoom,
    TaskClass,
    Unblocked,
    Welcome,
)
from nbray.testing import programs
from nbray.testing.clients import (
    Interrupted,
    SimClient,
    SimError,
    Sleep,
    Until,
    Val,
    Verb,
    decode_arguments,
    encode_value,
)
from nbray.testing.interpreter import Frame, Gets, Handle, Interpreter
from nbray.testing.oracle import digest_of
from nbray.worker.machine import WorkerMachine

if TYPE_CHECKING:
    from nbray.testing.node import SimNode
    from nbray.testing.world import World


class SimDriver(SimClient):
    """A driver: runs its program, keeps what its gets gave, lets go of everything."""

    def __init__(
        self, world: World, node: SimNode, number: int, pid: int, program: programs.Program, index: int
    ) -> None:
        super().__init__(world, node, number, pid)
        self.index = index
        self.interpreter = Interpreter(self, program)
        self.gets: Gets = {}
        self.finished = False
        self.doing = "says hello"
        self.welcome: Welcome | None = None

    def on_message(self, message: Any) -> None:
        if type(message) is Welcome:
            self.welcome = message
        else:
            super().on_message(message)

    def begin(self) -> None:
        """The process starts."""
        self.start(self.main())

    def main(self) -> Verb:
        self.machine.out.append(Hello(PROTOCOL, DRIVER, self.pid, f"session{self.index}"))
        yield Until(lambda: self.welcome is not None)
        assert self.welcome is not None
        self.doing = "runs"
        frame = Frame(ids.IdSource(self.welcome.execution), b"")
        body = self.interpreter.program.mains[self.index]
        yield from self.interpreter.body(body, frame, digest_of("driver"), self.gets)
        self.doing = "has ended"
        frame.clear()
        self.node.naming.leave(self)
        self.arm()
        self.finished = True

    def leave(self) -> Verb:
        """Say goodbye, as ``shutdown`` does."""
        yield from self.request(Bye)
        self.doing = "has left"
        self.node.unmap(self.number)


class SimWorker(SimClient):
    """A worker process: `WorkerMachine` decides what runs, fibers run it."""

    reads_in_background = False

    def __init__(
        self, world: World, node: SimNode, number: int, pid: int, worker: int, program: programs.Program
    ) -> None:
        super().__init__(world, node, number, pid)
        self.worker = worker
        self.interpreter = Interpreter(self, program)
        self.runs = WorkerMachine()
        self.pipe: deque[int] = deque()
        """The token pipe."""
        self.interrupts: list[int] = []
        """The interrupt pipe."""
        self.told = 0
        """Messages about runs that have come."""
        self.running: dict[bytes, Run] = {}
        self.consumed: dict[bytes, int] = {}
        self.current = 0
        """The run whose user code is active in the main thread."""
        self.options: ActorOptions | None = None
        self.actor = b""
        self.concurrent = 0
        self.waiting: deque[Run] = deque()
        self.cancelled: dict[bytes, None] = {}
        self._main: Any = None
        self._calls: dict[int, int] = {}
        self.welcome = False

    def on_message(self, message: Any) -> None:
        kind = type(message)
        if kind is StreamRoom:
            self.consumed[message.task] = message.consumed
        elif kind is Configure:
            self.actor, self.options = message.actor, message.options
        elif kind is Welcome:
            self.welcome = True
        elif self.runs.take_in(message):
            self.told += 1
        elif kind is not Interrupt:
            super().on_message(message)

    def boot(self) -> None:
        self.machine.out.append(Hello(PROTOCOL, WORKER, self.pid, "", self.worker))
        self._main = self.start(self.main())

    def main(self) -> Verb:
        yield Until(lambda: self.welcome)
        while True:
            run = yield from self._next_run()
            if run is None:
                break
            spec = self.runs.kinds[run.number]
            yield from self.execute(run, spec, main=True)
            if spec.kind == CREATE_ACTOR and self.options is not None and self.options.mode != "serial":
                yield from self._serve()
                break
        self.flush()
        self.node.worker_ends(self, 0)

    def _next_run(self) -> Verb:
        machine = self.runs
        while True:
            run = machine.next_run()
            if run is not None:
                return run
            if machine.wants_token:
                if self.pipe:
                    machine.token = self.pipe.popleft()
                    continue
                yield Until(partial(self._told_more, self.told))
                continue
            if machine.done:
                return None
            yield Until(lambda: bool(machine.queue) or machine.done)

    def _told_more(self, before: int) -> bool:
        return bool(self.pipe) or self.told != before

    def _serve(self) -> Verb:
        """A threaded actor: as many calls at a time as its pool has threads."""
        assert self.options is not None
        while True:
            run = yield from self._next_run()
            if run is None:
                break
            self.waiting.append(run)
            self._next_call()
        yield Until(lambda: not self.concurrent)

    def _next_call(self) -> None:
        assert self.options is not None
        while self.waiting and self.concurrent < self.options.max_concurrency:
            run = self.waiting.popleft()
            self.concurrent += 1
            self.start(self._thread(run))

    def _thread(self, run: Run) -> Verb:
        yield from self.execute(run, self.runs.kinds[run.number], main=False)
        self.flush()
        self.concurrent -= 1
        self._next_call()
        self.world.after(0.0, self._read)

    # -- one run

    def execute(self, run: Run, spec: TaskClass, *, main: bool) -> Verb:
        world = self.world
        self.node.checks.run_starts(self, run, spec)
        self.running[run.task] = run
        scopes: list[Scope] = []
        frame = Frame(ids.IdSource(ids.execution_id(run.task, run.attempt)), run.task)
        function = self.interpreter.program.functions[spec.name]
        started = world.now
        report: Any
        try:
            if main:
                self.current = run.run
            try:
                state = self._prepare(run, function, frame, scopes)
                yield from self._work(function)
                state = yield from self.interpreter.body(function.body, frame, state, None)
                if function.stream:
                    yield from self._items(run, function, state)
                raises = function.raises < 0 or run.attempt < function.raises
                if raises:
                    raise SimError(f"user {spec.name}", "raised")
            finally:
                if main:
                    self.current = 0
            report = yield from self._report(run, function, frame, state, started)
        except SimError as error:
            data = error.data or self._failure(error, spec, run)
            report = Failed(
                run.run,
                started,
                world.now - started,
                data,
                spec.retry_exceptions and error.name.startswith("user "),
            )
        except Interrupted:
            data = encode_user_failure(
                UserFailure(b"", "", "KeyboardInterrupt", "", "", spec.name, "node", self.pid)
            )
            report = Failed(run.run, started, world.now - started, data, False)
        returned = [frame.registers[name] for name in function.contains if name in frame.registers]
        if type(report) is not Failed:
            self.node.naming.bound(self, run, returned)
        frame.clear()
        self.consumed.pop(run.task, None)
        del self.running[run.task]
        self.node.checks.run_ends(self, run)
        if world.chance(0.1):
            self.flush()
        if scopes:
            self.machine.end_scopes(scopes)
        self.machine.out.append(report)
        returned.clear()
        if world.chance(0.5):
            self.flush()
            if world.chance(0.3):
                yield Sleep(world.random.uniform(0, 0.003))  # The process gets no CPU for a while.

    def _failure(self, error: SimError, spec: TaskClass, run: Run) -> bytes:
        if error.name.startswith("user "):
            return encode_user_failure(
                UserFailure(b"", "", error.name, error.text, "", spec.name, "node", self.pid, run.attempt)
            )
        return encode_system_error(error.name, error.text)

    def _work(self, function: programs.Function) -> Verb:
        """The user's code computes; now and then much longer than usual."""
        random = self.world.random
        seconds = function.seconds * random.uniform(0.5, 1.5) + (
            random.uniform(0.01, 0.03) if random.random() < 0.04 else 0.0
        )
        current = self.current
        if function.stubborn:
            self.current = 0
        yield Sleep(seconds)
        self.current = current

    def _prepare(self, run: Run, function: programs.Function, frame: Frame, scopes: list[Scope]) -> bytes:
        deps = []
        for dep in run.deps or ():
            if len(dep) == 4:
                object_id, _, data, refs = dep
                digest = self.node.checks.decode(object_id, data)
            else:
                object_id, _, offset, size, refs = dep
                digest = self.view(object_id, offset, size)
                frame.held.append(Val(digest, None, self._pinned(object_id)))
            self.node.checks.value_read(object_id, digest)
            deps.append(Val(digest, self.borrow(refs, scopes)))
        refs = self.borrow(run.refs, scopes) or []
        data = run.args
        if run.args_at is not None:
            offset, size = run.args_at
            data = bytes(self.node.memory[offset : offset + size])
            frame.held.append(Val(b"", None, self._pinned(run.args_object)))
        state = digest_of(function.name)
        if data:
            for position, (kind, value) in enumerate(decode_arguments(data)):
                if kind == "d":
                    frame.registers[f"arg{position}"] = deps[value]
                    state = digest_of(state, deps[value].digest)
                elif kind == "r":
                    frame.registers[f"arg{position}"] = refs[value]
                elif kind == "a":
                    frame.registers[f"arg{position}"] = Handle(ids.task_of(refs[value]._id), refs[value])
                elif kind == "v":
                    frame.registers[f"arg{position}"] = Val(value, None)
                    state = digest_of(state, value)
                elif kind == "w":
                    frame.registers[f"arg{position}"] = Val(value[0], [refs[index] for index in value[1:]])
                    state = digest_of(state, value[0])
        return state

    def _pinned(self, object_id: bytes) -> Any:
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self.entries[object_id] = Entry(0, False)
            entry.state = 2
        entry.pins += 1
        entry.views += 1
        return partial(self._unviewed, object_id)

    def _items(self, run: Run, function: programs.Function, state: bytes) -> Verb:
        room = function.backpressure
        consumed = self.consumed
        for index, size in enumerate(function.returns):
            data = encode_value(digest_of(state, str(index)), size)
            if len(data) <= self.machine.inline_limit:
                self.machine.out.append(Item(run.run, index, 0, data))
            else:
                yield from self.write(ids.return_id(run.task, index), data, None, held=False)
                self.machine.out.append(Item(run.run, index, -1, b""))
            self.later()
            yield Sleep(function.seconds / 4)
            if consumed.get(run.task) == -1:
                break
            if room and index + 1 - consumed.get(run.task, 0) >= room:
                request = self.number_request()
                self.machine.ask([], fetch=False, blocked=True, request=request, task=run.task, count=1)
                try:
                    yield Until(partial(self._has_room, run.task, index + 1, room))
                finally:
                    self.machine.out.append(Unblocked(request))
                if consumed.get(run.task) == -1:
                    break

    def _has_room(self, task: bytes, made: int, room: int) -> bool:
        consumed = self.consumed.get(task, 0)
        return consumed == -1 or made - consumed < room

    def _report(
        self, run: Run, function: programs.Function, frame: Frame, state: bytes, started: float
    ) -> Verb:
        world = self.world
        if function.stream:
            return DoneMany(run.run, started, world.now - started, [])
        values: list[tuple[int, bytes, list[bytes] | None]] = []
        for index, size in enumerate(function.returns):
            contained = (
                [frame.registers[name] for name in function.contains if name in frame.registers]
                if index == 0
                else []
            )
            for ref in contained:
                self.entry(ref)
            refs = [ref._id for ref in contained] or None
            data = encode_value(digest_of(state, str(index)), size)
            if len(data) <= self.machine.inline_limit:
                values.append((0, data, refs))
            else:
                yield from self.write(ids.return_id(run.task, index), data, refs, held=False)
                values.append((-1, b"", None))
        if len(values) == 1 and values[0][0] >= 0:
            return Done(run.run, started, world.now - started, *values[0])
        return DoneMany(run.run, started, world.now - started, values)

    # -- signals and pipes

    def token(self) -> None:
        """The token pipe has become readable."""
        if self.alive:
            self.take_in()

    def signal(self) -> None:
        """SIGINT: meant only for the run that it was sent for, and only while user code is active."""
        meant, self.interrupts = self.interrupts, []
        if not self.alive or not self.current or self.current not in meant:
            return
        fiber = self._main
        if not fiber.running:
            self.resume(fiber, None, Interrupted())


def awaits(client: SimClient) -> str:
    """For stories: what the process waits for."""
    entries = [
        f"{ids.short(o)} is {('PENDING', 'VALUE', 'READY', 'LOCATED')[e.state]}"
        for o, e in client.entries.items()
        if e.state not in (1, 3)
    ]
    return f"{len(client.fibers)} fibers, {sum(f.until is not None for f in client.fibers)} waiting; {', '.join(entries[:8])}"
