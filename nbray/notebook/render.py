"""Tracebacks of cells that ran elsewhere, as IPython prints those that ran here: the notebook's own cells and lines."""

from __future__ import annotations

import linecache
import os
import re
from collections.abc import Callable

from nbray.api.reports import FRAMES, Frame, Report

CONTEXT = 2
"""Lines shown before and after the one that raised."""

WIDTH = 75


class Style:
    """Colours of a traceback; all empty for plain text."""

    def __init__(self, coloured: bool) -> None:
        self.error = "\x1b[31m" if coloured else ""
        self.place = "\x1b[32m" if coloured else ""
        self.arrow = "\x1b[1;32m" if coloured else ""
        self.dim = "\x1b[2m" if coloured else ""
        self.end = "\x1b[0m" if coloured else ""


Namer = Callable[[str], str | None]
"""What the notebook calls a file: ``Cell In[7]`` for code of a cell, None for other files."""


def traceback_lines(report: Report, name: Namer, where: str = "", style: Style | None = None) -> list[str]:
    """The lines of a traceback: frames, then the exception, then ``where`` it ran."""
    style = style or Style(False)
    lines = _report(report, name, style)
    if where:
        lines.append(f"{style.dim}{where}{style.end}")
    return lines


def _report(report: Report, name: Namer, style: Style) -> list[str]:
    lines = [*_report(report.before, name, style), "", report.link, ""] if report.before else []
    head = "Traceback (most recent call last)"
    lines.append(f"{style.error}{'-' * WIDTH}{style.end}")
    lines.append(
        f"{style.error}{report.kind}{style.end}{head:>{max(len(head) + 1, WIDTH - len(report.kind))}}"
    )
    lines += _frames(report, name, style)
    inner = report.inner
    while inner is not None:
        lines += [f"{style.dim}in {report.where}:{style.end}", *_frames(inner, name, style)]
        report, inner = inner, inner.inner
    first, *rest = report.lines or [report.kind]
    kind, separator, message = first.partition(":")
    lines += [f"{style.error}{kind}{style.end}{separator}{message}", *rest]
    for number, inner in enumerate(report.group, start=1):
        lines.append(f"  +-- {number} " + "-" * 40)
        lines += [f"  | {line}" for line in _report(inner, name, style)]
    return lines


def _frames(report: Report, name: Namer, style: Style) -> list[str]:
    """The frames; of a deep recursion its ends."""
    lines = []
    for number, frame in enumerate(report.frames):
        if report.left_out and number == FRAMES:
            lines += [f"... {report.left_out} frames left out ...", ""]
        lines += _frame(frame, name, style)
    return lines


def _frame(frame: Frame, name: Namer, style: Style) -> list[str]:
    cell = name(frame.filename)
    place = cell if cell is not None else f"File {_short(frame.filename)}"
    inside = "" if frame.name == "<module>" else f", in {frame.name}"
    lines = [f"{style.place}{place}{style.end}, line {frame.line}{inside}"]
    if cell is None and _of_library(frame.filename):
        # Its own line says enough; the lines around it are for whoever wrote it.
        text = frame.text or linecache.getline(frame.filename, frame.line).strip()
        return [*lines, f"{style.arrow}----> {frame.line}{style.end} {text}", ""]
    source = linecache.getlines(frame.filename)
    if not source:
        return (
            [*lines, f"{style.arrow}----> {frame.line}{style.end} {frame.text}", ""]
            if frame.text
            else [*lines, ""]
        )
    first, last = max(1, frame.line - CONTEXT), min(len(source), frame.line + CONTEXT)
    for number in range(first, last + 1):
        text = source[number - 1].rstrip("\n")
        if number == frame.line:
            lines.append(f"{style.arrow}{'-' * max(1, 5 - len(str(number)))}> {number}{style.end} {text}")
        else:
            lines.append(f"{number:>7} {text}")
    return [*lines, ""]


_LIBRARIES = re.compile(r".*/(?:site|dist)-packages/|.*/lib/python3\.\d+/(?=\w)")


def _of_library(path: str) -> bool:
    return _LIBRARIES.match(path) is not None


def _short(path: str) -> str:
    found = _LIBRARIES.match(path)
    if found is not None:
        return path[found.end() :]
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if home != "/" and path.startswith(home + os.sep) else path
