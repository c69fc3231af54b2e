"""The processes that a benchmark session started: which they are, what memory they hold, and ending those left behind."""

import ctypes
import os
import time
from collections.abc import Callable

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, so that daemons are still seen as part of its tree (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def cluster(tree: int) -> list[psutil.Process]:
    """The living descendants of process `tree`, without `tree` and without the caller: what a started system consists of."""
    found = []
    for process in psutil.Process(tree).children(recursive=True):
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def title(process: psutil.Process) -> str:
    """The command line as `ps` shows it ('' if the process has ended)."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def pss(processes: list[psutil.Process]) -> int:
    """Their memory in bytes, shared pages divided by the number of processes that map them."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def settled(measure: Callable[[], int], slack: int = 1_000_000, limit_s: float = 10.0) -> int:
    """`measure()` once it changes by less than `slack` within half a second, or after `limit_s`."""
    end = time.monotonic() + limit_s
    last = measure()
    while time.monotonic() < end:
        time.sleep(0.5)
        now = measure()
        if abs(now - last) < slack:
            return now
        last = now
    return last


def end_all(tree: int, grace_s: float = 3.0) -> list[str]:
    """Ends every descendant of `tree` (SIGTERM, after `grace_s` SIGKILL), reaps them, returns their titles."""
    left = cluster(tree)
    names = [title(process) or process.name() for process in left if process.is_running()]
    for process in left:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(left, timeout=grace_s)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=grace_s)
    reap()
    return names


def reap() -> None:
    """Collects the ended children that this subreaper inherited."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        pass
