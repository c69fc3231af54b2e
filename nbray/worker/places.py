"""Where the user's code is, asked from outside while it runs: a signal wakes the thread beside it, which looks at the stacks and tells the node.

The signal is SIGURG: a process that does not expect it ignores it, and hardly any program uses it. Its number arrives through the wake-up descriptor,
which the interpreter writes even while the main thread is inside a call into C.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the functions behind ``signal``: those make enums, which costs each worker memory pages
import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from nbray.api.reports import OWN_FRAMES
from nbray.messages import Places

if TYPE_CHECKING:
    from nbray.transport.link import Link
    from nbray.worker.executor import Executor

LOOK = int(signal.SIGURG)
FRAMES = 30
"""Innermost frames that are told of."""


def _ignored(_number: int, _frame: FrameType | None) -> None:
    """The signal has done what it is for when its number is in the wake-up descriptor."""


def answer_looks(executor: Executor, link: Link) -> None:
    """From now on the signal is answered. Called in the main thread."""

    def look() -> None:
        link.out.append(Places(places(executor)))

    link.on_wake[LOOK] = look
    _signal.signal(LOOK, _ignored)
    # A system call of the user's goes on as if nothing had been.
    signal.siginterrupt(LOOK, False)
    signal.set_wakeup_fd(link.wake_descriptor, warn_on_full_buffer=False)


def places(executor: Executor) -> list[tuple[bytes, list[tuple[str, int, str]]]]:
    """Per task that runs in this process, its frames: file, line, function, the innermost last."""
    stacks = sys._current_frames()
    found = []
    running = executor.engine.running
    if running is not None:
        found.append((running.task, _users(_stack(stacks.get(running.thread)))))
    for task, (known, coroutine) in list(executor.running.items()):
        frames = _awaiting(coroutine) if coroutine is not None else _stack(stacks.get(known.thread))
        found.append((task, _users(frames)))
    return found


def _stack(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    found = []
    while frame is not None:
        found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]


def _awaiting(task: asyncio.Task[Any]) -> list[tuple[CodeType, int]]:
    """The frames of a coroutine and of what it awaits."""
    found: list[tuple[CodeType, int]] = []
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "ag_frame", None)
        if frame is not None:
            found.append((frame.f_code, frame.f_lineno))
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "ag_await", None)
    return found


def _users(frames: Iterable[tuple[CodeType, int]]) -> list[tuple[str, int, str]]:
    """Without the frames of nbray: what called the user's code, and what it called of ours."""
    kept = [
        (code.co_filename, line, code.co_name)
        for code, line in frames
        if not os.path.abspath(code.co_filename).startswith(OWN_FRAMES) and code.co_filename[:1] != "<"
    ]
    return kept[-FRAMES:]
