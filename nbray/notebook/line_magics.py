"""Magics of IPython that work in a cell that runs on the cluster: those that need no more of the notebook than the cell's own names."""

from __future__ import annotations

import ast
import math
import os
import re
import shlex
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any, NoReturn

Magic = Callable[[str, dict[str, Any]], Any]

_ELSEWHERE = {
    "pip": "install it in a cell without %%remote: workers see what is installed there",
    "load_ext": "load extensions in a cell without %%remote",
    "reload_ext": "load extensions in a cell without %%remote",
    "autoreload": "use it in a cell without %%remote: workers take on the modules as the notebook has them",
    "debug": "an error of a remote cell can be debugged in the notebook: %debug in the next cell",
    "pdb": "put --local on the %%remote line to debug the cell",
    "run": "put it into a cell without %%remote, or import what the file defines",
    "store": "what the cell binds comes back: store it in a cell without %%remote",
}
for _same in ("conda", "mamba", "micromamba", "uv"):
    _ELSEWHERE[_same] = _ELSEWHERE["pip"]

_NOTHING_TO_DO = ("matplotlib", "config", "pylab", "xmode", "colors")
"""They say how the notebook shows things, and figures of the cell are shown there as the notebook shows its own."""


def line(name: str, text: str, namespace: dict[str, Any]) -> Any:
    """Run a line magic. Raises RuntimeError for one that works in the notebook only, and says where to put it."""
    if name in _NOTHING_TO_DO:
        return None
    found = _LINE.get(name)
    if found is None:
        _refuse(f"%{name}", name)
    return found(text, namespace)


def cell(name: str, text: str, body: str, namespace: dict[str, Any]) -> Any:
    """Run a cell magic. Raises RuntimeError as `line` does."""
    if name == "time":
        return _time(body, namespace)
    if name == "timeit":
        loops, repeats, setup = _timing(text)
        return _measure(body, setup or "pass", loops, repeats, namespace)
    return _refuse(f"%%{name}", name, "put it above %%remote, as the first line of the cell")


def _refuse(magic: str, name: str, advice: str = "") -> NoReturn:
    advice = (
        _ELSEWHERE.get(name)
        or advice
        or "put it into a cell without %%remote, or write what it does in plain Python"
    )
    raise RuntimeError(
        f"{magic} works on the notebook's own process, and this cell runs on the cluster: {advice}"
    )


def _time(text: str, namespace: dict[str, Any]) -> Any:
    tree = ast.parse(text.strip(), "<timed>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, "<timed>", "exec")
    tail = compile(ast.Expression(last.value), "<timed>", "eval") if isinstance(last, ast.Expr) else None
    began, before = time.perf_counter(), os.times()
    try:
        exec(body, namespace)
        return None if tail is None else eval(tail, namespace)
    finally:
        wall, after = time.perf_counter() - began, os.times()
        user, system = after.user - before.user, after.system - before.system
        _say(f"CPU times: user {duration(user)}, sys: {duration(system)}, total: {duration(user + system)}")
        _say(f"Wall time: {duration(wall)}")


def _timeit(text: str, namespace: dict[str, Any]) -> None:
    loops, repeats, statement = _timing(text)
    _measure(statement, "pass", loops, repeats, namespace)


def _timing(text: str) -> tuple[int, int, str]:
    """Loops (0: as many as make sense) and repetitions of ``-n100 -r 3 statement``, and the statement."""
    given = {"-n": 0, "-r": 7}
    while match := re.match(r"(-[nr])\s*(\d+)\s*", text):
        given[match[1]] = int(match[2])
        text = text[match.end() :]
    return given["-n"], given["-r"], text


def _measure(statement: str, setup: str, loops: int, repeats: int, namespace: dict[str, Any]) -> None:
    timer = timeit.Timer(statement, setup, globals=namespace)
    loops = loops or timer.autorange()[0]
    runs = [seconds / loops for seconds in timer.repeat(repeats, loops)]
    mean, spread = statistics.fmean(runs), statistics.pstdev(runs)
    _say(
        f"{duration(mean)} ± {duration(spread)} per loop (mean ± std. dev. of {len(runs)} run{'s' * (len(runs) != 1)}, "
        f"{loops:,} loop{'s' * (loops != 1)} each)"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def duration(seconds: float) -> str:
    """As IPython writes it: ``1.23 ms``, ``1min 4s``."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}h {minutes}min {rest}s" if hours else f"{minutes}min {rest}s"
    if seconds <= 0:
        return "0 ns"
    order = min(3, max(0, -math.floor(math.floor(math.log10(seconds)) / 3)))
    return f"{seconds * 1000**order:.3g} {('s', 'ms', 'µs', 'ns')[order]}"


def _env(text: str, _namespace: dict[str, Any]) -> Any:
    """As IPython's, but that values stay out of the output; what is set holds for the rest of this cell."""
    text = text.strip()
    if not text:
        return dict(os.environ)
    name, _, value = (part.strip() for part in text.partition("=" if "=" in text else " "))
    if not value:
        return os.environ.get(name)
    os.environ[name] = value
    _say(f"env: {name} is set")
    return None


def _cd(text: str, _namespace: dict[str, Any]) -> None:
    words = [word for word in shlex.split(text) if word != "-q"]
    os.chdir(os.path.expanduser(words[0] if words else "~"))
    if "-q" not in text.split():
        _say(os.getcwd())


def _pwd(_text: str, _namespace: dict[str, Any]) -> str:
    return os.getcwd()


_LINE: dict[str, Magic] = {
    "time": _time,
    "timeit": _timeit,
    "env": _env,
    "set_env": _env,
    "cd": _cd,
    "pwd": _pwd,
}
