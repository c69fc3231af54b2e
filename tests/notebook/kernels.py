"""A real kernel for tests: cells in it, and what they publish."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

from jupyter_client.manager import KernelManager

ANSI = re.compile(r"\x1b\[[0-9;]*m")
LIMIT = 60.0


@dataclass
class Run:
    """What a cell published, and its reply."""

    msg_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    reply: dict[str, Any] = field(default_factory=dict)

    def text(self, name: str = "stdout") -> str:
        """All it printed."""
        return "".join(
            m["content"]["text"]
            for m in self.messages
            if m["msg_type"] == "stream" and m["content"]["name"] == name
        )

    def shown(self) -> list[Mapping[str, Any]]:
        """Bundles it displayed, but for status lines: a slow machine has more of them."""
        return [
            m["content"]["data"]
            for m in self.messages
            if m["msg_type"] == "display_data" and not is_status(m["content"])
        ]

    @property
    def number(self) -> int:
        """Its ``In[n]``."""
        return int(self.reply["execution_count"])

    @property
    def result(self) -> str | None:
        """Text of its last value."""
        found = [
            m["content"]["data"]["text/plain"] for m in self.messages if m["msg_type"] == "execute_result"
        ]
        return found[0] if found else None

    @property
    def error(self) -> str | None:
        """Class of its error; of a usage error too, which IPython only prints."""
        if self.reply.get("status") == "error":
            return str(self.reply["ename"])
        return None

    @property
    def traceback(self) -> str:
        """Its error as shown, without colours."""
        lines = [
            line for m in self.messages if m["msg_type"] == "error" for line in m["content"]["traceback"]
        ]
        return ANSI.sub("", "\n".join(lines))


class Kernel:
    """``with Kernel() as k: k.run("1 + 1").result``"""

    def __init__(self, environment: Mapping[str, str] | None = None, cwd: str | None = None) -> None:
        self._environment = {**os.environ, **(environment or {})}
        self._cwd = cwd
        self.manager = KernelManager(kernel_name="python3")
        self.others: list[dict[str, Any]] = []
        self._killed = False

    def __enter__(self) -> Kernel:
        self.manager.start_kernel(env=self._environment, cwd=self._cwd, extra_arguments=["--log-level=ERROR"])
        self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=LIMIT)

    def stop(self, *, now: bool = False) -> None:
        """End the kernel: cleanly, or (``now``) by SIGKILL."""
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=now or self._killed)

    def restart(self) -> None:
        """As the menu's Restart does."""
        self.client.stop_channels()
        self.manager.restart_kernel(now=False)
        self._connect()

    def interrupt(self) -> None:
        """As the Interrupt button does."""
        self.manager.interrupt_kernel()

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)  # type: ignore[union-attr]

    def kill(self) -> None:
        """A crash."""
        os.kill(self.pid, signal.SIGKILL)
        self._killed = True

    def start(self, code: str) -> Run:
        """Begin a cell."""
        return Run(self.client.execute(code))

    def read(self, runs: list[Run], timeout: float) -> dict[str, Any] | None:
        """The next message, given to the run it belongs to."""
        try:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=timeout)
        except Empty:
            return None
        parent = message["parent_header"].get("msg_id")
        for run in runs:
            if run.msg_id == parent:
                run.messages.append(message)
                return message
        self.others.append(message)
        return message

    def read_until(self, runs: list[Run], done: Callable[[], bool], timeout: float = LIMIT) -> None:
        """Read until ``done``. Raises TimeoutError with what has come."""
        end = time.monotonic() + timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                kinds = [(m["msg_type"], m["content"]) for run in runs for m in run.messages]
                raise TimeoutError(f"not within {timeout:g} s; came: {kinds}")
            self.read(runs, min(left, 0.2))

    def finish(self, run: Run, *others: Run, timeout: float = LIMIT) -> Run:
        """Read until the cell is done."""
        self.read_until([run, *others], lambda: is_idle(run), timeout)
        while True:
            reply = self.client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == run.msg_id:
                run.reply = reply["content"]
                return run

    def run(self, code: str, timeout: float = LIMIT) -> Run:
        """Run a cell to its end."""
        return self.finish(self.start(code), timeout=timeout)


def is_status(content: Mapping[str, Any]) -> bool:
    """Whether a display is a status line."""
    return str(content.get("transient", {}).get("display_id", "")).startswith("nbray-status-")


def is_idle(run: Run) -> bool:
    """Whether the kernel has said that it is done with a cell."""
    return any(m["msg_type"] == "status" and m["content"]["execution_state"] == "idle" for m in run.messages)
