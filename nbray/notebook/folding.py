"""What a notebook shows of what its tasks print: decided here, without clock or I/O.

A kernel sends at most about 1 MB and 300 messages per second, of which no cell gets more than 20 stream messages: beyond that the server drops
messages and the browser stops. A cell whose tasks print more than its allowance is *folded*: a line that counts stands for what is left out, and
each task's last lines follow when it ends or falls silent. Everything is in the log files (``nbray.logs``); nothing of it depends on what is shown.

The shell (``nbray.notebook.output``) calls `Outlet.text` and the like with what comes, then `Outlet.take`, and sends what that returns; `Outlet.due`
says when to call `take` again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbray.flow import Bucket

KERNEL_BYTES = (550_000.0, 400_000.0)
"""Rate per second and burst of a kernel, in bytes: their sum is what goes out within any second."""

KERNEL_MESSAGES = (150.0, 120.0)
CELL_STREAMS = (15.0, 5.0)
CELL_LINES = (100.0, 1000.0)
"""Lines of a cell that are shown as they come; 100 per second may go on for hours."""

CELL_BYTES = (50_000.0, 200_000.0)
TAIL_LINES = 5
TAIL_WIDTH = 500
FULL_TAILS = 40
"""Tasks of a fold that get `TAIL_LINES`; the next ones get one line."""

TAILS = 1000
"""Tasks of a fold that get a last line at all."""

QUIET = 0.5
"""Seconds after which a folded task that says nothing more gets its last lines."""

UPDATES = 0.4
"""Seconds between two versions of a line that counts, or of progress bars."""

MESSAGE = 64_000
"""Most characters of a text in one message, about."""

OVERHEAD = 1000
"""Bytes of a message besides its content."""

LEAST = 4096
"""Bytes that a longer text waits for, instead of going in smaller pieces."""

DISPLAYS = 200
"""Displays of a cell that wait; of more the oldest are left out."""

FOLDS = 20
"""Counting lines of a cell; then the last one goes on counting."""

BARS = 20
"""Tasks whose progress bars are shown."""


@dataclass(slots=True)
class Send:
    """A message for the front end: ``kind`` is its type, ``content`` what it says."""

    cell: str
    kind: str
    content: dict[str, Any]


@dataclass(slots=True)
class _Text:
    source: bytes
    mark: str
    channel: str
    text: str


@dataclass(slots=True)
class _Shown:
    """A display, an update or a ``clear_output``. ``size``: about how many bytes."""

    kind: str
    content: dict[str, Any]
    size: int

    @property
    def id(self) -> str:
        return str(self.content.get("transient", {}).get("display_id", ""))


class _Fold:
    """The end of what a folded task has written. ``lines``: (channel, text) of whole lines and of one that goes on, the last ones."""

    __slots__ = ("last", "lines", "mark")

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.lines: deque[tuple[str, str]] = deque()
        self.last = 0.0

    def add(self, channel: str, text: str) -> int:
        """Take more; how many lines that leaves out."""
        left_out = 0
        cut = len(text)
        for _ in range(TAIL_LINES + 1):
            cut = text.rfind("\n", 0, cut)
            if cut < 0:
                break
        if cut > 0:
            left_out = text.count("\n", 0, cut + 1)
            if self.lines and not self.lines[-1][1].endswith("\n"):
                self.lines.pop()
            text = text[cut + 1 :]
        for line in _whole_lines(text):
            if self.lines and not self.lines[-1][1].endswith("\n") and self.lines[-1][0] == channel:
                line = self.lines.pop()[1] + line
            if "\r" in line:
                line = overwritten(line)
            if len(line) > 2 * TAIL_WIDTH:
                line = line[:TAIL_WIDTH] + " ... " + line[-TAIL_WIDTH:]
            self.lines.append((channel, line))
            if len(self.lines) > TAIL_LINES:
                left_out += 1
                self.lines.popleft()
        return left_out

    @property
    def latest(self) -> str:
        return self.mark + self.lines[-1][1].rstrip("\n") if self.lines else ""


@dataclass(slots=True)
class _Bar:
    """A line that a task writes over and over."""

    mark: str
    text: str
    active: bool = True


@dataclass
class _Cell:
    title: str
    held: bool = False
    queue: deque[_Text | _Shown] = field(default_factory=deque)
    line_budget: Bucket = field(default_factory=lambda: Bucket(*CELL_LINES))
    text_budget: Bucket = field(default_factory=lambda: Bucket(*CELL_BYTES))
    stream_budget: Bucket = field(default_factory=lambda: Bucket(*CELL_STREAMS))
    folds: dict[bytes, _Fold] = field(default_factory=dict)
    open: dict[str, bytes] = field(default_factory=dict)
    """Channel -> the task whose line there has not ended."""
    folded: int = 0
    folded_tasks: set[bytes] = field(default_factory=set)
    more_tasks: int = 0
    tails: int = 0
    fold_number: int = 0
    fold_shown: bool = False
    fold_changed: bool = False
    fold_sent: float = -1.0
    displays: int = 0
    left_out: int = 0
    bars: dict[bytes, _Bar] = field(default_factory=dict)
    bars_number: int = 0
    bars_shown: bool = False
    bars_changed: bool = False
    bars_sent: float = -1.0


class Outlet:
    """All cells of one kernel. ``plain``: nothing is shown that is replaced later, for notebooks whose output must not depend on time."""

    def __init__(self, *, plain: bool = False) -> None:
        self.plain = plain
        self.bytes = Bucket(*KERNEL_BYTES)
        self.messages = Bucket(*KERNEL_MESSAGES)
        self.cells: dict[str, _Cell] = {}
        self.active: OrderedDict[str, None] = OrderedDict()
        """Cells of which something waits; who was served comes last."""

    def cell(self, label: str, title: str) -> None:
        """A cell begins."""
        self.cells.setdefault(label, _Cell(title))

    def forget(self, label: str) -> None:
        """Nothing will be shown in it any more."""
        self.cells.pop(label, None)
        self.active.pop(label, None)

    def hold(self, label: str, on: bool) -> None:
        """Whether what comes for a cell is to wait."""
        cell = self.cells.get(label)
        if cell is not None:
            cell.held = on

    # -- what comes

    def text(
        self, now: float, label: str, source: bytes, mark: str, channel: str, text: str, *,
        skipped: int = 0, tasks: int = 0, end: bool = False,
    ) -> None:  # fmt: skip
        """A task has written something. ``mark``: what stands before its lines; ``channel``: stdout or stderr. The rest as in `Output`."""
        cell = self.cells[label]
        self.active[label] = None
        fold = cell.folds.get(source)
        if fold is None and not skipped and not tasks:
            if not text:
                return
            if mark:
                text = self._bar(cell, source, mark, text)
                if not text:
                    return
            fits = self._fitting(now, cell, text)
            if fits:
                self._append(cell, _Text(source, mark, channel, text[:fits]))
                text = text[fits:]
            if not text:
                return
        if fold is None:
            fold = cell.folds[source] = _Fold(mark)
        fold.last = now
        left_out = skipped + fold.add(channel, text)
        cell.more_tasks += tasks
        if left_out or tasks:
            cell.folded += left_out
            cell.folded_tasks.add(source)
            self._fold_changed(cell)
        if end or cell.line_budget.refill(now) >= CELL_LINES[1] / 2:
            self._unfold(cell, source)

    def plain_text(self, label: str, text: str) -> None:
        """Text that somebody has asked for: shown as a whole."""
        self.active[label] = None
        self._append(self.cells[label], _Text(b"", "", "stdout", text))

    def _fitting(self, now: float, cell: _Cell, text: str) -> int:
        """How much of a text the cell's allowance has room for: all, or whole lines."""
        lines, room = text.count("\n") or 1, int(cell.line_budget.refill(now))
        characters = int(cell.text_budget.refill(now))
        fits = len(text)
        if lines > room or fits > characters:
            fits = 0
            for _ in range(min(lines, room)):
                end = text.find("\n", fits) + 1
                if not 0 < end <= characters:
                    break
                fits = end
            lines = text.count("\n", 0, fits)
        cell.line_budget.take(now, lines)
        cell.text_budget.take(now, fits)
        return fits

    def _bar(self, cell: _Cell, source: bytes, mark: str, text: str) -> str:
        """Lines that are written over go to the cell's progress bars; the rest of the text."""
        bar = cell.bars.get(source)
        active = bar is not None and bar.active
        if "\r" not in text and not active:
            return text
        rest: list[str] = []
        for line in _whole_lines(text):
            if active and bar is not None:
                bar.text = overwritten(bar.text + line.rstrip("\n"))
            elif "\r" in line:
                bar = cell.bars[source] = _Bar(mark, overwritten(line.rstrip("\n")))
                active = True
            else:
                rest.append(line)
                continue
            if line.endswith("\n"):
                bar.active = active = False
            cell.bars_changed = True
        if cell.bars_changed and not cell.bars_shown and not self.plain:
            cell.bars_number += 1
            cell.bars_shown = True
            cell.bars_sent = -1.0
            self._append(cell, self._panel(cell, "bars", "display_data"))
        return "".join(rest)

    def _fold_changed(self, cell: _Cell) -> None:
        cell.fold_changed = True
        if not cell.fold_shown and not self.plain:
            cell.fold_shown = True
            if cell.fold_number < FOLDS:
                cell.fold_number += 1
                self._append(cell, self._panel(cell, "fold", "display_data"))

    def display(
        self, now: float, label: str, source: bytes, kind: str, content: dict[str, Any], size: int
    ) -> None:
        """A task shows something; ``kind``: display_data, update_display_data or clear_output."""
        cell = self.cells[label]
        self.active[label] = None
        if source in cell.folds:
            self._unfold(cell, source)
        shown = _Shown(kind, content, size)
        if kind == "clear_output":
            cell.queue.clear()
            cell.folds.clear()
            cell.open.clear()
            cell.bars.clear()
            cell.displays = 0
            self._end_fold(cell)
            cell.bars_shown = cell.bars_changed = False
        elif kind == "update_display_data":
            for other in reversed(cell.queue):
                if isinstance(other, _Shown) and other.id == shown.id and other.kind != "clear_output":
                    other.content, other.size = {**shown.content}, size
                    return
        self._append(cell, shown)
        cell.displays += 1
        if cell.displays > DISPLAYS:
            first = next(item for item in cell.queue if isinstance(item, _Shown))
            cell.queue.remove(first)
            cell.displays -= 1
            cell.left_out += 1

    def _append(self, cell: _Cell, item: _Text | _Shown) -> None:
        last = cell.queue[-1] if cell.queue else None
        if (
            isinstance(item, _Text)
            and isinstance(last, _Text)
            and last.source == item.source
            and last.channel == item.channel
        ):
            last.text += item.text
            return
        cell.queue.append(item)

    def _unfold(self, cell: _Cell, source: bytes) -> None:
        """The last lines of a folded task are shown."""
        fold = cell.folds.pop(source)
        lines = list(fold.lines)
        if source in cell.folded_tasks:
            wanted = TAIL_LINES if cell.tails < FULL_TAILS else 1 if cell.tails < TAILS else 0
            cell.tails += 1
            if len(lines) > wanted:
                cell.folded += sum(line.endswith("\n") for _, line in lines[: len(lines) - wanted])
                lines = lines[len(lines) - wanted :]
                self._fold_changed(cell)
        for channel, line in lines:
            self._append(cell, _Text(source, fold.mark, channel, line))

    # -- what goes

    def take(
        self, now: float, label: str = "", *, final: bool = False, unbounded: bool = False
    ) -> list[Send]:
        """What to send now: of all cells, or of one. ``final``: its last lines too; ``unbounded``: at once, whatever the bounds say."""
        found: list[Send] = []
        for each in [label] if label else list(self.active):
            cell = self.cells.get(each)
            if cell is None or (cell.held and not final):
                continue
            for source in [s for s, fold in cell.folds.items() if final or now - fold.last >= QUIET]:
                self._unfold(cell, source)
            before = len(found)
            if cell.queue:
                self._send_queue(now, each, cell, found, unbounded, final)
            self._send_panels(now, each, cell, found, final, unbounded)
            if self._due(now, cell) is None:
                self.active.pop(each, None)
            elif len(found) > before:
                self.active.move_to_end(each)
        return found

    def _send_queue(
        self, now: float, label: str, cell: _Cell, found: list[Send], unbounded: bool, final: bool
    ) -> None:
        message: Send | None = None
        while cell.queue:
            item = cell.queue[0]
            if isinstance(item, _Shown):
                if not (unbounded or self._allowed(now, item.size)):
                    return
                cell.queue.popleft()
                message = None
                found.append(Send(label, item.kind, self._content(now, cell, item)))
                continue
            if message is not None and (
                message.content["name"] != item.channel or len(message.content["text"]) > MESSAGE
            ):
                message = None
            text = self._piece(now, cell, item, fresh=message is None, unbounded=unbounded, final=final)
            if not text:
                return
            rendered = self._rendered(cell, item, text)
            if message is None:
                message = Send(label, "stream", {"name": item.channel, "text": rendered})
                found.append(message)
            else:
                message.content["text"] += rendered
            if len(text) == len(item.text):
                cell.queue.popleft()
            else:
                item.text = item.text[len(text) :]

    def _piece(
        self, now: float, cell: _Cell, item: _Text, *, fresh: bool, unbounded: bool, final: bool
    ) -> str:
        """As much of a text as may be sent now; ``fresh``: as a message of its own."""
        text = item.text
        if len(text) > MESSAGE:
            text = text[: text.rfind("\n", 0, MESSAGE) + 1 or MESSAGE]
        if unbounded:
            return text
        if fresh and not final and cell.stream_budget.refill(now) < 1:
            return ""
        room = int(self.bytes.refill(now)) - OVERHEAD
        size = len(text.encode("utf-8", "replace")) + text.count("\n") * (len(item.mark) + 1) + len(item.mark)
        if size > room > LEAST:
            text = text[: max(1, len(text) * room // (2 * size))]
            text = text[: text.rfind("\n") + 1 or len(text)]
            size = room
        if fresh:
            if not self._allowed(now, size):
                return ""
            cell.stream_budget.level -= 1
        elif not self.bytes.take(now, size):
            return ""
        return text

    def _content(self, now: float, cell: _Cell, item: _Shown) -> dict[str, Any]:
        panel = item.content.get("panel")
        if not panel:
            cell.displays = max(0, cell.displays - 1)
            return item.content
        if panel == "fold":
            cell.fold_sent, cell.fold_changed = now, False
        else:
            cell.bars_sent, cell.bars_changed = now, False
        return self._panel_content(cell, panel)

    def _allowed(self, now: float, size: int) -> bool:
        if self.messages.refill(now) < 1 or not self.bytes.take(now, size + OVERHEAD):
            return False
        return self.messages.take(now, 1)

    def _rendered(self, cell: _Cell, item: _Text, text: str) -> str:
        """The text with the task before each line; what another task left of a line is ended first."""
        goes_on = cell.open.get(item.channel)
        start = "\n" if goes_on is not None and goes_on != item.source else ""
        if text.endswith("\n"):
            cell.open.pop(item.channel, None)
        else:
            cell.open[item.channel] = item.source
        if "\r" in text:
            text = _shortened(text)
        if not item.mark:
            return start + text
        lines = _whole_lines(text)
        if goes_on == item.source:
            return lines[0] + "".join(item.mark + line for line in lines[1:])
        return start + "".join(item.mark + line for line in lines)

    def _send_panels(
        self, now: float, label: str, cell: _Cell, found: list[Send], final: bool, unbounded: bool
    ) -> None:
        """The line that counts and the progress bars, if they have changed."""
        if self.plain:
            if final:
                self._plain_panels(label, cell, found)
            return
        ended = not cell.folds
        if cell.fold_shown and cell.fold_sent >= 0:
            due = final or ended or now - cell.fold_sent >= UPDATES
            if cell.fold_changed and due and (unbounded or self._allowed(now, 600)):
                found.append(Send(label, "update_display_data", self._panel_content(cell, "fold")))
                cell.fold_sent, cell.fold_changed = now, False
            if ended and not cell.fold_changed:
                self._end_fold(cell)
        if cell.bars_shown and cell.bars_sent >= 0 and cell.bars_changed:
            if (final or now - cell.bars_sent >= UPDATES) and (unbounded or self._allowed(now, 2000)):
                found.append(Send(label, "update_display_data", self._panel_content(cell, "bars")))
                cell.bars_sent, cell.bars_changed = now, False
        if cell.bars_shown and not cell.bars_changed and not any(bar.active for bar in cell.bars.values()):
            cell.bars.clear()
            cell.bars_shown = False

    def _end_fold(self, cell: _Cell) -> None:
        """What is folded from now on is counted in another place."""
        cell.fold_shown = cell.fold_changed = False
        cell.fold_sent = -1.0
        cell.tails = 0
        if cell.fold_number >= FOLDS:
            cell.fold_sent = 0.0
            return
        cell.folded = cell.more_tasks = 0
        cell.folded_tasks.clear()

    def _plain_panels(self, label: str, cell: _Cell, found: list[Send]) -> None:
        text = ""
        if cell.bars:
            text += "".join(f"{bar.mark}{bar.text}\n" for bar in cell.bars.values())
            cell.bars.clear()
        if cell.fold_changed:
            text += self.fold_text(cell) + "\n"
            self._end_fold(cell)
            cell.folded = 0
        if text:
            found.append(Send(label, "stream", {"name": "stdout", "text": text}))

    def _panel(self, cell: _Cell, panel: str, kind: str) -> _Shown:
        return _Shown(kind, {"panel": panel}, 600)

    def _panel_content(self, cell: _Cell, panel: str) -> dict[str, Any]:
        if panel == "fold":
            text = self.fold_text(cell)
            latest = [fold.latest for fold in list(cell.folds.values())[-3:]]
            text += "".join(f"\n  {line[:200]}" for line in latest if line)
            number = cell.fold_number
        else:
            bars = list(cell.bars.values())
            text = "\n".join(f"{bar.mark}{bar.text}" for bar in bars[:BARS])
            if len(bars) > BARS:
                text += f"\n... and {len(bars) - BARS} more"
            number = cell.bars_number
        return {
            "data": {"text/plain": text},
            "metadata": {},
            "transient": {"display_id": f"nbray-{panel}-{number}-{_tag(cell)}"},
        }

    @staticmethod
    def fold_text(cell: _Cell) -> str:
        """``... 84,213 lines of 4 tasks folded, %cluster logs In[7] shows all``"""
        tasks = len(cell.folded_tasks) + cell.more_tasks
        lines = "1 line" if cell.folded == 1 else f"{cell.folded:,} lines"
        of = "" if tasks <= 1 else f" of {tasks:,} tasks"
        text = f"... {lines}{of} folded, %cluster logs {cell.title} shows all"
        return text if not cell.left_out else f"{text}; {cell.left_out:,} displays left out"

    def due(self, now: float) -> float | None:
        """Seconds until `take` may have something, None while nothing waits."""
        due: float | None = None
        for label in self.active:
            cell = self.cells[label]
            each = None if cell.held else self._due(now, cell)
            if each is not None and (due is None or each < due):
                due = each
        return due

    def _due(self, now: float, cell: _Cell) -> float | None:
        waits: list[float] = []
        if cell.queue:
            first = cell.queue[0]
            size = first.size if isinstance(first, _Shown) else min(2 * len(first.text), LEAST)
            wait = max(self.bytes.wait(now, size + OVERHEAD + 1), self.messages.wait(now, 1))
            if isinstance(first, _Text):
                wait = max(wait, cell.stream_budget.wait(now, 1))
            waits.append(wait)
        waits += [max(0.0, fold.last + QUIET - now) for fold in cell.folds.values()]
        if not self.plain:
            if cell.fold_shown and cell.fold_changed and cell.fold_sent >= 0:
                waits.append(max(0.0, cell.fold_sent + UPDATES - now) if cell.folds else 0.0)
            if cell.bars_shown and cell.bars_changed and cell.bars_sent >= 0:
                waits.append(max(0.0, cell.bars_sent + UPDATES - now))
        return max(min(waits), 0.005) if waits else None

    def waiting(self, label: str) -> bool:
        """Whether something of a cell has not been sent."""
        cell = self.cells.get(label)
        return cell is not None and bool(cell.queue or cell.folds or cell.bars_changed or cell.fold_changed)


def _tag(cell: _Cell) -> str:
    return f"{id(cell):x}"


def overwritten(line: str) -> str:
    """What is seen of a line that goes back to its start."""
    end = "\n" if line.endswith("\n") else ""
    shown = ""
    for part in line.rstrip("\r\n").split("\r"):
        shown = part + shown[len(part) :] if part else shown
    return shown + end


def _whole_lines(text: str) -> list[str]:
    """Lines with their ends; other characters that end lines in Python do not."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _shortened(text: str) -> str:
    """Without what is written over within this text; a start of line at its beginning or end stays."""
    found = []
    for line in _whole_lines(text):
        parts = line.split("\r")
        if len(parts) > 2:
            # The first goes on with what stands there; the last one may be empty: the next text starts over.
            last = parts[-1] if parts[-1].strip("\n") else parts[-2] + "\r" + parts[-1]
            line = ("\r" if line.startswith("\r") else parts[0] + "\r") + last
        found.append(line)
    return "".join(found)


def size_of(data: Mapping[str, Any]) -> int:
    """About how many bytes a bundle of representations has."""
    return sum(len(value) if isinstance(value, str) else 1000 for value in data.values()) + 300
