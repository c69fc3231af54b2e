"""The operations of ``nbray.testing.programs``, carried out through the verbs of a `SimClient`: what user code does in a simulated process."""

from __future__ import annotations

from typing import Any

from nbray import ids
from nbray.api.machine import Entry
from nbray.api.refs import ObjectRef
from nbray.messages import (
    ACTOR_CALL,
    CREATE_ACTOR,
    STREAMING,
    TASK,
    ActorOptions,
    Cancel,
    CreateActor,
    Function,
    KillActor,
    Register,
    Submit,
    TaskClass,
)
from nbray.testing import programs
from nbray.testing.clients import (
    SimClient,
    SimError,
    Sleep,
    Val,
    Verb,
    encode_arguments,
)
from nbray.testing.oracle import digest_of
from nbray.testing.programs import DEP, HANDLE, MENTION, Operation

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


class Interpreter:
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
                    registers[operation[1]] = yield from self._put(
                        frame, digest_of("put", operation[1], state), operation[2], contained
                    )
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
                        client.node.checks.expect(
                            found >= count, f"wait for {count} refs returned with {found} ready"
                        )
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
        return (
            yield from self.client.put(frame.source, digest, size, [ref._id for ref in contained] or None)
        )

    def _get(
        self,
        position: int,
        operation: Operation,
        frame: Frame,
        state: bytes,
        gets: Gets | None,
        first: int = 0,
    ) -> Verb:
        registers, client = frame.registers, self.client
        _, targets, names, timeout, hold = operation
        pairs = [
            (i, t, registers[n])
            for i, (t, n) in enumerate(zip(targets, names, strict=True), first)
            if n in registers
        ]
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

    def _submit(
        self, position: int, operation: Operation, frame: Frame, state: bytes, gets: Gets | None
    ) -> Verb:
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
        number = self.register(
            name, CREATE_ACTOR if what == "actor" else ACTOR_CALL if what == "method" else TASK
        )
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
            options = ActorOptions(
                kind.name, kind.mode, kind.max_restarts, kind.max_task_retries, kind.max_concurrency
            )
            out.append(CreateActor(submit, options))
            client.later()
            registers[operation[1]] = Handle(task, client.ref(task + ids.FIRST_INDEX))
        elif what == "stream":
            client.open_stream(task)
            out.append(submit)
            client.later()
            state = yield from self._consume(position, task, operation[4], operation[5], frame, state, gets)
        else:
            for register, object_id in zip(
                operation[1], (ids.return_id(task, i) for i in range(len(function.returns))), strict=True
            ):
                registers[register] = client.own(object_id)
            out.append(submit)
            client.later()
            if gets is not None and what == "call":
                client.node.naming.submitted(client, task)
        return state

    def _message(
        self, task: bytes, number: int, function: programs.Function, names: list[str], frame: Frame
    ) -> Verb:
        client, registers = self.client, frame.registers
        deps: list[bytes] = []
        refs: list[bytes] = []
        args: list[tuple[str, Any]] = []
        for kind, name in zip(function.params, names, strict=True):
            found: Any = registers.get(name)
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
        return Submit(
            task, number, 0, encode_arguments(args) if args else b"", deps or None, refs or None, frame.task
        ), None

    def _consume(
        self,
        position: int,
        task: bytes,
        taken: int,
        between: list[str],
        frame: Frame,
        state: bytes,
        gets: Gets | None,
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
            client.entry(found)
            client.machine.free([found._id])
        client.flush()
