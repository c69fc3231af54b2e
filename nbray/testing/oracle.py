"""What a program computes when it runs serially, in one process, without any machine: the dumb second implementation.

Every call is executed at once; a ref is its value. An error is the set of errors that may come out: which of several bad inputs is met first is not a
program's to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from nbray.testing.programs import HANDLE, MENTION, Function, Operation, Program


def digest_of(*parts: bytes | str) -> bytes:
    """16 bytes that stand for a value."""
    found = blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(4, "little") + data)
    return found.digest()


@dataclass(frozen=True)
class Outcome:
    """A value (its digest and what it contains), or the names of the errors that it may be."""

    digest: bytes = b""
    contains: tuple[Outcome, ...] = ()
    errors: frozenset[str] = frozenset()


class _RaisedError(Exception):
    def __init__(self, errors: frozenset[str]) -> None:
        super().__init__(errors)
        self.errors = errors


Gets = dict[tuple[int, int], Outcome]
"""What a driver's gets give: (position of the operation in its program, index in the operation) -> outcome."""


class Serial:
    """Interprets programs."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def drive(self, index: int) -> Gets:
        """What the gets of this driver must give."""
        gets: Gets = {}
        self._body(self.program.mains[index], {}, digest_of("driver"), gets)
        return gets

    def _call(
        self, function: Function, args: list[Any], broken: frozenset[str] = frozenset()
    ) -> list[Outcome]:
        errors = broken
        state = digest_of(function.name)
        registers: dict[str, Any] = {}
        for position, (kind, arg) in enumerate(zip(function.params, args, strict=True)):
            registers[f"arg{position}"] = arg
            if kind in (MENTION, HANDLE):
                continue
            if isinstance(arg, Outcome) and arg.errors:
                errors |= arg.errors
            else:
                state = digest_of(state, arg.digest)
        count = len(function.returns)
        if errors:
            return [Outcome(errors=errors)] * (1 if function.stream else count)
        try:
            state = self._body(function.body, registers, state, None)
        except _RaisedError as raised:
            return [Outcome(errors=raised.errors)] * (1 if function.stream else count)
        last = [Outcome(errors=frozenset({f"user {function.name}"}))]
        if function.raises and not (
            function.raises > 0 and function.retry_exceptions and function.max_retries >= function.raises
        ):
            return (
                [Outcome(digest_of(state, str(i))) for i in range(count)] + last
                if function.stream
                else last * count
            )
        contains = tuple(registers[name] for name in function.contains if name in registers)
        return [Outcome(digest_of(state, str(i)), contains if i == 0 else ()) for i in range(count)]

    def _arguments(self, function: Function, names: list[str], registers: dict[str, Any]) -> list[Any]:
        found = []
        for name in names:
            found.append(Outcome(digest_of(name)) if name.startswith("=") else registers[name])
        return found

    def _body(
        self, body: list[Operation], registers: dict[str, Any], state: bytes, gets: Gets | None
    ) -> bytes:
        functions = self.program.functions
        for position, operation in enumerate(body):
            what = operation[0]
            if what in ("call", "stream", "method"):
                names, args = (
                    (operation[2], operation[3]) if what != "method" else (operation[3], operation[4])
                )
                function = functions[names]
                if any(not a.startswith("=") and a not in registers for a in args):
                    continue
                if what == "method" and operation[2] not in registers:
                    continue
                broken = registers[operation[2]] if what == "method" else frozenset()
                results = self._call(function, self._arguments(function, args, registers), broken)
                if what == "stream":
                    for index, outcome in enumerate(results[: operation[4]]):
                        state = self._got(outcome, state, gets, (position, index))
                        if outcome.errors:
                            break
                        if index < len(operation[5]) and operation[5][index] in registers:
                            other = registers[operation[5][index]]
                            state = self._got(other, state, gets, (position, 1000 + index))
                else:
                    registers.update(zip(operation[1], results, strict=True))
            elif what == "put":
                contains = tuple(registers[name] for name in operation[3] if name in registers)
                registers[operation[1]] = Outcome(digest_of("put", operation[1], state), contains)
            elif what == "get":
                for index, (register, name) in enumerate(zip(operation[1], operation[2], strict=True)):
                    if name in registers:
                        outcome = registers[name]
                        state = self._got(outcome, state, gets, (position, index))
                        if not outcome.errors:
                            registers[register] = outcome
            elif what == "open":
                value = registers.get(operation[2])
                if value is not None and value.contains:
                    registers[operation[1]] = value.contains[0]
            elif what == "drop":
                registers.pop(operation[1], None)
            elif what == "actor":
                kind = self.program.classes[operation[2]]
                function = functions[kind.constructor]
                if all(a.startswith("=") or a in registers for a in operation[3]):
                    made = self._call(function, self._arguments(function, operation[3], registers))[0]
                    registers[operation[1]] = (
                        frozenset({"ActorDiedError"}) | made.errors if made.errors else frozenset()
                    )
        return state

    def _got(self, outcome: Outcome, state: bytes, gets: Gets | None, key: tuple[int, int]) -> bytes:
        if gets is not None:
            gets[key] = outcome
            return state
        if outcome.errors:
            raise _RaisedError(outcome.errors)
        return digest_of(state, outcome.digest)
