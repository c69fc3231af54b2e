"""What `%%remote` adds to the task itself: a cell on the cluster beside a cell that submits the same work as a plain task.

Both run as whole cells of a real kernel (`run_cell`, so with all that the extension does before and after a cell), in turn, with the
same captures. `python -m benchmarks.magic` prints the overhead for captures of several sizes.
"""

import argparse
import json
import statistics
from typing import Any

KB, MB = 1_000, 1_000_000
SIZES = {"8 kB": 8 * KB, "1 MB": MB, "7 MB": 7 * MB}
LIMIT_S = 120.0

_START = "%load_ext nbray\n%cluster start --cpus {cpus}"

_SETUP = """
import json, time
import numpy as np
import nbray
from IPython import get_ipython

scale = 2.0
settings = {{"a": 1, "b": [1, 2, 3]}}
x = np.ones({size} // 8)

def scaled(r):
    return r * scale

@nbray.remote
def plain(x, settings):
    total = 0.0
    for i in range(3):
        total += scaled(i) * settings["a"]
    return total + float(x[0])
"""

_CELL = """%%remote
total = 0.0
for i in range(3):
    total += scaled(i) * settings["a"]
total + float(x[0])"""

_TASK = "nbray.get(plain.remote(x, settings))"

_MEASURE = """
def timed(cell, turn):
    # Another text each time: nothing that was found out about the cell before is of use.
    cell += "\\n# " + str(turn)
    started = time.perf_counter()
    result = get_ipython().run_cell(cell, silent=True)
    ended = time.perf_counter()
    result.raise_error()
    return ended - started

for turn in range(20):
    timed({cell!r}, turn - 20), timed({task!r}, turn - 20)
pairs = [(timed({cell!r}, turn), timed({task!r}, turn)) for turn in range({count})]
print(json.dumps(pairs))
"""


class Notebook:
    """`with Notebook(2) as n: n.pairs(8000, 100)`: a kernel with a cluster of its own."""

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus
        # The peers' environment has no kernels.
        from jupyter_client.manager import KernelManager

        self._manager = KernelManager(kernel_name="python3")

    def __enter__(self) -> "Notebook":
        self._manager.start_kernel()
        self._client: Any = self._manager.blocking_client()
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=LIMIT_S)
            self._run(_START.format(cpus=self._cpus))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel()

    def _run(self, code: str) -> str:
        printed: list[str] = []

        def see(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = self._client.execute_interactive(code, timeout=LIMIT_S, output_hook=see, allow_stdin=False)
        if reply["content"]["status"] != "ok":
            raise RuntimeError("\n".join(reply["content"].get("traceback", [])))
        return "".join(printed)

    def pairs(self, size: int, count: int) -> list[tuple[float, float]]:
        """Seconds of a `%%remote` cell and of the task itself, `count` times in turn, with a capture of `size` bytes."""
        self._run(_SETUP.format(size=size))
        lines = self._run(_MEASURE.format(cell=_CELL, task=_TASK, count=count)).splitlines()
        return [(cell, task) for cell, task in json.loads(lines[-1])]


def overhead_ms(pairs: list[tuple[float, float]]) -> float:
    """The median of the cells less the median of the tasks, in milliseconds."""
    cells, tasks = zip(*pairs, strict=True)
    return float(statistics.median(cells) - statistics.median(tasks)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="cells of each kind")
    count = parser.parse_args().count
    print("captures   %%remote     task      adds")
    with Notebook(cpus=2) as notebook:
        for name, size in SIZES.items():
            pairs = notebook.pairs(size, count)
            cells, tasks = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
            print(f"{name:>8}  {cells:6.2f} ms  {tasks:6.2f} ms  {overhead_ms(pairs):6.2f} ms")


if __name__ == "__main__":
    main()
