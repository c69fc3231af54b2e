"""Runs nbray and its peers side by side and prints the ratios: `make bench`, or `python -m benchmarks.run --quick`.

Each system runs in processes of its own, one group of cases at a time, the systems in turn and several rounds of it, so that a
machine whose speed drifts treats all alike. A full run writes benchmarks/RESULTS.md and RESULTS.json.
"""

import argparse
import compileall
import difflib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parent.parent) not in sys.path:
    # Run as a file (`python benchmarks/run.py`), only benchmarks/ itself is on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import processes, results, suite
from benchmarks.adapters import ADAPTERS
from benchmarks.results import ROOT, Measured, Options, Results
from benchmarks.rows import GROUP_OF, GROUPS, ROWS, Group

QUICK = Options(
    rounds=1, warm_up_s=0.2, window_s=0.3, windows=1, scale=0.05, case_limit_s=90.0, limit_s=1200.0
)
COLD_START = "cold start"

# Groups with figures that have a limit: which part of benchmarks/limit.py that is.
_LIMIT_OF: dict[Group, str] = {"tasks": "star", "objects": "copy"}

_START_LIMIT_S = 120.0
_END_GRACE_S = 10.0
_LATE_S = 5.0

_PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {}
for name, (module, distribution) in json.loads(sys.argv[1]).items():
    if importlib.util.find_spec(module.split(".")[0]) is not None:
        try:
            found[name] = importlib.metadata.version(distribution) if distribution else ""
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
print(json.dumps(found))
"""


# ---- sessions -------------------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """One process of one system, which runs the cases of one group."""

    results: Results
    python: str
    system: str
    group: Group
    cases: list[str]
    round: int
    ends_at: float

    def run(self) -> list[str]:
        """Records what the cases measured. Returns those that it did not come to because one of them ended or hung the process."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp", ignore_cleanup_errors=True) as temp:
            log = Path(temp, "session.log")
            with log.open("wb") as output:
                process, report = self._spawn(temp, output.fileno())
            self._current, self._rest, done = "start", list(self.cases), False
            try:
                for message in self._messages(report, process):
                    done = done or "done" in message
                    self._take(message)
            finally:
                os.close(report)
                finished = _finish(process, done)
                left = _end_left(late_s=_LATE_S if finished and done else 0)
            if finished and done:
                if left:
                    self._problem(f"left behind after its shutdown: {'; '.join(left)}")
                return []
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            self._failed(
                f"exit status {process.returncode}" if finished else "no answer in time, killed", tail
            )
            # What fails to start or to stop would do so again.
            return self._rest if self._current in suite.CASES else []

    def _spawn(self, temp: str, output: int) -> tuple[subprocess.Popen[bytes], int]:
        read, write = os.pipe()
        options = self.results.options
        command = [self.python, "-m", "benchmarks.cold" if self.group == "start" else "benchmarks.suite"]
        command += ["--system", self.system, "--report", str(write), "--tree", str(os.getpid())]
        if self.group == "start":
            command += ["--spawned", f"{time.monotonic():.6f}"]
        else:
            command += ["--cases", json.dumps(self.cases), "--warm-up", str(options.warm_up_s)]
            command += ["--window", str(options.window_s), "--windows", str(options.windows)]
            command += ["--scale", str(options.scale)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(temp),
            pass_fds=[write],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(write)
        return process, read

    def _messages(self, fd: int, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
        """What the process reports, until it is done, has ended, or has been at one step for too long."""
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            deadline = self._deadline()
            while time.monotonic() < deadline:
                if not selector.select(0.2):
                    if process.poll() is not None:
                        return
                    continue
                data = os.read(fd, 1 << 16)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
                if lines and "done" in json.loads(lines[-1]):
                    return
                deadline = self._deadline()

    def _deadline(self) -> float:
        seconds = self.results.options.case_limit_s * (3 if self.group == "million" else 1)
        if self._current in ("start", "stop"):
            seconds = _START_LIMIT_S
        return min(time.monotonic() + seconds, self.ends_at)

    def _take(self, message: dict[str, Any]) -> None:
        if "begin" in message:
            self._current = message["begin"]
        elif "note" in message:
            self.results.notes.append(f"{self.system}, {self.group}: {message['note']}")
        elif "case" in message:
            name = message["case"]
            self._rest = [case for case in self._rest if case != name]
            for row, values in message.get("figures", {}).items():
                self.results.table[row][self.system].rounds[self.round] = values
            if "unsupported" in message:
                self._mark(name, "none")
            if "error" in message:
                self._mark(name, "failed")
                self._problem(f"{name}:\n{message['error'].strip()}")

    def _failed(self, why: str, tail: str) -> None:
        self._problem(f"{self._current}: {why}\n{tail}")
        for case in self._rest if self._current == "start" else [self._current]:
            self._mark(case, "failed")
        self._rest = [case for case in self._rest if case != self._current]

    def _mark(self, case: str, status: str) -> None:
        for row in _rows_of(case):
            self.results.table[row][self.system].status = status

    def _problem(self, text: str) -> None:
        self.results.problems.append(f"{self.system}, round {self.round + 1}, {self.group}: {text}")


def _rows_of(case: str) -> tuple[str, ...]:
    if case == COLD_START:
        return tuple(row for row in ROWS if GROUP_OF[row] == "start")
    return suite.CASES[case].rows if case in suite.CASES else ()


def _finish(process: subprocess.Popen[bytes], done: bool) -> bool:
    """Whether the session's process ended by itself; kills it otherwise."""
    try:
        process.wait(_END_GRACE_S if done or process.poll() is not None else 0.5)
        return True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def _end_left(late_s: float) -> list[str]:
    """Ends what a session left behind and returns its titles; what goes within `late_s` by itself was only late."""
    end = time.monotonic() + late_s
    while time.monotonic() < end and processes.cluster(os.getpid()):
        processes.reap()
        time.sleep(0.05)
    return processes.end_all(os.getpid())


def _environment(temp: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A killed session's cluster ends by its time-to-live; the peers' files go where run.py removes them.
    return {
        **os.environ,
        "PYTHONPATH": path,
        "NBRAY_TTL": "3",
        "RAY_TMPDIR": temp,
        "DASK_TEMPORARY_DIRECTORY": temp,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def measure_limit(results: Results, what: str, round_: int) -> None:
    """One part of benchmarks/limit.py, in a process of its own."""
    tasks = 7_000 if results.options.rounds == 1 else 20_000
    try:
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.limit", "--json", what, "--tasks", str(tasks)],
            cwd=ROOT,
            env=_environment(tempfile.gettempdir()),
            capture_output=True,
            text=True,
            timeout=_START_LIMIT_S,
            check=True,
        ).stdout
    except subprocess.SubprocessError as error:
        results.problems.append(f"limit: {error}\n{getattr(error, 'stderr', '') or ''}")
        return
    for name, value in json.loads(output).items():
        results.limits.setdefault(name, {})[round_] = value


def measure(results: Results, pythons: dict[str, str], cases: dict[Group, list[str]], ends_at: float) -> None:
    """All rounds of all groups, the systems in turn."""
    present = [system for system, version in results.versions.items() if version is not None]
    for round_ in range(results.options.rounds):
        # A million tasks are their own repetition.
        groups = [group for group in cases if group != "million" or round_ == 0]
        # Another system begins each round.
        turn = round_ % max(len(present), 1)
        for group in groups:
            for system in present[turn:] + present[:turn]:
                # Right before what is measured against it: the machine's speed drifts.
                if group in _LIMIT_OF and system == ("nbray" if "nbray" in present else present[0]):
                    measure_limit(results, _LIMIT_OF[group], round_)
                rest = cases[group]
                while rest:
                    if time.monotonic() > ends_at - 1:
                        results.problems.append(
                            f"the whole run's time ({results.options.limit_s:.0f} s) was over before {system}, {group}"
                        )
                        return
                    _say(f"round {round_ + 1} of {results.options.rounds}, {group}: {system}")
                    rest = Session(results, pythons[system], system, group, rest, round_, ends_at).run()


# ---- the command ----------------------------------------------------------------------------------------------------------------


def probe(python: str, systems: list[str]) -> dict[str, str | None]:
    """The version of each system in that interpreter ('' if it has none), None where it cannot be imported."""
    wanted = {name: (ADAPTERS[name].module, ADAPTERS[name].distribution) for name in systems}
    result = subprocess.run(
        [python, "-c", _PROBE, json.dumps(wanted)],
        cwd=ROOT,
        env=_environment(tempfile.gettempdir()),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(result.stdout)
    return {name: found.get(name) for name in systems}


def _choose(wanted: list[str], cases: dict[Group, list[str]]) -> dict[Group, list[str]]:
    """The cases that a `wanted` text names: a group's name, or part of the name of a case or of one of its rows."""
    chosen: set[str] = set()
    for text in wanted:
        found = [
            case
            for names in cases.values()
            for case in names
            if any(text.lower() in name.lower() for name in (case, *_rows_of(case)))
        ]
        found = next((names for group, names in cases.items() if group == text), found)
        if not found:
            nearest = difflib.get_close_matches(text, [*cases, *ROWS], 1, 0)
            sys.exit(
                f"--only: nothing is called {text!r}; the nearest is {nearest[0]!r}. All: {', '.join(ROWS)}"
            )
        chosen.update(found)
    return {group: [case for case in names if case in chosen] for group, names in cases.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short window per case and 50,000 tasks for a million"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases or groups whose name contains NAME"
    )
    parser.add_argument(
        "--systems", default=",".join(ADAPTERS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="rounds of everything (default 3)")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="interpreter that has ray and dask, if it is another one",
    )
    parser.add_argument("--limit", type=float, help="seconds after which the whole run ends with what it has")
    parser.add_argument(
        "--output",
        type=Path,
        help="the report (.md; a .json beside it); a full run writes benchmarks/RESULTS.md",
    )
    arguments = parser.parse_args()
    options = Options(**vars(QUICK if arguments.quick else Options()))
    options.rounds = arguments.rounds or options.rounds
    options.limit_s = arguments.limit or options.limit_s

    everything = list(ADAPTERS)
    systems = []
    for name in arguments.systems.split(","):
        if name not in everything:
            sys.exit(f"--systems: unknown system {name!r}; known are {', '.join(everything)}")
        systems.append(name)
    cases = {group: suite.cases_of(group) if group != "start" else [COLD_START] for group in GROUPS}
    if arguments.only:
        cases = _choose(arguments.only, cases)
    cases = {group: names for group, names in cases.items() if names}

    # As an installer does. In a checkout bytecode is older than what was edited last, and a cold start would compile it every time.
    compileall.compile_dir(ROOT / "nbray", quiet=2)

    pythons = {name: arguments.peer_python if name in ("ray", "dask") else sys.executable for name in systems}
    versions: dict[str, str | None] = {}
    for name in systems:
        versions |= probe(pythons[name], [name])
    wanted = [row for group in cases for case in cases[group] for row in _rows_of(case)]
    table = {row: {system: Measured() for system in systems} for row in ROWS if row in wanted}
    measured = Results(options, versions, table, results.machine(versions))
    begin = time.monotonic()
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        measure(measured, pythons, cases, begin + options.limit_s)
    except KeyboardInterrupt:
        measured.problems.append("interrupted")
    finally:
        processes.end_all(os.getpid())
    measured.machine["the whole run"] = f"{(time.monotonic() - begin) / 60:.0f} minutes"

    print(measured.as_text())
    full = not (arguments.quick or arguments.only or set(systems) != set(everything))
    output = arguments.output or (ROOT / "benchmarks" / "RESULTS.md" if full else None)
    if output is not None:
        output.write_text(measured.as_markdown())
        output.with_suffix(".json").write_text(measured.as_json())
        print(f"\nwritten: {output} and {output.with_suffix('.json').name}")
    return (
        1
        if any(problem.startswith(("nbray", "limit", "interrupted")) for problem in measured.problems)
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
