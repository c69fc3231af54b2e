"""Values that futures wait for: ``ref.future()`` and ``await ref``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nbray.api.machine import LOCATED, VALUE, Entry

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbray.api.refs import ObjectRef
    from nbray.engine.local import LocalEngine


class Awaited:
    """A value that a future waits for; keeps the ref until then."""

    __slots__ = ("engine", "entry", "future", "once", "ref", "running")

    def __init__(self, engine: LocalEngine, ref: ObjectRef[Any], entry: Entry, future: Future[Any]) -> None:
        self.engine = engine
        self.ref = ref
        self.entry = entry
        self.future = future
        self.running = engine.running
        self.once: Iterator[bool] = iter(())

    def ask(self) -> None:
        """Have the value brought; resolves the future at once when it is here."""
        engine, entry, machine = self.engine, self.entry, self.engine.machine
        self.once = iter((True,))
        with engine._lock:
            if entry.state not in (VALUE, LOCATED):
                if entry.callbacks is None:
                    entry.callbacks = []
                entry.callbacks.append(self.came)
                if self.running is None:
                    machine.ask([self.ref._id])
                else:
                    # Who awaits in a task needs no CPU until then, and the value may need it.
                    number = engine._requests()
                    machine.ask(
                        [self.ref._id], blocked=True, request=number, task=self.running.task, ends=True
                    )
        # Also when it has come while the callback was put in place: the thread that read may not have seen it.
        if entry.state in (VALUE, LOCATED):
            self.came()
            return
        link = engine.link
        link.active = 0.0
        link.flush()
        if not link.background and not link.reader:
            link.read_in_background()
        if engine.closed or link.dead:
            engine._fail_futures()

    def came(self) -> None:
        """The value has come, or never will; whoever notices first says so."""
        if not next(self.once, False):
            return
        engine, entry = self.engine, self.entry
        try:
            if (engine.closed or engine.link.dead) and entry.state not in (VALUE, LOCATED):
                engine._check()
            found, value = engine.read(self.ref._id, entry, False)
        except BaseException as error:  # noqa: BLE001  (whatever it is belongs to whoever waits)
            self.future.set_exception(error)
            return
        if found:
            self.future.set_result(value)
        else:
            self.ask()
