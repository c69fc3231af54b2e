"""What simulated drivers and workers do: they interpret the functions of a program through the verbs of `SimClient`."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from nbray import ids
from nbray.api.machine import PENDING, VALUE, Entry, Scope
from nbray.api.refs import ObjectRef
from nbray.failure_codec import UserFailure, encode_system_error, encode_user_failure
from nbray.messages import (
    ACTOR_CALL,
    CREATE_ACTOR,
    DRIVER,
    PROTOCOL,
    STREAMING,
    TASK,
    WORKER,
    ActorOptions,
    Bye,
    Cancel,
    Configure,
    CreateActor,
    Done,
    DoneMany,
    Failed,
    Free,
    Function,
    Hello,
    Interrupt,
    Item,
    KillActor,
    Register,
    Run,
    StreamRoom,
    Submit,
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
    encode_arguments,
    encode_value,
)
from nbray.testing.oracle import digest_of
from nbray.testing.programs import DEP, HANDLE, MENTION, Operation
from nbray.worker.machine import WorkerMachine

if TYPE_CHECKING:
    from nbray.testing.node import SimNode
    from nbray.testing.world import World

Gets = dict[tuple[int, int], bytes | str]
"""What a driver's gets gave: a digest, or the name of an error."""


class Handle:
    """An actor handle: the actor and the ref that keeps it alive."""

    __slots__ = ("actor", "ref")

    def __init__(self, actor: bytes, ref: ObjectRef[Any]) -> None:
        self.actor = actor
        self.ref = ref


class Frame:
    """One execution: where its ids come from, what its registers hold."""

    __slots__ = ("held", "registers", "source", "task")

    def __init__(self, source: ids.IdSource, task: bytes) -> None:
        self.source = source
        self.task = task
        self.registers: dict[str, Any] = {}
        self.held: list[Val] = []

    def clear(self) -> None:
        for value in self.held:
            if value.release is not None:
                value.release()
        self.held.clear()
        self.registers.clear()


class Program:
    """A client that interprets: the operations of ``nbray.testing.programs`` as messages."""

    def __init__(self, client: SimClient, program: programs.Program) -> None:
        self.client = client
        self.program = program
        self._numbers: dict[str, int] = {}

    def register(self, name: str, kind: int) -> int:
        number = self._numbers.get(name)
        if number is None:
            function = self.program.functions[name]
            content = ids.content_id(name.encode())
            out = self.client.machine.out
            out.append(Function(content, name.encode(), name))
            number = self._numbers[name] = len(self._numbers)
            if kind == TASK:
                returns = STREAMING if function.stream else len(function.returns)
                spec = TaskClass(
                    TASK, content, name, dict(function.resources), returns, function.max_retries, function.retry_exceptions, function.max_calls,
                    function.priority, b"", function.backpressure,
                )  # fmt: skip
            elif kind == CREATE_ACTOR:
                spec = TaskClass(CREATE_ACTOR, content, name, dict(function.resources), max_retries=0)
            else:
                spec = TaskClass(ACTOR_CALL, content, name, {}, len(function.returns), function.max_retries)
            out.append(Register(number, spec))
        return number

    def body(self, body: list[Operation], frame: Frame, state: bytes, gets: Gets | None) -> Verb:
        """Interpret; returns the digest of all that was got."""
        registers = frame.registers
        client = self.client
        world = client.world
        for position, operation in enumerate(body):
            if world.chance(0.3):
                yield Sleep(world.random.choice([0.00001, 0.0001, 0.001]))
            what = operation[0]
            if what in ("call", "stream", "method", "actor"):
                state = yield from self._submit(position, operation, frame, state, gets)
            elif what == "put":
                contained = [registers[name] for name in operation[3] if name in registers]
                try:
                    registers[operation[1]] = yield from self._put(frame, digest_of("put", operation[1], state), operation[2], contained)
                except SimError:
                    if gets is None:
                        raise
            elif what == "get":
                state = yield from self._get(position, operation, frame, state, gets)
            elif what == "open":
                value = registers.get(operation[2])
                if value is not None and value.refs:
                    registers[operation[1]] = value.refs[0]
            elif what == "wait":
                refs = [registers[name] for name in operation[1] if name in registers]
                if refs:
                    count = min(operation[2], len(refs))
                    try:
                        found = yield from client.wait(refs, count, frame.task)
                    except SimError:
                        if gets is None:
                            raise
                    else:
                        client.node.checks.expect(found >= count, f"wait for {count} refs returned with {found} ready")
            elif what == "drop":
                registers.pop(operation[1], None)
            elif what == "sleep":
                yield Sleep(operation[1])
            else:
                self._control(operation, frame)
        return state

    def _put(self, frame: Frame, digest: bytes, size: int, contained: list[ObjectRef[Any]]) -> Verb:
        for ref in contained:
            self.client.entry(ref)
        return (yield from self.client.put(frame.source, digest, size, [ref._id for ref in contained] or None))

    def _get(self, position: int, operation: Operation, frame: Frame, state: bytes, gets: Gets | None, first: int = 0) -> Verb:
        registers, client = frame.registers, self.client
        _, targets, names, timeout, hold = operation
        pairs = [(i, t, registers[n]) for i, (t, n) in enumerate(zip(targets, names, strict=True), first) if n in registers]
        # A driver looks at each by itself, so that one error does not hide the other values; a task gets all at once.
        groups = [[pair] for pair in pairs] if gets is not None else [pairs] if pairs else []
        for group in groups:
            refs = [ref for _, _, ref in group]
            values, problem = yield from self._attempt(refs, timeout, frame.task)
            if problem is not None and problem[0] == "GetTimeoutError":
                values, problem = yield from self._attempt(refs, None, frame.task)
            if problem is not None:
                if gets is None:
                    raise SimError(*problem)
                gets[position, group[0][0]] = problem[0]
                client.node.checks.note(f"driver got {problem[0]}")
                continue
            for (index, target, _), value in zip(group, values, strict=True):
                registers[target] = value
                if gets is not None:
                    gets[position, index] = value.digest
                else:
                    state = digest_of(state, value.digest)
                if value.release is not None:
                    if hold:
                        frame.held.append(value)
                    else:
                        value.release()
        return state

    def _attempt(self, refs: list[ObjectRef[Any]], timeout: float | None, task: bytes) -> Verb:
        """(values, None), or (None, name, text and data of the error): no exception outlives this, its frames would keep refs alive."""
        try:
            return (yield from self.client.get(refs, timeout, task)), None
        except SimError as error:
            return [], (error.name, error.text, error.data)

    def _submit(self, position: int, operation: Operation, frame: Frame, state: bytes, gets: Gets | None) -> Verb:
        registers, client = frame.registers, self.client
        what = operation[0]
        if what == "actor":
            kind = self.program.classes[operation[2]]
            name, args = kind.constructor, operation[3]
        elif what == "method":
            name, args = operation[3], operation[4]
            if operation[2] not in registers:
                return state
        else:
            name, args = operation[2], operation[3]
        if any(not a.startswith("=") and a not in registers for a in args):
            return state
        function = self.program.functions[name]
        number = self.register(name, CREATE_ACTOR if what == "actor" else ACTOR_CALL if what == "method" else TASK)
        source = frame.source
        task = source.call_id(registers[operation[2]].actor) if what == "method" else source.task_id()
        try:
            submit, _kept = yield from self._message(task, number, function, args, frame)
        except SimError:
            if gets is None:
                raise
            return state
        out = client.machine.out
        if what == "actor":
            client.entries[task + ids.FIRST_INDEX] = Entry(0, True)
            options = ActorOptions(kind.name, kind.mode, kind.max_restarts, kind.max_task_retries, kind.max_concurrency)
            out.append(CreateActor(submit, options))
            client.later()
            registers[operation[1]] = Handle(task, client.ref(task + ids.FIRST_INDEX))
        elif what == "stream":
            client.open_stream(task)
            out.append(submit)
            client.later()
            state = yield from self._consume(position, task, operation[4], operation[5], frame, state, gets)
        else:
            for register, object_id in zip(operation[1], (ids.return_id(task, i) for i in range(len(function.returns))), strict=True):
                registers[register] = client.own(object_id)
            out.append(submit)
            client.later()
        return state

    def _message(self, task: bytes, number: int, function: programs.Function, names: list[str], frame: Frame) -> Verb:
        client, registers = self.client, frame.registers
        deps: list[bytes] = []
        refs: list[bytes] = []
        args: list[tuple[str, Any]] = []
        for kind, name in zip(function.params, names, strict=True):
            found = registers.get(name)
            if kind == DEP:
                client.entry(found)
                args.append(("d", len(deps)))
                deps.append(found._id)
            elif kind in (MENTION, HANDLE):
                ref = found.ref if kind == HANDLE else found
                client.entry(ref)
                args.append(("a" if kind == HANDLE else "r", len(refs)))
                refs.append(ref._id)
            elif found is not None and found.refs:
                for ref in found.refs:
                    client.entry(ref)
                args.append(("w", [found.digest, *range(len(refs), len(refs) + len(found.refs))]))
                refs += [ref._id for ref in found.refs]
            else:
                args.append(("v", found.digest if found is not None else digest_of(name)))
        if self.program.features.large and args and client.world.chance(0.1):
            data = encode_arguments([*args, ("pad", bytes(client.world.random.choice([500, 5000])))])
            object_id = frame.source.put_id()
            yield from client.write(object_id, data, None, held=True)
            entry = client.entries[object_id] = Entry()
            entry.state, entry.size = 2, len(data)
            stored = ObjectRef(object_id, client, True)  # type: ignore[arg-type,var-annotated]
            return Submit(task, number, 0, b"", deps or None, refs or None, frame.task, object_id), stored
        return Submit(task, number, 0, encode_arguments(args) if args else b"", deps or None, refs or None, frame.task), None

    def _consume(
        self, position: int, task: bytes, taken: int, between: list[str], frame: Frame, state: bytes, gets: Gets | None
    ) -> Verb:
        """Take items of a generator; after each, get one of the other refs."""
        client = self.client
        ended = False
        try:
            for index in range(taken):
                ref = yield from client.next_item(task, frame.task)
                if ref is None:
                    ended = True
                    break
                try:
                    values = yield from client.get([ref], None, frame.task)
                except SimError as error:
                    if gets is None:
                        raise
                    gets[position, index] = error.name
                    break
                finally:
                    ref = None
                if values[0].release is not None:
                    values[0].release()
                if gets is not None:
                    gets[position, index] = values[0].digest
                else:
                    state = digest_of(state, values[0].digest)
                if index < len(between):
                    between_items = ("get", [f"{between[index]}'"], [between[index]], None, False)
                    state = yield from self._get(position, between_items, frame, state, gets, 1000 + index)
        finally:
            if not ended:
                client.dropped(task)
        return state

    def _control(self, operation: Operation, frame: Frame) -> None:
        client, registers = self.client, frame.registers
        found = registers.get(operation[1])
        if found is None:
            return
        if operation[0] == "cancel":
            client.machine.out.append(Cancel(ids.task_of(found._id), operation[2], operation[3]))
        elif operation[0] == "kill":
            client.machine.out.append(KillActor(found.actor, operation[2]))
        else:
            entry = client.entry(found)
            client.machine.out.append(Free([found._id]))
            if entry.state != PENDING and (entry.state == VALUE or not entry.pins):
                entry.state = PENDING
                entry.data = b""
                entry.mine = False
        client.flush()


class SimDriver(SimClient):
    """A driver: runs its program, keeps what its gets gave, lets go of everything."""

    def __init__(self, world: World, node: SimNode, number: int, pid: int, program: programs.Program, index: int) -> None:
        super().__init__(world, node, number, pid)
        self.index = index
        self.interpreter = Program(self, program)
        self.gets: Gets = {}
        self.finished = False
        self.doing = "says hello"
        self.welcome: Welcome | None = None

    def on_message(self, message: Any) -> None:
        if type(message) is Welcome:
            self.welcome = message
        else:
            super().on_message(message)

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
        self.arm()
        self.finished = True

    def leave(self) -> Verb:
        """Say goodbye, as ``shutdown`` does."""
        yield from self.request(lambda request: Bye(request))
        self.doing = "has left"


class SimWorker(SimClient):
    """A worker process: `WorkerMachine` decides what runs, fibers run it."""

    reads_in_background = False

    def __init__(self, world: World, node: SimNode, number: int, pid: int, worker: int, program: programs.Program) -> None:
        super().__init__(world, node, number, pid)
        self.worker = worker
        self.interpreter = Program(self, program)
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
                seen = self.told
                yield Until(lambda at=seen: bool(self.pipe) or self.told != at)  # type: ignore[misc]
                continue
            if machine.done:
                return None
            yield Until(lambda: bool(machine.queue) or machine.done)

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
            report = Failed(run.run, started, world.now - started, data, spec.retry_exceptions and error.name.startswith("user "))
        except Interrupted:
            data = encode_user_failure(UserFailure(b"", "", "KeyboardInterrupt", "", "", spec.name, "node", self.pid))
            report = Failed(run.run, started, world.now - started, data, False)
        returned = [frame.registers[name] for name in function.contains if name in frame.registers]
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

    def _failure(self, error: SimError, spec: TaskClass, run: Run) -> bytes:
        if error.name.startswith("user "):
            return encode_user_failure(UserFailure(b"", "", error.name, error.text, "", spec.name, "node", self.pid, run.attempt))
        return encode_system_error(error.name, error.text)

    def _work(self, function: programs.Function) -> Verb:
        """The user's code computes."""
        if function.stubborn:
            current, self.current = self.current, 0
            yield Sleep(function.seconds * self.world.random.uniform(0.5, 1.5))
            self.current = current
        else:
            yield Sleep(function.seconds * self.world.random.uniform(0.5, 1.5))

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
                    yield Until(lambda at=index: consumed.get(run.task, 0) == -1 or at + 1 - consumed.get(run.task, 0) < room)  # type: ignore[misc]
                finally:
                    self.machine.out.append(Unblocked(request))
                if consumed.get(run.task) == -1:
                    break

    def _report(self, run: Run, function: programs.Function, frame: Frame, state: bytes, started: float) -> Verb:
        world = self.world
        if function.stream:
            return DoneMany(run.run, started, world.now - started, [])
        values: list[tuple[int, bytes, list[bytes] | None]] = []
        for index, size in enumerate(function.returns):
            contained = [frame.registers[name] for name in function.contains if name in frame.registers] if index == 0 else []
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
    entries = [f"{ids.short(o)} is {'PENDING VALUE READY LOCATED'.split()[e.state]}" for o, e in client.entries.items() if e.state not in (1, 3)]
    return f"{len(client.fibers)} fibers, {sum(f.until is not None for f in client.fibers)} waiting; {', '.join(entries[:8])}"

