"""The node process: the shell around `NodeMachine`. One thread, one loop over what is ready; disk work in a helper thread.

It never blocks on a peer, never unpickles, and holds no decision: what arrives goes into the machine, what the machine wants is carried out.
"""

from __future__ import annotations

import codecs
import errno
import gc
import logging
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from nbray import platform
from nbray.clusters import Paths, private_directory
from nbray.flow import Bucket
from nbray.gcs.client import GcsClient
from nbray.gcs.messages import PROTOCOL as GCS_PROTOCOL
from nbray.gcs.messages import HeadToNode, RegisterNode
from nbray.logs import LogFile
from nbray.messages import DRIVER, ClientToNode
from nbray.node.children import Children
from nbray.node.disk import Disk
from nbray.node.looks import Look
from nbray.node.machine import Close, NodeConfig, NodeMachine, Renew, Signal, Stop, TakeTokens
from nbray.node.names import Save
from nbray.node.peer import Peer
from nbray.node.pool import Fork, Kill
from nbray.node.scarcity import AskLargest
from nbray.store.memory import SharedMemory
from nbray.store.objects import DeleteSpilled, Restore, Spill, Write
from nbray.transport.connection import Connection
from nbray.transport.frames import encode_frame
from nbray.transport.pace import Pace
from nbray.transport.spinning import spin

log = logging.getLogger("nbray.node")

HOLD_BACK = 0.001
"""Seconds for which results are collected for a driver while there is other work."""

HOLD_UNASKED = 0.003
"""Seconds for which results are collected that were not asked for yet."""

MEMORY_CHECK = 0.25
"""Seconds between looks at the machine's memory while tasks run."""

MEMORY_LIMIT = 0.95
"""Share of the memory limit from which on tasks are ended."""

STEADY = 5.0
"""A head or worker that ends sooner after its start (seconds) may do so again: the next one is started after a pause that doubles."""

LONGEST_PAUSE = 5.0

RAW_RATE = 16 * 1024 * 1024
"""Bytes per second that the node reads of what one worker writes below Python."""

RAW_REST = 0.02
"""Seconds for which it does not read one that writes faster."""

FAREWELL = 0.2
"""Seconds that a node which ends has for sending its last messages."""


class Backoff:
    """When something that has ended may be started again: at once, but later and later if it never lives long."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._started = 0.0

    def started(self, now: float) -> None:
        self._started = now

    def ended(self, now: float) -> float:
        """When to start the next one."""
        if now - self._started >= STEADY:
            self._pause = 0.0
            return now
        self._pause = min(self._pause * 2 or 0.02, LONGEST_PAUSE)
        return now + self._pause

    def fine(self) -> None:
        """It works: what ends later does so for another reason."""
        self._pause = 0.0


class RawStream:
    """What a worker (or a program that it started) writes to a file descriptor: as text, and not faster than the node wants to read."""

    __slots__ = ("decode", "name", "pace")

    def __init__(self, name: str) -> None:
        self.name = name
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.pace = Bucket(RAW_RATE, RAW_RATE / 4)


class WorkerLink:
    """What the shell has of a worker besides its connection: the pipes that outlive it."""

    __slots__ = ("connection", "interrupt", "log", "output", "pid", "token_read", "token_write", "zygote")

    def __init__(
        self,
        connection: int,
        token_read: int,
        token_write: int,
        interrupt: int,
        output: list[tuple[str, int]],
        zygote: socket.socket,
    ) -> None:
        self.connection = connection
        self.token_read = token_read
        self.token_write = token_write
        self.interrupt = interrupt
        self.output = output
        self.zygote = zygote
        self.pid = 0
        self.log: LogFile | None = None
        """Where that goes which the worker writes below Python."""


class NodeServer:
    """Runs one node until it is told to stop."""

    def __init__(
        self,
        config: NodeConfig,
        paths: Paths,
        memory: SharedMemory,
        children: Children,
        *,
        memory_limit: int,
        limits_root: str,
        portable: bool,
    ) -> None:
        self.config = config
        self.paths = paths
        self.memory_limit = memory_limit
        self.limits_root = limits_root
        private_directory(paths.logs)
        self.cpus = platform.available_cpus(root=limits_root)
        self.poller = platform.poller(portable=portable)
        self.handlers: dict[int, Callable[[int], object]] = {}
        self.connections: dict[int, Connection] = {}
        self.links: dict[int, WorkerLink] = {}
        self.resting: list[tuple[int, Callable[[int], object]]] = []
        """Pipes of workers that are not read for a moment."""
        self.forks: deque[int] = deque()
        """Workers to be forked when `fork_at` has come."""
        self.fork_at = 0.0
        self.fork_pace = Backoff()
        self.zygote_at = 0.0
        """When the next zygote is to be started; 0 while one runs."""
        self.zygote_pace = Backoff()
        self.zygote_pace.started(time.monotonic())
        self.numbers = 0
        self.stop_reason = ""
        self.memory = memory
        self.children = children
        self.listener = self._listen()
        incarnation = time.time_ns()
        registration = RegisterNode(
            GCS_PROTOCOL,
            config.node,
            incarnation,
            os.getpid(),
            config.cluster,
            config.resources,
            paths.node_socket,
        )
        self.gcs = GcsClient(registration, patience=float(config.details["head_patience"]))
        self.machine = NodeMachine(config, self.gcs, time.monotonic(), self._reserve if portable else None)
        self.head: Connection | None = None
        self.head_pace = Backoff()
        self.head_pace.started(time.monotonic())
        self.head_at = 0.0
        """When the next head is to be started; 0 while one runs."""
        self.throttled = False
        """Whether drivers are not listened to, because the head does not take what is to be recorded."""
        self.wake_read, self.wake_write = platform.pipe(blocking=False)
        self.disk = Disk(paths.spill, self.memory)
        if config.data:
            self.disk.expire(config.data)
        self.held_back: list[Peer] = []
        self.held_since = 0.0
        self.next_tick = 0.0
        self.next_head = 0.0
        self.next_memory = 0.0
        self.head_gone_since = time.monotonic()
        self.watch(self.listener.fileno(), self._accept)
        self._watch_zygote()
        self.watch(self.disk.wake, self._disk_done)
        self.watch(self.wake_read, self._woken)
        if self.children.head_watch is not None:
            self.watch(self.children.head_watch, self._head_died)

    def stop(self, reason: str) -> None:
        """End soon; for signal handlers, whose interruption a wait in the kernel survives."""
        self.stop_reason = reason
        os.write(self.wake_write, b"x")

    def _woken(self, _mask: int) -> None:
        os.read(self.wake_read, 4096)

    def watch(self, fd: int, handler: Callable[[int], object]) -> None:
        self.handlers[fd] = handler
        self.poller.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            try:
                self.poller.unregister(fd)
            except (OSError, ValueError):
                pass

    # -- the loop

    def run(self) -> None:
        """Until the machine or a signal says stop."""
        machine = self.machine
        handlers = self.handlers
        poll = self.poller.poll
        clock = time.monotonic
        pace = Pace()
        tasks = machine.tasks.tasks
        while not self.stop_reason:
            now = clock()
            events = poll(0) if self.held_back else None
            if self.held_back and (not events or now - self.held_since > HOLD_BACK):
                self._let_go(now)
            if not events:
                until = min(self.next_tick, self._gcs_time(now))
                if self.held_back:
                    until = min(until, self.held_since + HOLD_UNASKED)
                # One thing at a time: spinning takes no CPU away from tasks, and nothing gathers that is cheaper by the batch.
                if len(tasks) < self.cpus:
                    events = spin(pace, poll)
                events = events or poll(max(until - now, 0.0))
                pace.waited(clock() - now)
            for fd, mask in events:
                handler = handlers.get(fd)
                if handler is not None:
                    handler(mask)
            now = clock()
            machine.settle(now)
            self._perform()
            if now >= self.next_tick:
                self.next_tick = now + machine.tick(now)
                if self.zygote_at and now >= self.zygote_at:
                    self._start_zygote(now)
                while self.forks and now >= self.fork_at and not self.zygote_at:
                    self._fork(self.forks.popleft())
                if self.forks or self.zygote_at:
                    self.next_tick = min(self.next_tick, max(self.fork_at, self.zygote_at))
                if self.resting:
                    resting, self.resting = self.resting, []
                    for fd, handler in resting:
                        self.watch(fd, handler)
                self._watch_memory(now)
                machine.settle(now)
                self._perform()
            elif (
                machine.scheduler.ahead
                or machine.tasks.graces
                or machine.looks.open
                or machine.objects.waiting_for_memory
                or machine.scarcity.asked is not None
            ):
                self.next_tick = min(self.next_tick, now + 0.01)
            self._talk_to_head(now)

    def _let_go(self, now: float) -> None:
        """Send what was held back; results that nobody waits for can wait a little longer."""
        held, self.held_back = self.held_back, []
        patient = now - self.held_since < HOLD_UNASKED
        for peer in held:
            if patient and not peer.urgent:
                self.held_back.append(peer)
            else:
                self._send(peer)

    def _send(self, peer: Peer) -> None:
        """Send what the machine has for a peer, and to a worker the tokens for what it may start."""
        out = peer.out
        if not out:
            return
        peer.out = []
        peer.urgent = False
        connection = self.connections.get(peer.number)
        if connection is None or connection.closed:
            return
        if not connection.send(encode_frame(out)):
            peer.unsent = connection.unsent
            self._listen_to(connection, peer.role)
        worker = peer.worker
        if worker is not None and worker.tokens:
            self._grant(worker.number, worker.tokens)

    def _listen_to(self, connection: Connection, role: str) -> None:
        """Have the loop look for what is to be done for this connection."""
        reads = 0 if self.throttled and role == DRIVER else select.POLLIN
        self.poller.modify(connection.sock.fileno(), reads | (select.POLLOUT if connection.unsent else 0))

    def _throttle(self) -> None:
        """Above its bound of unrecorded history the node takes in no more from drivers, until the head has recorded some (protocol section 8)."""
        self.throttled = not self.throttled
        for peer in self.machine.peers.values():
            connection = self.connections.get(peer.number)
            if peer.role == DRIVER and connection is not None and not connection.closed:
                self._listen_to(connection, peer.role)

    def _perform(self) -> None:
        """Send what is to be sent and carry out the effects, until nothing is left.

        What goes to drivers is held back until the loop would block, for `HOLD_BACK` at most: under load results travel in few large frames, else at once.
        """
        machine = self.machine
        while machine.dirty or machine.effects:
            self._change_memory()
            dirty = machine.dirty
            if dirty:
                machine.dirty = []
                for peer in dirty:
                    # With no task left nothing else will come that could go along.
                    if (peer.role == DRIVER and machine.tasks.tasks) or not peer.urgent:
                        if not self.held_back:
                            self.held_since = time.monotonic()
                        self.held_back.append(peer)
                    else:
                        self._send(peer)
            effects = machine.effects
            if effects:
                machine.effects = []
                for effect in effects:
                    self._carry_out(effect)
                machine.settle(time.monotonic())

    def _change_memory(self) -> None:
        """What has to be done before any process hears of what has been decided."""
        first = self.machine.objects.first
        for change in first:
            if isinstance(change, Write):
                self.memory.write_view(change.offset, len(change.data))[:] = change.data
            else:
                self.memory.punch(change.ranges)
        first.clear()

    def _reserve(self, offset: int, size: int) -> str:
        """Take disk space for a block of the arena, where that is a file: a writer that finds none would be ended by SIGBUS. Why it cannot be had, or ""."""
        self._change_memory()
        try:
            self.memory.reserve(offset, size)
        except OSError as error:
            return (
                f"no room for {size / 1e6:.1f} MB in the object store, which is a file in {self.paths.spill} here (portable mode): {error.strerror}. "
                f"{free_space(self.paths.spill)}. Free disk space, drop refs (del), or choose another disk with NBRAY_SPILL_DIR."
            )
        return ""

    def _grant(self, number: int, tokens: bytearray) -> None:
        link = self.links.get(number)
        if link is not None:
            os.write(link.token_write, tokens)
        tokens.clear()

    def _carry_out(self, effect: Any) -> None:
        kind = type(effect)
        if kind is Fork:
            self._fork(effect.worker)
        elif kind is Kill:
            self.children.signal(effect.worker, signal.SIGKILL, group=True)
        elif kind is TakeTokens:
            self._take_tokens(effect.worker)
        elif kind is Signal:
            self._signal(effect)
        elif kind is Look:
            self.children.signal(effect.worker, signal.SIGURG, group=False)
        elif kind is AskLargest:
            self.children.signal(effect.worker, signal.SIGWINCH, group=False)
        elif kind is Spill:
            self.disk.spill(effect.object, effect.offset, effect.size)
        elif kind is Restore:
            self.disk.restore(effect.object, effect.offset, effect.size)
        elif kind is DeleteSpilled:
            self.disk.delete(effect.object)
        elif kind is Save:
            self.disk.save(effect, self.config)
        elif kind is Renew:
            self._renew_zygote()
        elif kind is Close:
            self._drop(effect.peer)
        elif kind is Stop:
            self.stop_reason = effect.reason

    # -- connections

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.unlink(self.paths.node_socket)
        except FileNotFoundError:
            pass
        listener.bind(self.paths.node_socket)
        os.chmod(self.paths.node_socket, 0o600)
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def _accept(self, _mask: int) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("a connection could not be accepted: %s", error)
                return
            credentials = platform.peer_credentials(sock)
            if credentials is not None and credentials[1] != os.getuid():
                log.warning("refused a connection of user %s", credentials[1])
                sock.close()
                continue
            connection = self._admit(sock)
            try:
                # The arena and a life pipe go first; what follows are frames.
                life_read, life_write = os.pipe2(os.O_CLOEXEC)
                self._watch_life(life_read, connection.number)
                socket.send_fds(sock, [b"\0"], [self.memory.fd, life_write])
                os.close(life_write)
            except OSError:
                self._drop(connection.number)  # Who has connected has left again.

    def _admit(self, sock: socket.socket) -> Connection:
        self.numbers += 1
        number = self.numbers
        connection = self.connections[number] = Connection(sock, number, ClientToNode)
        peer = self.machine.connected(number)
        machine = self.machine
        clock = time.monotonic

        def speaks(mask: int) -> None:
            if mask & select.POLLOUT:
                if connection.flush():
                    self._listen_to(connection, peer.role)
                peer.unsent = connection.unsent
            if mask & ~select.POLLOUT:
                try:
                    messages = connection.receive()
                    if messages is not None:
                        if messages:
                            machine.receive(peer, messages, clock())
                        return
                except Exception as error:  # A peer that sends nonsense must not end the node.
                    log.exception("connection %s (pid %s) is closed: %s", number, peer.pid, error)
                self._drop(number)

        self.watch(sock.fileno(), speaks)
        return connection

    def _drop(self, number: int) -> None:
        connection = self.connections.pop(number, None)
        if connection is None:
            return
        self.unwatch(connection.sock.fileno())
        connection.close()
        peer = self.machine.peers.get(number)
        if peer is not None:
            if peer.worker is not None:
                # How it ended is what the zygote reports; one that only closed its connection is of no use any more.
                self.machine.end_worker(peer.worker, "")
            else:
                self.machine.disconnected(peer, time.monotonic())

    # -- workers

    def _fork(self, number: int) -> None:
        now = time.monotonic()
        if now < self.fork_at or self.zygote_at:
            self.forks.append(number)
            self.next_tick = min(self.next_tick, max(self.fork_at, self.zygote_at))
            return
        self.fork_pace.started(now)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        token_read, token_write = platform.pipe(blocking=False)
        interrupt_read, interrupt_write = platform.pipe(blocking=False)
        life_read, life_write = platform.pipe(blocking=True)
        out_read, out_write = platform.pipe(blocking=True)
        err_read, err_write = platform.pipe(blocking=True)
        connection = self._admit(ours)
        self.links[number] = WorkerLink(
            connection.number,
            _reopen(token_read),
            token_write,
            interrupt_write,
            [("stdout", out_read), ("stderr", err_read)],
            self.children.zygote,
        )
        self._watch_life(life_read, connection.number)
        for stream, fd in (("stdout", out_read), ("stderr", err_read)):
            os.set_blocking(fd, False)
            self.watch(fd, partial(self._raw_output, number, RawStream(stream), fd))
        self.children.fork(number, theirs, [token_read, interrupt_read, life_write, out_write, err_write])

    def _watch_life(self, life: int, peer: int) -> None:
        """The pipe ends when no process looks at the memory any more that this peer, or a child that it has forked, was told of."""

        def ended(_mask: int) -> None:
            self.unwatch(life)
            os.close(life)
            self.machine.memory_released(peer, time.monotonic())

        self.watch(life, ended)

    def _raw_output(self, number: int, raw: RawStream, fd: int, _mask: int = 0) -> bool:
        """What a worker writes below Python: by C code, or by the programs it starts. False when there is nothing (more) now."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        link = self.links.get(number)
        if data:
            now = time.monotonic()
            message = self.machine.raw_output(number, raw.name, raw.decode(data), now)
            if message is not None and link is not None:
                if link.log is None:
                    link.log = LogFile(self.paths.logs, f"{link.pid}c")
                link.log.write(message.task, message.name, message.cell, message.stream, message.text)
            while self.machine.complaints:
                log.warning(self.machine.complaints.pop())
            if self.machine.outputs.raw:
                self.next_tick = min(self.next_tick, now + 0.1)
            if not raw.pace.take(now, len(data)) and fd in self.handlers:
                # Whoever writes faster than this waits: other things have to be done, too.
                self.unwatch(fd)
                self.resting.append((fd, partial(self._raw_output, number, raw, fd)))
                self.next_tick = min(self.next_tick, now + RAW_REST)
            return True
        self.unwatch(fd)
        os.close(fd)
        self.resting = [other for other in self.resting if other[0] != fd]
        if link is not None:
            # The number will be that of another file soon.
            link.output = [other for other in link.output if other[1] != fd]
        return False

    def _watch_zygote(self) -> None:
        zygote = self.children.zygote
        self.watch(zygote.fileno(), lambda _: self._zygote_speaks(zygote))

    def _renew_zygote(self) -> None:
        if not self.zygote_at:
            log.warning("packages were installed: workers are forked from a new zygote")
            self.children.renew_zygote()
            self.zygote_pace.started(time.monotonic())
            self._watch_zygote()

    def _start_zygote(self, now: float) -> None:
        self.zygote_at = 0.0
        self.zygote_pace.started(now)
        self.children.start_zygote()
        self._watch_zygote()

    def _zygote_speaks(self, zygote: socket.socket) -> None:
        for kind, number, pid, status in self.children.zygote_messages(zygote):
            link = self.links.get(number)
            if kind == "forked" and link is not None:
                link.pid = pid
            elif kind == "exited" and link is not None:
                self._worker_exited(number, link, how_it_ended(status))
            elif kind == "gone":
                self._zygote_died(zygote)
                return

    def _worker_exited(self, number: int, link: WorkerLink, how: str) -> None:
        """Read what it had said before, then tell the machine."""
        connection = self.connections.pop(link.connection, None)
        peer = self.machine.peers.get(link.connection)
        now = time.monotonic()
        if connection is not None:
            self.unwatch(connection.sock.fileno())
            if peer is not None:
                try:
                    for messages in connection.drain():
                        self.machine.receive(peer, messages, now)
                except Exception as error:  # noqa: BLE001
                    log.warning("the last words of worker %s could not be read: %s", link.pid, error)
            connection.close()
        for stream, fd in list(link.output):
            raw = RawStream(stream)
            while self._raw_output(number, raw, fd):
                pass
        if link.log is not None:
            link.log.close()
        unread = self._read_tokens(link)
        for fd in (link.token_read, link.token_write, link.interrupt):
            os.close(fd)
        del self.links[number]
        if peer is not None and peer.worker is not None:
            self.fork_pace.fine()
        else:
            log.warning("a worker (pid %s) has ended before it said hello: it %s", link.pid, how)
            self.fork_at = self.fork_pace.ended(now)
        self.machine.worker_exited(number, how, unread, now)

    def _zygote_died(self, zygote: socket.socket) -> None:
        self.unwatch(zygote.fileno())
        current = zygote is self.children.zygote
        links = [(number, link) for number, link in self.links.items() if link.zygote is zygote]
        self.children.zygote_ended(zygote, [link.pid for _, link in links if link.pid])
        if current:
            log.warning("the zygote has ended and is started again; its workers are gone")
            now = time.monotonic()
            self.zygote_at = self.zygote_pace.ended(now)
            if self.zygote_at <= now:
                self._start_zygote(now)
            else:
                self.next_tick = min(self.next_tick, self.zygote_at)
        for number, link in links:
            self._worker_exited(number, link, "ended with the zygote that it was forked from")

    def _read_tokens(self, link: WorkerLink) -> list[int]:
        tokens: list[int] = []
        try:
            while data := os.read(link.token_read, 256):
                tokens += data
        except BlockingIOError:
            pass
        return tokens

    def _take_tokens(self, number: int) -> None:
        link = self.links.get(number)
        if link is not None:
            self.machine.tokens_returned(number, self._read_tokens(link), time.monotonic())

    def _signal(self, effect: Signal) -> None:
        link = self.links.get(effect.worker)
        if link is None:
            return
        try:
            os.write(link.interrupt, effect.run.to_bytes(4, "little"))
        except (BlockingIOError, BrokenPipeError):
            return  # It has ended, or has not looked at thousands of interrupts.
        self.children.signal(effect.worker, signal.SIGINT, group=False)

    # -- disk

    def _disk_done(self, _mask: int) -> None:
        objects = self.machine.objects
        for what, object_id, error in self.disk.finished():
            if what == "save":
                self.machine.names.saved(object_id, error)
            elif what == "spill":
                objects.spilled(object_id, error)
            else:
                objects.restored(object_id, error)

    # -- memory

    def _watch_memory(self, now: float) -> None:
        machine = self.machine
        workers = [worker for worker in machine.pool.workers.values() if worker.pending]
        if not workers:
            machine.relief()
            return
        self.next_tick = min(self.next_tick, now + MEMORY_CHECK)
        if now < self.next_memory:
            return
        self.next_memory = now + MEMORY_CHECK
        used, limit = platform.memory_in_use(self.memory_limit or None, self.limits_root)
        if limit and used > MEMORY_LIMIT * limit:
            machine.pressure(used, limit, now, {w.pid: platform.proportional_memory(w.pid) for w in workers})
        else:
            machine.relief()

    # -- the head

    def _gcs_time(self, now: float) -> float:
        due = self.gcs.deadline() or now + 60.0
        if self.head is None:
            due = min(due, self.head_at or self.next_head)
        return max(due, now + 0.001) if self.head is None else due

    def _talk_to_head(self, now: float) -> None:
        # Also without a head: what is to be recorded is packed, and counted.
        messages = self.gcs.output(now)
        if messages:
            self._say(messages)
        if self.head is None:
            if self.head_at:
                if now >= self.head_at:
                    self._start_head(now)
            elif now >= self.next_head:
                self._connect_head(now)
        settled = self.gcs.expire(now)
        if settled:
            self.machine.gcs_settled(settled, now)
            self.machine.settle(now)
            self._perform()
        if self.gcs.full is not self.throttled:
            self._throttle()

    def _say(self, messages: list[Any]) -> None:
        head = self.head
        if head is not None and not head.send(encode_frame(messages)):
            self.poller.modify(head.sock.fileno(), select.POLLIN | select.POLLOUT)

    def _connect_head(self, now: float) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self.paths.head_socket)
        except OSError as error:
            sock.close()
            self.next_head = now + (0.005 if now - self.head_gone_since < 2.0 else 0.1)
            if self.children.head_watch is None and self.children.head_ended():
                self.head_at = self.head_pace.ended(now)
            if error.errno not in {errno.ENOENT, errno.ECONNREFUSED}:
                log.warning("the head cannot be reached: %s", error)
            return
        head = self.head = Connection(sock, 0, HeadToNode)

        def speaks(mask: int) -> None:
            if mask & select.POLLOUT and head.flush():
                self.poller.modify(sock.fileno(), select.POLLIN)
            if mask & ~select.POLLOUT:
                messages = head.receive()
                if messages is None:
                    self._lose_head()
                elif messages:
                    now = time.monotonic()
                    self.machine.gcs_settled(self.gcs.receive(messages), now)
                    if self.gcs.refused:
                        self.stop_reason = f"the head refuses this node: {self.gcs.refused}"

        self.watch(sock.fileno(), speaks)
        self._say(self.gcs.connected())

    def _lose_head(self) -> None:
        if self.head is not None:
            self.unwatch(self.head.sock.fileno())
            self.head.close()
            self.head = None
            self.gcs.disconnected()
        self.head_gone_since = time.monotonic()
        self.next_head = 0.0

    def _head_died(self, _mask: int) -> None:
        watch = self.children.head_watch
        if watch is None or not self.children.head_ended():
            return
        self.unwatch(watch)
        self._lose_head()
        self.head_at = self.head_pace.ended(time.monotonic())

    def _start_head(self, now: float) -> None:
        log.warning("the head has ended and is started again")
        self.head_at = 0.0
        self.head_pace.started(now)
        self.children.start_head()
        if self.children.head_watch is not None:
            self.watch(self.children.head_watch, self._head_died)

    # -- the end

    def close(self) -> None:
        """End everything that this node started and remove its files."""
        if self.stop_reason:
            self.machine.stop(self.stop_reason)
        for peer in (*self.held_back, *self.machine.dirty):
            self._send(peer)
        if self.head is not None:
            self.head.sock.setblocking(True)
            self.head.sock.settimeout(1.0)
            try:
                self.head.flush()
                self.head.sock.sendall(encode_frame(self.gcs.stop(time.monotonic(), self.stop_reason)))
            except OSError:
                pass
        self._say_farewell()
        self.children.close(workers=any(link.pid for link in self.links.values()))
        self.listener.close()
        self.disk.close()
        self.memory.close()
        self.paths.remove()
        for connection in self.connections.values():
            connection.close()

    def _say_farewell(self) -> None:
        """Drivers learn why the cluster ends, if they listen."""
        deadline = time.monotonic() + FAREWELL
        for peer in self.machine.peers.values():
            connection = self.connections.get(peer.number)
            if connection is None or peer.worker is not None:
                continue
            poll = select.poll()
            poll.register(connection.sock, select.POLLOUT)
            while not connection.flush() and (left := deadline - time.monotonic()) > 0:
                poll.poll(left * 1000)


def _reopen(pipe: int) -> int:
    """The same read end under a descriptor of its own: the worker's copy of the other is closed, this one stays."""
    return os.dup(pipe)


def free_space(directory: str) -> str:
    """Words for what is left on a disk."""
    try:
        disk = os.statvfs(directory)
    except OSError as error:
        return f"It cannot be looked at: {error.strerror}"
    return f"It has {disk.f_bavail * disk.f_frsize / 1e6:.1f} MB free"


def how_it_ended(status: int) -> str:
    """Words for a wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "unknown"
        hint = " (perhaps by the system, because memory ran out)" if number == signal.SIGKILL else ""
        return f"was ended by signal {number}, {name}{hint}"
    return f"left with exit status {os.WEXITSTATUS(status)}"


def serve(
    told: dict[str, Any],
    paths: Paths,
    memory: SharedMemory,
    children: Children,
    packages: list[str],
    installed: int,
) -> None:
    """Be the node that the driver has ``told`` of, until it ends. ``packages``: where its own packages are; ``installed``: when the last was."""
    ready = int(told["ready_fd"])
    logging.basicConfig(
        filename=told["log"], level=told["log_level"], format="%(asctime)s %(name)s %(levelname)s %(message)s"
    )
    config = NodeConfig(
        node=told["node"],
        name=told["name"],
        cluster=bytes.fromhex(told["cluster"]),
        resources=told["resources"],
        store_limit=told["store_limit"],
        span=told["span"],
        details=told["details"]
        | {
            "packages": os.pathsep.join(packages),
            "logs": paths.logs,
            "head_patience": str(told["head_patience"]),
        },
        ttl=told["ttl"],
        pid=os.getpid(),
        socket=paths.node_socket,
        log=told["log"],
        spares=told["spares"],
        store_patience=told["store_patience"],
        data=told["data"],
        installed=installed,
    )
    server = NodeServer(
        config,
        paths,
        memory,
        children,
        memory_limit=told["memory_limit"],
        limits_root=told["limits_root"],
        portable=told["portable"],
    )

    def terminate(_number: int, _frame: Any) -> None:
        server.stop("it was told to by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    # What lives long here are tasks and objects, which make no circles: a pass over a million of them would stop the node for half a second.
    gc.freeze()
    gc.set_threshold(20_000, 50, 1_000)
    platform.set_process_title("nbray node")
    paths.announce(told, os.getpid())
    os.write(ready, b"1")
    os.close(ready)
    try:
        server.run()
    except BaseException:
        log.exception("the node ends because of an error of its own")
        paths.keep_log()
        raise
    finally:
        log.info("the node ends: %s", server.stop_reason)
        server.close()
