"""Ctrl-C in every call that takes time: it is raised soon, nothing is torn, the next call works."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes.tools import script

BEGIN = """
import random, threading
import numpy as np

# More CPUs than there are: what an interrupt has left running must not keep the next ones waiting.
nbray.init(num_cpus=100, object_store_memory=2 << 30)
sent = 0.0

def interrupt_after(seconds):
    def send():
        global sent
        time.sleep(seconds)
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread

@nbray.remote
def sleeps(seconds=1000):
    time.sleep(seconds)

@nbray.remote
def square(x):
    return x * x

@nbray.remote(num_returns="streaming")
def items(pause):
    for number in range(10**9):
        yield number
        time.sleep(pause)

def check():
    assert nbray.get([square.remote(n) for n in range(20)], timeout=30) == [n * n for n in range(20)]

check()
"""

OCCUPATIONS = {
    "get": "nbray.get(sleeps.remote())",
    "get with timeout": "nbray.get(sleeps.remote(), timeout=100)",
    "get of a list": "nbray.get([sleeps.remote() for _ in range(10)])",
    "wait": "nbray.wait([sleeps.remote()])",
    "wait with timeout": "nbray.wait([sleeps.remote()], timeout=100)",
    "put of large values": "while True: ref = nbray.put(large)",
    "submit": "while True: square.remote(1)",
    "submit with large arguments": "while True: square.remote(large[:100_000])",
    "submit and get": "while True: nbray.get(square.remote(3))",
    "generator": "for ref in items.remote(0.01): nbray.get(ref)",
    "a slow generator": "for ref in items.remote(1000): nbray.get(ref)",
    "an actor that is created": "Slow.remote(); nbray.get(Slow.remote().call.remote())",
    "query": "while True: nbray.state.tasks()",
    "future": "sleeps.remote().future().result()",
}


@pytest.mark.parametrize("part", [0, 1, 2])
def test_interrupt_is_raised_soon_and_does_no_harm(runtime_dir: Path, tmp_path: Path, part: int) -> None:
    code = (
        BEGIN
        + """
@nbray.remote
class Slow:
    def __init__(self):
        time.sleep(1000)
    def call(self):
        pass

large = np.ones(25_000_000)
for name, occupation in OCCUPATIONS.items():
    compiled = compile(occupation, name, "exec")
    late = []
    for delay in (0.05, 0.2, 0.31):
        thread = interrupt_after(delay)
        try:
            exec(compiled)
        except KeyboardInterrupt:
            late.append(time.monotonic() - sent)
            thread.join()
        else:
            raise AssertionError("not interrupted")
        check()
    print("late", *late, name)
print("fine")
"""
    ).replace("OCCUPATIONS", repr(dict(list(OCCUPATIONS.items())[part::3])))
    with script(tmp_path / "driver.py", code) as driver:
        text = driver.end(90)
    assert driver.process.returncode == 0, text
    assert text.strip().endswith("fine"), text
    lines = [line for line in text.splitlines() if line.startswith("late")]
    assert len(lines) == len(list(OCCUPATIONS)[part::3])
    for line in lines:
        _, *numbers = line.split(maxsplit=4)
        latencies = sorted(map(float, numbers[:3]))
        # 0.3 s is the promise; a machine that does something else may need longer once.
        assert latencies[1] < 0.3, line
        assert latencies[2] < 2.0, line


def test_interrupt_leaves_the_cluster_as_it_is(runtime_dir: Path, tmp_path: Path) -> None:
    code = (
        BEGIN
        + """
@nbray.remote
class Counter:
    def __init__(self):
        self.n = 0
    def up(self):
        self.n += 1
        return self.n

counter = Counter.remote()
kept = nbray.put(np.arange(1_000_000))
running = square.remote(sleeps.remote(0) and 5)
for number in range(20):
    assert nbray.get(counter.up.remote(), timeout=20) == number + 1
    wait = sleeps.remote()
    thread = interrupt_after(0.02)
    try:
        nbray.get(wait)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError
    thread.join()
    nbray.cancel(wait, force=True)
    assert nbray.get(kept)[-1] == 999_999
check()
print("fine")
"""
    )
    with script(tmp_path / "driver.py", code) as driver:
        text = driver.end(60)
    assert text.strip().endswith("fine"), text


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_interrupts_at_random_moments(runtime_dir: Path, tmp_path: Path, seed: int) -> None:
    """Nothing is lost or torn, whatever the interpreter does when an interrupt comes."""
    code = (
        BEGIN
        + """
random.seed(int(sys.argv[1]))
interrupts = 0
done = threading.Event()
ready = threading.Event()

def send():
    moments = random.Random(int(sys.argv[1]))
    for _ in range(200):
        # One at a time: the next one comes when the last one is dealt with.
        ready.wait()
        ready.clear()
        time.sleep(moments.random() ** 2 * 0.02)
        os.kill(os.getpid(), signal.SIGINT)
    done.set()

@nbray.remote
class Counter:
    def __init__(self):
        self.n = 0
    def up(self, by):
        self.n += by
        return self.n

counter = Counter.remote()
held = []          # (ref, what it must be)
large = np.arange(30_000)
stream = None
taken = 0
threading.Thread(target=send, daemon=True).start()
last = 0
while not done.is_set():
    try:
        ready.set()
        while True:
            what = random.randrange(7)
            number = random.randrange(10**6)
            if what == 0:
                held.append((square.remote(number), number * number))
            elif what == 1:
                held.append((nbray.put(number), number))
            elif what == 2:
                ref = nbray.put(large + number)
                held.append((ref, number))
            elif what == 3 and held:
                ref, value = random.choice(held)
                found = nbray.get(ref, timeout=30)
                assert (found if isinstance(found, int) else found[0]) == value
            elif what == 4 and held:
                nbray.wait([ref for ref, _ in held[-5:]], num_returns=1, timeout=30)
            elif what == 5:
                held.append((square.remote(nbray.put(number)), number * number))
            elif what == 6:
                held[:] = held[-50:]
    except KeyboardInterrupt:
        interrupts += 1
print("interrupts", interrupts)
assert 150 <= interrupts <= 200
for ref, value in held:
    found = nbray.get(ref, timeout=30)
    assert (found if isinstance(found, int) else found[0]) == value
check()
for _ in range(50):
    last = nbray.get(counter.up.remote(1), timeout=30)
assert last == 50
# What was interrupted has left nothing behind in the node.
del held, ref, found
from nbray.api import context
engine = context.require().engine
def used():
    import gc; gc.collect()
    nbray.get(square.remote(1))
    return engine.query("memory")["used"]
until(lambda: used() == 0)
print("fine")
"""
    )
    with script(tmp_path / "driver.py", code, str(seed)) as driver:
        text = driver.end(100)
    assert driver.process.returncode == 0, text
    assert text.strip().endswith("fine"), text


def test_interrupts_in_a_row(runtime_dir: Path, tmp_path: Path) -> None:
    """An impatient user: many at once are one or more KeyboardInterrupts, and then it is over."""
    code = (
        BEGIN
        + """
def guarded(function):
    while True:
        try:
            return function()
        except KeyboardInterrupt:
            pass

def settle():
    for thread in threads:
        thread.join()
    # The kernel may give a signal to another thread, which takes its time to run.
    time.sleep(0.1)

for _ in range(10):
    threads = [interrupt_after(0.05 + 0.001 * n) for n in range(5)]
    try:
        nbray.get(sleeps.remote())
    except KeyboardInterrupt:
        # An interrupt may come between two rounds of a loop, outside of its try: hence three loops.
        guarded(lambda: guarded(lambda: guarded(settle)))
    else:
        raise AssertionError
    # None of them is kept for a call to come.
    check()
print("fine")
"""
    )
    with script(tmp_path / "driver.py", code) as driver:
        text = driver.end(60)
    assert text.strip().endswith("fine"), text


def test_cluster_is_not_reached_by_the_terminal(runtime_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal goes to the whole process group; the cluster is not in it."""
    code = (
        BEGIN
        + """
from nbray.api import context
node = int(context.require().engine.details()["node_pid"])
assert os.getsid(node) != os.getsid(0)
assert os.getpgid(node) != os.getpgrp()
pid = nbray.get(nbray.remote(os.getpid).remote())
assert os.getsid(pid) != os.getsid(0)
for daemon in (node, pid):
    os.kill(daemon, signal.SIGINT)
check()
print("fine")
"""
    )
    with script(tmp_path / "driver.py", code) as driver:
        text = driver.end(60)
    assert text.strip().endswith("fine"), text
