"""Command lines of the magics and of ``nbray``: errors name what was typed and the nearest thing that exists."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Iterable
from typing import Any, NoReturn

_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmgtKMGT]?)(i?)[bB]?")
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class BadUsageError(Exception):
    """The line cannot be understood; the text is for the person who typed it."""


class Parser(argparse.ArgumentParser):
    """Raises `BadUsageError` instead of ending the process, and suggests the nearest flag."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(prog=prog, description=description, add_help=False, allow_abbrev=False, **options)
        self.kinds: dict[str, str] = {}
        """What the words of an argument are, for completion: its ``dest`` -> a kind of `nbray.notebook.completion`."""

    def read(self, words: list[str]) -> argparse.Namespace:
        """Parse. Raises BadUsageError."""
        known, unknown = self.parse_known_args(words)
        if unknown:
            self.reject(unknown[0])
        return known

    def reject(self, word: str) -> NoReturn:
        """Raises BadUsageError for a word that means nothing here."""
        flag = word.partition("=")[0]
        if flag.startswith("-"):
            raise BadUsageError(
                f"{self.prog} has no flag {flag}{did_you_mean(flag, self.flags())} {self.short_usage()}"
            )
        raise BadUsageError(f"{self.prog}: {word!r} is one word too many. {self.short_usage()}")

    def flags(self) -> list[str]:
        """Every flag this parser knows."""
        return [flag for action in self._actions for flag in action.option_strings]

    def short_usage(self) -> str:
        """The flags in one line."""
        text = " ".join(self.format_usage().split())
        return text[0].upper() + text[1:]

    def error(self, message: str) -> NoReturn:
        """Raises BadUsageError."""
        raise BadUsageError(f"{self.prog}: {message}. {self.short_usage()}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``; did you mean '--cpus'?``, or the list of what there is when nothing looks alike."""
    names = list(words)
    if not names:
        return ""
    near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(
        word, names, n=1, cutoff=0.5
    )
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}."


def split(line: str) -> list[str]:
    """Words of a line. Raises BadUsageError for an open quote."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise BadUsageError(f"cannot read {line!r}: {error}") from None


def size(text: str) -> int:
    """Bytes of ``2GB``, ``500 MiB``, ``1048576``. Raises argparse.ArgumentTypeError. Units are powers of 1024, as memory is made."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for instance 500MB or 2GB")
    return int(float(match[1]) * 1024 ** _UNITS[match[2].lower()])


def amount(text: str) -> float:
    """A number that is not negative. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, 0 or larger")
    return int(value) if value == int(value) else value


def whole(text: str) -> int:
    """A whole number that is not negative. Raises argparse.ArgumentTypeError."""
    if not text.strip().isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, 0 or larger")
    return int(text)


def names(values: list[str] | None) -> list[str] | None:
    """Names given as ``a,b``, ``a, b`` or ``a b``. Raises BadUsageError for what is no name."""
    if values is None:
        return None
    found = [part for value in values for part in re.split(r"[,\s]+", value) if part]
    for name in found:
        if not name.isidentifier():
            raise BadUsageError(f"{name!r} is not a variable's name")
    return found


def human(count: float) -> str:
    """Bytes for people: ``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
