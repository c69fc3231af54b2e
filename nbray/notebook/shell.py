"""What a cell finds of IPython when it runs in a worker: ``!commands`` and ``display`` work, the rest says where it works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from nbray.notebook import line_magics
from nbray.worker.display import display

_INTERACTIVE = "a cell that runs on the cluster has no keyboard: put --local on the %%remote line to run the cell in the notebook and use {what}"


class RemoteShell:
    """``get_ipython()`` of a cell in a worker: what IPython makes of ``!command``, ``x = !command`` and ``%magic`` lines ends here."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.user_ns = namespace

    def system(self, command: str) -> None:
        """Run a shell command; its output is the cell's, its exit status ``_exit_code``."""
        text = self.var_expand(command, depth=1)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            text, shell=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    sys.stdout.write(line.decode(errors="replace"))
            except BaseException:
                process.terminate()
                raise
        self.user_ns["_exit_code"] = process.returncode

    system_piped = system_raw = system

    def getoutput(self, command: str, split: bool = True, depth: int = 0) -> Any:
        """The output of a shell command, as lines that know ``.s``, ``.n`` and ``.p`` (``split``), or as text."""
        text = self.var_expand(command, depth=depth + 1)
        done = subprocess.run(
            text,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        self.user_ns["_exit_code"] = done.returncode
        if not split:
            return output
        from IPython.utils.text import SList

        return SList(output.splitlines())

    def var_expand(self, command: str, depth: int = 0) -> str:
        """``{expression}`` and ``$name`` of a command, with the names at the place that calls."""
        if "{" not in command and "$" not in command:
            return command
        from IPython.utils.text import DollarFormatter

        names = {**self.user_ns, **sys._getframe(depth + 1).f_locals}
        try:
            return str(DollarFormatter().vformat(command, args=[], kwargs=names))
        except Exception:  # noqa: BLE001  (as IPython: what cannot be expanded is the shell's)
            return command

    def run_line_magic(self, magic_name: str, line: str, _stack_depth: int = 1) -> Any:
        """Run a line magic. Raises RuntimeError for one that works on the notebook's own shell."""
        text = self.var_expand(line, depth=1) if magic_name in ("env", "set_env", "cd") else line
        return line_magics.line(magic_name, text, self.user_ns)

    def run_cell_magic(self, magic_name: str, line: str, cell: str) -> Any:
        """Run a cell magic. Raises RuntimeError for one that works on the notebook's own shell."""
        return line_magics.cell(magic_name, line, cell, self.user_ns)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"get_ipython().{name} is not available in a cell that runs on the cluster; use it in a cell without %%remote"
        )


def no_input(prompt: object = "") -> NoReturn:
    """Raises RuntimeError: nobody can answer."""
    raise RuntimeError(_INTERACTIVE.format(what="input()"))


def no_breakpoint(*_args: Any, **_options: Any) -> NoReturn:
    """Raises RuntimeError: nobody can type into a debugger."""
    raise RuntimeError(_INTERACTIVE.format(what="breakpoint()"))


def cell_builtins(namespace: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """What IPython adds to the built-in names, and what it replaces."""
    shell = RemoteShell(namespace)
    return {"get_ipython": lambda: shell, "display": display, "input": no_input}
