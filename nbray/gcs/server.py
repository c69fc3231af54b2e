"""The head process: a thin shell around the tables of the GCS.

One thread reads messages, steps `Tables` and queues what changed for the writer (``nbray.gcs.storage``); what a node is told
leaves only when all that came before it is on disk. So a head that is killed and started again continues where it was, and nodes send
again what was not acknowledged. Questions about history are answered by a third thread (``nbray.gcs.history``).

Started by a node as ``python -P -m nbray.gcs.server --dir DIR --database FILE``; listens on ``DIR/head.sock``. Ends when told, when
nobody is connected for ``--patience`` seconds, or at end-of-file of ``--life-fd``. Writes its log to stderr.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import sqlite3
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import assert_never

import msgspec

from nbray.events import Page
from nbray.gcs.history import QUESTIONS, Historian
from nbray.gcs.messages import (
    Ack,
    Batch,
    HeadToNode,
    NodeRegistered,
    NodeToHead,
    Op,
    OpReply,
    Query,
    QueryReply,
    RegisterNode,
    Stop,
    TableFilter,
    Trouble,
)
from nbray.gcs.storage import RETRY_SECONDS, Storage, Write, Writer
from nbray.gcs.tables import Tables
from nbray.platform import peer_credentials, set_process_title
from nbray.transport.frames import FrameReader, encode_frame

SOCKET, LOCK = "head.sock", "head.lock"
READ_BYTES = 1 << 18
LAST_WRITES = 5.0
"""Seconds that a head which was told to end goes on trying to write."""

_encode = msgspec.msgpack.Encoder().encode


class _Connection:
    """A node, once it has registered."""

    __slots__ = ("expected", "node", "open", "out", "reader", "registered", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader: FrameReader[NodeToHead] = FrameReader(NodeToHead)
        self.out: deque[memoryview] = deque()
        self.open = True
        self.registered = False
        self.node = RegisterNode(0, "", 0, 0, b"", {})
        self.expected = 0


class _RefusedError(Exception):
    """A peer broke the protocol; its connection ends."""


class Head:
    """The loop. ``directory`` is the working directory; ``lock`` is held as long as the process lives."""

    def __init__(self, database: Path, history_bytes: int, patience: float, life: int | None) -> None:
        self._patience = patience
        self._storage = Storage(database, history_bytes=history_bytes)
        self._tables = Tables(self._storage.rows())
        self._posted: deque[tuple[str, object]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._connections: dict[int, _Connection] = {}
        self._trouble = ""
        self._ending = False
        self._done = False
        self._lonely_since = time.monotonic()
        self._database = database
        for sock in (self._wake_reader, self._wake_writer):
            sock.setblocking(False)
        _unlink(SOCKET)
        self._listener.bind(SOCKET)
        os.chmod(SOCKET, 0o600)
        self._listener.listen()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._life = life
        if life is not None:
            self._selector.register(life, selectors.EVENT_READ)
        self._writer = Writer(self._storage, self._on_written, lambda text: self._post("trouble", text))
        self._historian = Historian(database, self._on_answer)

    def run(self) -> None:
        """Serve until told to end."""
        while not self._done:
            for key, events in self._selector.select(self._timeout()):
                if isinstance(key.data, _Connection):
                    self._serve(key.data, events)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_reader:
                    self._take_posted()
                elif os.read(key.fd, 1) == b"":
                    self._selector.unregister(key.fileobj)
                    self.end("the node has ended")
            if not self._connections and time.monotonic() - self._lonely_since >= self._patience:
                self.end("no node is connected")
        _unlink(SOCKET)
        self._listener.close()
        if not self._writer.end(RETRY_SECONDS if self._trouble else LAST_WRITES):
            _log("ended with unwritten events; they were never acknowledged")
        for connection in list(self._connections.values()):
            self._close(connection, "")
        self._selector.close()

    def interrupt(self, reason: str) -> None:
        """`end`, from a signal handler."""
        self._post("end", reason)

    def end(self, reason: str) -> None:
        """Write all that was sent, then end."""
        if not self._ending:
            self._ending = True
            for connection in list(self._connections.values()):
                while self._read(connection):
                    pass
            _log(f"ending: {reason}")
            if self._trouble:
                self._done = True
            else:
                self._writer.put(Write((), None, None))

    # -- other threads

    def _post(self, what: str, data: object) -> None:
        self._posted.append((what, data))
        with suppress(BlockingIOError):
            self._wake_writer.send(b"\0")

    def _on_written(self, tokens: list[object]) -> None:
        self._post("written", tokens)

    def _on_answer(self, token: object, error: str, data: bytes) -> None:
        self._post("answer", (token, error, data))

    def _take_posted(self) -> None:
        self._wake_reader.recv(4096)
        while self._posted:
            what, data = self._posted.popleft()
            if what == "written":
                assert isinstance(data, list)
                self._release(data)
            elif what == "trouble":
                assert isinstance(data, str)
                self._tell_trouble(data)
            elif what == "end":
                self.end(str(data))
            else:
                assert isinstance(data, tuple)
                (connection, request), error, answer = data
                self._send(connection, [QueryReply(request, error, answer)])

    def _release(self, tokens: list[object]) -> None:
        """All of this is on disk: say so. One acknowledgement per node stands for all its batches."""
        replies: dict[_Connection, list[HeadToNode]] = {}
        for token in tokens:
            if not isinstance(token, tuple):
                self._done = True
                continue
            connection, message = token
            if not connection.open:
                continue
            messages = replies.setdefault(connection, [])
            if type(message) is NodeRegistered:
                connection.registered = True
            if type(message) is Ack and messages and type(messages[-1]) is Ack:
                messages[-1] = message
            else:
                messages.append(message)
        for connection, messages in replies.items():
            self._send(connection, messages)

    def _tell_trouble(self, text: str) -> None:
        if text == self._trouble:
            return
        if text:
            _log(
                f"cannot write, so nothing is acknowledged until it can: {text}; make room on that disk (trying again each second)"
            )
        else:
            _log("can write again")
        self._trouble = text
        for connection in list(self._connections.values()):
            self._send(connection, [Trouble(text)])
        if self._ending:
            self._done = True

    # -- connections

    def _timeout(self) -> float | None:
        if self._connections or self._ending:
            return None
        return max(0.0, self._lonely_since + self._patience - time.monotonic())

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log(f"could not accept a connection: {error}")
            return
        peer = peer_credentials(sock)
        if peer is not None and peer[1] != os.getuid():
            _log(
                f"refused a connection of user {peer[1]}, process {peer[0]}: this cluster belongs to user {os.getuid()}"
            )
            sock.close()
            return
        sock.setblocking(False)
        connection = _Connection(sock)
        self._connections[sock.fileno()] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ:
            self._read(connection)

    def _read(self, connection: _Connection) -> bool:
        """Handle what has come; False if that was nothing."""
        if not connection.open:
            return False
        try:
            data = connection.sock.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._close(connection, str(error))
            return False
        if not data:
            self._close(connection, "")
            return False
        try:
            for message in connection.reader.feed(data):
                self._handle(connection, message)
        except (_RefusedError, ValueError) as error:
            self._close(connection, f"protocol error: {error}")
        return True

    def _send(self, connection: _Connection, messages: Sequence[HeadToNode]) -> None:
        if connection.open:
            connection.out.append(memoryview(encode_frame(messages)))
            self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        out = connection.out
        waiting = selectors.EVENT_READ
        while out:
            try:
                sent = connection.sock.send(out[0])
            except BlockingIOError:
                waiting |= selectors.EVENT_WRITE
                break
            except OSError as error:
                self._close(connection, str(error))
                return
            if sent == len(out[0]):
                out.popleft()
            else:
                out[0] = out[0][sent:]
        if self._selector.get_key(connection.sock).events != waiting:
            self._selector.modify(connection.sock, waiting, connection)

    def _close(self, connection: _Connection, why: str) -> None:
        if not connection.open:
            return
        if why:
            _log(f"closed the connection of node {connection.node.node or 'unknown'}: {why}")
        connection.open = False
        self._selector.unregister(connection.sock)
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        self._lonely_since = time.monotonic()

    # -- messages

    def _handle(self, connection: _Connection, message: NodeToHead) -> None:
        node = connection.node.node
        if not connection.open:
            return
        if type(message) is not RegisterNode and not node:
            raise _RefusedError(f"{type(message).__name__} before RegisterNode")
        match message:
            case Batch():
                self._append(connection, message)
            case Op():
                ok, data, rows = self._tables.operate(node, message)
                self._writer.put(Write(rows, None, (connection, OpReply(message.request, ok, data))))
            case Query():
                self._answer(connection, message)
            case RegisterNode():
                self._register(connection, message)
            case Stop():
                self.end(message.reason or f"told by node {node}")
            case _:
                assert_never(message)

    def _register(self, connection: _Connection, message: RegisterNode) -> None:
        if connection.node.node:
            raise _RefusedError("a second RegisterNode")
        error, rows = self._tables.register(message)
        if error:
            _log(f"refused node {message.node}: {error}")
            self._send(connection, [NodeRegistered(error, 0, os.getpid())])
            return
        for other in list(self._connections.values()):
            if other.node.node == message.node:
                self._close(other, "the node has connected again")
        connection.node = message
        if self._trouble:
            self._send(connection, [Trouble(self._trouble)])
        reply = NodeRegistered("", self._tables.sequence(message.node), os.getpid())
        self._writer.put(Write(rows, None, (connection, reply)))

    def _append(self, connection: _Connection, batch: Batch) -> None:
        node = connection.node
        if batch.incarnation != node.incarnation:
            raise _RefusedError(
                f"a batch of incarnation {batch.incarnation} from incarnation {node.incarnation}"
            )
        if connection.expected and batch.sequence != connection.expected:
            raise _RefusedError(f"batch {batch.sequence} came where {connection.expected} was expected")
        connection.expected = batch.sequence + 1
        row = self._tables.admit(node.node, batch.sequence)
        token = (connection, Ack(batch.sequence))
        if row is None:
            self._writer.put(Write((), None, token))
        else:
            content = (node.node, batch.sequence, batch.count, batch.facts, batch.tasks)
            self._writer.put(Write((row,), content, token))

    def _answer(self, connection: _Connection, query: Query) -> None:
        request, what = query.request, query.what
        if what in QUESTIONS:
            self._historian.ask((connection, request), connection.node.node, what, query.argument)
            return
        if what == "head":
            data = {
                "pid": os.getpid(),
                "database": str(self._database),
                "trouble": self._trouble,
                "cluster": self._tables.cluster,
            }
            self._send(connection, [QueryReply(request, "", _encode(data))])
            return
        try:
            chosen = (
                msgspec.msgpack.decode(query.argument, type=TableFilter) if query.argument else TableFilter()
            )
        except ValueError as error:
            self._send(connection, [QueryReply(request, f"the head could not answer {what!r}: {error}", b"")])
            return
        rows = self._tables.select(what, chosen)
        if rows is None:
            known = ", ".join(
                sorted(QUESTIONS | {"head", "nodes", "jobs", "names", "named_actors", "functions"})
            )
            self._send(
                connection,
                [QueryReply(request, f"the head knows nothing about {what!r}; it knows about: {known}", b"")],
            )
            return
        # Rows may be newer than the disk: nobody may see what a killed head would forget.
        reply = QueryReply(request, "", _encode(Page(rows=rows)))
        self._writer.put(Write((), None, (connection, reply)))


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _log(text: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    # The disk that the log lies on may be the one that is full.
    with suppress(OSError):
        os.write(2, f"{stamp} head {os.getpid()}: {text}\n".encode(errors="replace"))


def _arguments(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="python -m nbray.gcs.server", description="The head process of an nbray cluster."
    )
    parser.add_argument(
        "--dir", type=Path, required=True, help="runtime directory of the cluster, where head.sock is made"
    )
    parser.add_argument("--database", type=Path, required=True, help="the SQLite file, on a local disk")
    parser.add_argument(
        "--history-bytes", type=int, default=1 << 30, help="size at which the oldest events are dropped"
    )
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds without a connected node after which it ends"
    )
    parser.add_argument("--ready-fd", type=int, help="gets one byte when the socket listens")
    parser.add_argument("--life-fd", type=int, help="the head ends at its end-of-file")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a head. Exit status: 0 told to end, 3 another head serves the directory, 4 the database cannot be used."""
    arguments = _arguments(argv)
    set_process_title("nbray head")
    os.umask(0o077)
    with suppress(PermissionError):
        # Refused to a process that leads a group or session already: nobody's interrupt key reaches that either.
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    database = arguments.database.absolute()
    # A socket's path has about 100 bytes at most; a name in the working directory fits always.
    os.chdir(arguments.dir)
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log(f"another head serves {arguments.dir}")
        return 3
    try:
        head = Head(database, arguments.history_bytes, arguments.patience, arguments.life_fd)
    except (sqlite3.Error, ValueError) as error:
        _log(f"cannot use the database {database}: {error}")
        _unlink(LOCK)
        return 4
    signal.signal(signal.SIGTERM, lambda *_: head.interrupt("SIGTERM"))
    if arguments.ready_fd is not None:
        os.write(arguments.ready_fd, b"R")
        os.close(arguments.ready_fd)
    head.run()
    _unlink(LOCK)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
