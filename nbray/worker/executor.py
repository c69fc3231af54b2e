"""Executes runs in a worker: arguments in, the user's function, values and errors out; and what an actor's mode changes about that.

A *serial* worker (tasks, plain actors) executes in the main thread, one run after the other. A *threaded* actor has a pool of threads per concurrency
group, an *async* actor an event loop in the main thread with a limit per group; their main thread takes runs in and the results leave as they come.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from nbray import ids, platform
from nbray.api import actor as actors
from nbray.api import context
from nbray.api.failures import allows_retry, describe_failure
from nbray.api.functions import load_function
from nbray.api.machine import Scope
from nbray.failure_codec import encode_system_error
from nbray.messages import (
    ACTOR_CALL,
    CREATE_ACTOR,
    STREAMING,
    ActorOptions,
    Configure,
    Done,
    DoneMany,
    Failed,
    Item,
    Leaving,
    Run,
    TaskClass,
)
from nbray.store import serialization
from nbray.worker.adoption import cannot_draw, plain
from nbray.worker.display import flush_figures

if TYPE_CHECKING:
    from nbray.engine.local import LocalEngine
    from nbray.worker.main import WorkerInterrupts, WorkerLoop
    from nbray.worker.output import Channel

UNWANTED = -1
"""In place of the number of items taken: the consumer wants no more."""

EARLY_LIMIT = 10_000

SLOW_FLUSH = 0.001
"""Seconds of results that may wait for those of the runs behind them."""


class Executor:
    """What a worker runs, and the actor that it may be."""

    def __init__(self, loop: WorkerLoop, engine: LocalEngine, interrupts: WorkerInterrupts) -> None:
        self.loop = loop
        self.engine = engine
        self.machine = engine.machine
        self.interrupts = interrupts
        self.channel: Channel | None = None
        self.consumed: dict[bytes, int] = {}
        self.mode = "serial"
        self.ended = False
        self.options: ActorOptions | None = None
        self.instance: Any = None
        self.actor = b""
        self.restarts = 0
        self._functions: dict[bytes, tuple[Any, Any, bool]] = {}
        self._running: dict[bytes, tuple[context.TaskContext, asyncio.Task[Any] | None]] = {}
        self._early: set[bytes] = set()
        """Calls that were cancelled before they began."""
        self._title = ""
        self._flushed = 0.0
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._async: asyncio.AbstractEventLoop | None = None
        self._room_made = asyncio.Event()
        self._surroundings = loop.surroundings
        self._running_function = loop.surroundings.main.running
        self._seeder = loop.common.seeder
        self._inline = engine.machine.inline_limit

    @property
    def running(self) -> dict[bytes, tuple[context.TaskContext, asyncio.Task[Any] | None]]:
        """Calls of a threaded or async actor that run now."""
        return self._running

    # -- one run

    def _function(self, spec: TaskClass) -> tuple[Any, Any, bool]:
        """The function, which exceptions allow another attempt, and whether it cannot draw random numbers."""
        found = self._functions.get(spec.function)
        if found is None:
            target, retry = load_function(self.loop.blobs[spec.function], spec.function)
            found = self._functions[spec.function] = (target, retry, cannot_draw(target))
        return found

    def _seed(self, run: Run, spec: TaskClass) -> None:
        """Seed the random generators, unless the run cannot draw from them."""
        if not (
            self._function(spec)[2] and run.deps is None and run.args_at is None and plain(run.kind, run.args)
        ):
            self._seeder.seed(run.task)

    def _context(self, run: Run, spec: TaskClass) -> context.TaskContext:
        """What the user's code and its threads are told of the run they belong to."""
        return context.TaskContext(
            run.task,
            spec.name,
            actor=self.actor,
            attempt=run.attempt,
            restarts=self.restarts,
            cell=run.cell,
            gpus=self._surroundings.gpus,
        )

    def execute(self, run: Run, spec: TaskClass) -> None:
        """Execute a run in this thread, up to its report."""
        name = spec.name
        if name is not self._title:
            self._title = name
            platform.set_process_title(f"nbray worker: {name}")
        task = self._context(run, spec)
        token = context.current_task.set(task)
        self.engine.running = task
        scopes: list[Scope] = []
        interrupts = self.interrupts
        started = time.monotonic()
        report: Any
        surroundings = self._surroundings
        interrupts.prepare(run.run)
        try:
            if surroundings.changes and surroundings.enter(run.run):
                self._functions.clear()
            if surroundings.problem:
                surroundings.check()
            function, args, kwargs = self._prepare(run, spec, scopes)
            if spec.kind != ACTOR_CALL:
                # After what the modules of function and arguments do when they are imported, which happens once per worker.
                self._seed(run, spec)
            try:
                interrupts.begin()
                value = function(*args, **kwargs)
                if spec.num_returns == STREAMING:
                    self._stream(run, spec, value)
                elif spec.kind == ACTOR_CALL and inspect.iscoroutine(value):
                    value = asyncio.run(value)
                if run.cell:
                    flush_figures()
            finally:
                interrupts.active = False
            args = kwargs = function = None  # type: ignore[assignment]
            report = self._report(run, spec, value, started)
        except BaseException as error:  # noqa: BLE001  (whatever the user's code raises is its result)
            args = kwargs = function = value = None  # type: ignore[assignment]
            report = self._failure(run, spec, error, started)
            error.__traceback__ = None
        finally:
            interrupts.end()
            self.engine.running = None
            context.current_task.reset(token)
            if surroundings.touched() and not self.actor:
                surroundings.restore()
        self._finish(run.task, report, scopes)
        # Not before: refs that it contains must not be dropped before the report says that it contains them.
        value = None
        if report.started + report.seconds - self._flushed > SLOW_FLUSH:
            self._flushed = report.started + report.seconds
            self.engine.link.flush()
        elif self.engine.link.cold:
            # The run behind this one may take long.
            self.engine.link.arm()

    def _prepare(self, run: Run, spec: TaskClass, scopes: list[Scope]) -> tuple[Callable[..., Any], Any, Any]:
        """The function and its arguments. Raises what loading or unpickling them raises."""
        if run.task in self._early:
            self._early.discard(run.task)
            raise asyncio.CancelledError
        if spec.kind == ACTOR_CALL:
            function = actors.resolve_method(
                self.instance, spec.name.rpartition(".")[2] if "." in spec.name else spec.name
            )
        else:
            function = self._function(spec)[0]
            self._running_function[0] = function
            if spec.kind == CREATE_ACTOR:
                function = partial(self._construct, function)
        if not run.args and run.args_at is None and run.deps is None:
            return function, (), {}
        values: list[Any] = [self._argument(dep, scopes) for dep in run.deps or ()]
        if not getattr(function, "takes_raw_arguments", False):
            values = [raw.value() for raw in values]
        refs = self.engine.borrow(run.refs, scopes)
        data: bytes | memoryview = run.args
        if run.args_at is not None:
            offset, size = run.args_at
            data = self.engine.memory.private(offset, size, self.engine.pinned_argument(run.args_object))
        args, kwargs = serialization.deserialize_args(
            run.kind, data, refs, values, writable=True if run.args_at is None else None
        )
        return function, args, kwargs

    def _argument(self, dep: tuple[Any, ...], scopes: list[Scope]) -> serialization.Raw:
        """An argument that was a ref: a private copy on write, as all inputs."""
        if len(dep) == 4:
            _, kind, data, refs = dep
            return serialization.Raw(kind, data, self.engine.borrow(refs, scopes))
        object_id, kind, offset, size, refs = dep
        view = self.engine.memory.private(offset, size, self.engine.pinned_argument(object_id))
        return serialization.Raw(kind, view, self.engine.borrow(refs, scopes))

    def _construct(self, kind: Any, *args: Any, **kwargs: Any) -> None:
        assert self.options is not None
        if self.options.mode == "async":
            self._async = asyncio.new_event_loop()
            asyncio.set_event_loop(self._async)
        self.instance = kind(*args, **kwargs)
        self.mode = self.options.mode

    def _report(self, run: Run, spec: TaskClass, value: Any, started: float) -> Any:
        """The message that says what a run returned."""
        returns = spec.num_returns
        if returns == 1:
            packed = serialization.serialize(value, f"the return value of {spec.name}")
            if packed.size <= self._inline:
                return Done(
                    run.run, started, time.monotonic() - started, packed.kind, packed.flat(), packed.refs
                )
            self.engine.write(ids.return_id(run.task, 0), packed, held=False)
            return DoneMany(run.run, started, time.monotonic() - started, [(-1, b"", None)])
        if returns in (0, STREAMING):
            return DoneMany(run.run, started, time.monotonic() - started, [])
        values: list[Any] | None
        try:
            values = list(value)
        except TypeError:
            values = None
        if values is None or len(values) != returns:
            got = f"{len(values)} values" if values is not None else f"one {type(value).__name__}"
            raise ValueError(
                f"{spec.name} has num_returns={returns}, so it must return {returns} values; it returned {got}"
            )
        sealed = []
        for index, each in enumerate(values):
            packed = serialization.serialize(each, f"return value {index} of {spec.name}")
            if packed.size <= self._inline:
                sealed.append((packed.kind, packed.flat(), packed.refs))
            else:
                self.engine.write(ids.return_id(run.task, index), packed, held=False)
                sealed.append((-1, b"", None))
        return DoneMany(run.run, started, time.monotonic() - started, sealed)

    def _failure(self, run: Run, spec: TaskClass, error: BaseException, started: float) -> Any:
        """The message that says how a run failed."""
        seconds = time.monotonic() - started
        if isinstance(error, actors.ActorExit):
            self.ended = True
            self.machine.out.append(Leaving("it left by exit_actor()"))
            data = encode_system_error(
                "ActorDiedError", f"the actor ended itself by exit_actor() in {spec.name}"
            )
            return Failed(run.run, started, seconds, data, False, None, True)
        retry = (
            self._functions.get(spec.function, (None, None, False))[1] if spec.kind != ACTOR_CALL else None
        )
        if spec.kind == ACTOR_CALL:
            method = getattr(type(self.instance), spec.name.rpartition(".")[2], None)
            retriable = spec.retry_exceptions or allows_retry(error, actors.retry_exceptions_of(method))
        else:
            retriable = spec.retry_exceptions or allows_retry(error, retry)
        data = describe_failure(
            error, task=spec.name, node=self.engine.welcome.node, pid=os.getpid(), attempt=run.attempt,
            actor=spec.name.partition(".")[0] if spec.kind == CREATE_ACTOR else "",
        )  # fmt: skip
        return Failed(run.run, started, seconds, data, bool(retriable) and isinstance(error, Exception))

    def _finish(self, task: bytes, report: Any, scopes: list[Scope]) -> None:
        """Hold the argument refs that are still alive, then report: output first, so that it is there when the result is."""
        channel = self.channel
        if channel is not None and channel.busy:
            channel.ended(task)
        if scopes:
            self.engine.close_scopes(scopes)
        self.machine.out.append(report)

    # -- generators

    def _stream(self, run: Run, spec: TaskClass, items: Any) -> None:
        """Send the items of a generator as they come; wait while the consumer is too far behind."""
        if inspect.isasyncgen(items):
            items = _drain(items)
        if not hasattr(items, "__next__"):
            items = iter(items)
        for index, value in enumerate(items):
            self._send_item(run, spec, index, value)
            del value
            if self._too_far(run, spec, index + 1):
                # Without its CPU: what the consumer does before it takes the next item may need that.
                request = self.engine.pause(run.task)
                try:
                    self.engine.link.wait(partial(self._has_room, run, spec, index + 1), None)
                finally:
                    self.engine.resume(request)
            if self.consumed.get(run.task) == UNWANTED:
                break
        self.consumed.pop(run.task, None)
        if hasattr(items, "close"):
            items.close()

    def _send_item(self, run: Run, spec: TaskClass, index: int, value: Any) -> None:
        packed = serialization.serialize(value, f"item {index} of {spec.name}")
        if packed.size <= self._inline:
            self.machine.out.append(Item(run.run, index, packed.kind, packed.flat(), packed.refs))
        else:
            self.engine.write(ids.return_id(run.task, index), packed, held=False)
            self.machine.out.append(Item(run.run, index, -1, b""))
        self.engine.link.later()

    def _too_far(self, run: Run, spec: TaskClass, made: int) -> bool:
        return bool(spec.backpressure) and not self._has_room(run, spec, made)

    def _has_room(self, run: Run, spec: TaskClass, made: int) -> bool:
        """Whether the consumer has taken enough of the ``made`` items, or wants no more."""
        consumed = self.consumed.get(run.task, 0)
        return consumed == UNWANTED or made - consumed < spec.backpressure

    # -- actors

    def configure(self, message: Configure) -> None:
        """This worker is an actor from now on."""
        self.actor = message.actor
        self.options = message.options
        self.restarts = message.restarts
        actors.become(message.actor, message.options)

    def interrupt(self, task: bytes) -> None:
        """Cancel a call: a coroutine is cancelled, others see it in their runtime context."""
        running = self._running.get(task)
        if running is not None:
            running[0].cancelled = True
            if running[1] is not None:
                running[1].cancel()
            return
        current = context.current_task.get()
        if current is not None and current.task == task:
            current.cancelled = True
            return
        # It has come and not begun, or has ended.
        if len(self._early) >= EARLY_LIMIT:
            self._early.clear()
        self._early.add(task)

    def serve(self, loop: WorkerLoop) -> None:
        """After the constructor of an async or threaded actor: run calls side by side until the actor ends."""
        if self.mode == "async":
            self._serve_async(loop)
        else:
            self._serve_threads(loop)

    def _serve_threads(self, loop: WorkerLoop) -> None:
        options = self.options
        assert options is not None
        self._pools = {
            name: ThreadPoolExecutor(limit, f"group-{name}") for name, limit in options.groups.items()
        }
        self._pools[""] = ThreadPoolExecutor(options.max_concurrency, "calls")
        # Calls that wait must not read what is meant for this loop, which goes on reading.
        self.engine.link.reader = threading.get_ident()
        while not self.ended:
            run = loop.next_run()
            if run is None:
                break
            spec = loop.kinds[run.number]
            self._pools[spec.concurrency_group if spec.concurrency_group in self._pools else ""].submit(
                self._thread_run, run, spec
            )
        for pool in self._pools.values():
            pool.shutdown(wait=not self.ended)

    def _thread_run(self, run: Run, spec: TaskClass) -> None:
        task = self._context(run, spec)
        token = context.current_task.set(task)
        self._running[run.task] = (task, None)
        scopes: list[Scope] = []
        started = time.monotonic()
        report: Any
        try:
            function, args, kwargs = self._prepare(run, spec, scopes)
            value = function(*args, **kwargs)
            if spec.num_returns == STREAMING:
                self._stream(run, spec, value)
            args = kwargs = None
            report = self._report(run, spec, value, started)
        except BaseException as error:  # noqa: BLE001
            report = self._failure(run, spec, error, started)
        finally:
            del self._running[run.task]
            context.current_task.reset(token)
        self._finish(run.task, report, scopes)
        self.engine.link.flush()
        if self.ended:
            self._leave_from_thread()

    def _leave_from_thread(self) -> None:
        """exit_actor in a thread or coroutine: what was said is sent, then the process ends without waiting for the others."""
        self.engine.link.flush()
        os._exit(0)

    def _serve_async(self, loop: WorkerLoop) -> None:
        options = self.options
        assert options is not None
        event_loop = self._async or asyncio.new_event_loop()
        asyncio.set_event_loop(event_loop)
        limits = {name: asyncio.Semaphore(limit) for name, limit in options.groups.items()}
        limits[""] = asyncio.Semaphore(options.max_concurrency)
        done = event_loop.create_future()
        tasks: set[asyncio.Task[Any]] = set()
        link = self.engine.link

        reading = False

        def readable() -> None:
            nonlocal reading
            reading = True
            link.poll_now()
            reading = False
            loop.take_in()
            while loop.queue:
                run = loop.queue.popleft()
                spec = loop.kinds[run.number]
                limit = limits.get(spec.concurrency_group, limits[""])
                task = event_loop.create_task(self._coroutine(run, spec, limit, flush_soon))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if (loop.leaving or link.dead) and not done.done():
                done.set_result(None)

        flushing = False

        def flush_soon() -> None:
            nonlocal flushing
            if not flushing:
                flushing = True
                event_loop.call_soon(flush)

        def flush() -> None:
            nonlocal flushing
            flushing = False
            link.flush()

        async def serve() -> None:
            readable()
            await done
            if tasks and not link.dead:
                await asyncio.wait(tasks, timeout=5.0)
            link.flush()

        def taken() -> None:
            before()
            if self.engine.inbox and not reading:
                # A method that waits without await has read what is meant for this loop.
                event_loop.call_soon_threadsafe(readable)

        before, link.after_read = link.after_read, taken
        link.reader = threading.get_ident()
        event_loop.add_reader(link.sock, readable)
        try:
            event_loop.run_until_complete(serve())
        finally:
            event_loop.remove_reader(link.sock)

    async def _coroutine(
        self, run: Run, spec: TaskClass, limit: asyncio.Semaphore, flush_soon: Callable[[], None]
    ) -> None:
        async with limit:
            task = self._context(run, spec)
            context.current_task.set(task)
            self._running[run.task] = (task, asyncio.current_task())
            scopes: list[Scope] = []
            started = time.monotonic()
            report: Any
            try:
                function, args, kwargs = self._prepare(run, spec, scopes)
                value = function(*args, **kwargs)
                if inspect.isawaitable(value):
                    value = await value
                if spec.num_returns == STREAMING:
                    await self._stream_async(run, spec, value)
                args = kwargs = None
                report = self._report(run, spec, value, started)
            except asyncio.CancelledError as error:
                report = self._failure(run, spec, error, started)
            except BaseException as error:  # noqa: BLE001
                report = self._failure(run, spec, error, started)
            finally:
                self._running.pop(run.task, None)
            self._finish(run.task, report, scopes)
            if self.ended:
                self._leave_from_thread()
            flush_soon()

    async def _stream_async(self, run: Run, spec: TaskClass, items: Any) -> None:
        if not inspect.isasyncgen(items):
            self._stream(run, spec, items)
            return
        index = 0
        async for value in items:
            self._send_item(run, spec, index, value)
            index += 1
            if self._too_far(run, spec, index):
                self._room_made.clear()
                while not self._has_room(run, spec, index):
                    self.engine.link.flush()
                    await self._room_made.wait()
                    self._room_made.clear()
            if self.consumed.get(run.task) == UNWANTED:
                break
        self.consumed.pop(run.task, None)

    def take_room(self, task: bytes, consumed: int) -> None:
        """The consumer of a generator has taken this many items."""
        self.consumed[task] = consumed
        self._room_made.set()

    def close(self) -> None:
        """The worker ends: let go of the actor."""
        self.instance = None


def _drain(items: Any) -> Any:
    """The items of an async generator, for a caller that has no event loop."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(items.__anext__())
            except StopAsyncIteration:
                return
    finally:
        loop.close()
