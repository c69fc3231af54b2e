"""What a session (one system in a process of its own) tells benchmarks.run: JSON lines on an inherited pipe."""

import json
import os
from typing import Any


class Reporter:
    """The session's end of the pipe. What is begun has to end within the time that run.py allows, or the session is killed."""

    def __init__(self, fd: int) -> None:
        # Started daemons and workers must not hold the pipe.
        os.set_inheritable(fd, False)
        self._fd = fd

    def begin(self, case: str) -> None:
        self._send({"begin": case})

    def figures(self, case: str, figures: dict[str, list[float]]) -> None:
        """The case has ended; `figures` holds the values of its rows, one per window."""
        self._send({"case": case, "figures": figures})

    def unsupported(self, case: str) -> None:
        self._send({"case": case, "unsupported": True})

    def failed(self, case: str, error: str) -> None:
        self._send({"case": case, "error": error})

    def note(self, text: str) -> None:
        self._send({"note": text})

    def done(self) -> None:
        """All cases have been run and the system has been stopped."""
        self._send({"done": True})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]
