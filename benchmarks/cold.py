"""One cold start in a process of its own: import, start, first result; then the idle memory; then the shutdown.

Started by benchmarks.run as `python -m benchmarks.cold --system NAME --report FD --tree PID --spawned SECONDS`. Nothing that the
system under test does not need itself is imported before the first result.
"""

import sys
import time

from benchmarks.adapters import adapter

_IDLE_AFTER_S = 3.0


def ok() -> bytes:
    return b"ok"


def _short(title: str) -> str:
    return " ".join(word.rpartition("/")[2] for word in title.split() if not word.startswith("-"))[:40]


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    system = adapter(options["--system"])
    system.load()
    imported = time.monotonic()
    system.start()
    started = time.monotonic()
    system.get(system.task(ok)())
    first = time.monotonic()

    from benchmarks import processes
    from benchmarks.session import Reporter

    spawned, tree = float(options["--spawned"]), int(options["--tree"])
    reporter = Reporter(int(options["--report"]))
    name = "import + start + first result, cold process"
    reporter.figures(name, {name: [first - spawned]})
    reporter.note(
        f"import {imported - spawned:.3f} s, start {started - imported:.3f} s, first result {first - started:.3f} s"
    )

    # Workers that are still starting belong to the idle cluster.
    time.sleep(_IDLE_AFTER_S)
    memory = processes.settled(lambda: processes.pss(processes.cluster(tree)))
    parts = [
        f"{_short(processes.title(p))} {processes.pss([p]) / 1e6:.1f} MB" for p in processes.cluster(tree)
    ]
    name = "idle cluster memory without the driver (PSS)"
    reporter.figures(name, {name: [memory / 1e6]})
    reporter.note("; ".join(parts))

    start = time.monotonic()
    system.stop()
    stopped = time.monotonic()
    # The standard library's resource tracker ends with the driver.
    while (
        any("resource_tracker" not in processes.title(p) for p in processes.cluster(tree))
        and time.monotonic() - start < 20
    ):
        time.sleep(0.002)
    gone = time.monotonic()
    reporter.figures("shutdown", {"shutdown": [stopped - start]})
    name = "shutdown until the last process is gone"
    reporter.figures(name, {name: [gone - start]})
    reporter.done()


if __name__ == "__main__":
    main()
