"""Disks that are really full, and a small /dev/shm: file systems of a few megabytes in a mount namespace of the program's own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@cache
def _why_not() -> str:
    """Why small file systems cannot be had here; empty if they can."""
    if os.geteuid() != 0:
        return "mounting a small file system needs root"
    probe = "mount -t tmpfs -o size=1m nbray-test /mnt"
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", probe], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "there is no program unshare"
    return f"mounting is not permitted here: {done.stderr.strip()}" if done.returncode else ""


def run_with(
    mounts: dict[Path, str], program: str, *, setup: str = "true", variables: dict[str, str] | None = None
) -> str:
    """Run a Python program that sees file systems of these sizes at these places, after ``setup`` (a shell command); its output."""
    if reason := _why_not():
        pytest.skip(reason)
    for place in mounts:
        place.mkdir(exist_ok=True)
    mount = [f"mount -t tmpfs -o size={size} nbray-test {place}" for place, size in mounts.items()]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", " && ".join([*mount, setup, 'exec "$@"']), "sh", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


FILLS_THE_DISK = """
import os
import nbray, numpy as np

nbray.init(num_cpus=1, object_store_memory=64 << 20, name="portable")

@nbray.remote(max_retries=0)
def make(n):
    return np.full(2 << 20, n, dtype=np.uint8)

refs = []
try:
    while True:
        refs.append(nbray.put(np.full(2 << 20, len(refs), dtype=np.uint8)))
except nbray.exceptions.DiskFullError as error:
    print("refused", error)
assert 3 <= len(refs) <= 6, len(refs)
try:
    nbray.get(make.remote(1))
except nbray.exceptions.DiskFullError as error:
    print("failed", type(error).__name__)
assert [int(nbray.get(ref)[-1]) for ref in refs] == list(range(len(refs)))
del refs[:2]
first = nbray.put(np.full(2 << 20, 77, dtype=np.uint8))
assert int(nbray.get(first)[-1]) == 77
assert int(nbray.get(make.remote(5))[-1]) == 5
print("usable")
nbray.shutdown()
"""


def test_portable_store_on_a_full_disk_is_an_error_and_no_sigbus(runtime_dir: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    out = run_with(
        {disk: "12m"}, FILLS_THE_DISK, variables={"NBRAY_PORTABLE": "1", "NBRAY_SPILL_DIR": str(disk)}
    )
    lines = out.splitlines()
    assert lines[-1] == "usable"
    assert "failed TaskError(DiskFullError)" in lines
    assert "portable mode" in out and str(disk) in out and "No space left on device" in out
    assert "NBRAY_SPILL_DIR" in out


WORKS = """
import os
import nbray, numpy as np

info = dict(nbray.init(num_cpus=2, object_store_memory=300 << 20, name="narrow"))

@nbray.remote
def total(array):
    return int(array.sum())

array = np.ones(200 << 20, dtype=np.uint8)
assert nbray.get(total.remote(nbray.put(array)), timeout=60) == 200 << 20
print("directory", info["directory"])
print("spill", info["spill"])
nbray.shutdown()
print("fine")
"""


def test_dev_shm_of_64_mb(runtime_dir: Path) -> None:
    out = run_with({Path("/dev/shm"): "64m"}, WORKS)
    assert out.splitlines()[-1] == "fine"


def test_temp_directory_that_is_full(tmp_path: Path) -> None:
    """Neither the sockets nor the spill directory go there."""
    full = tmp_path / "full"
    setup = f"! head -c 2m /dev/zero > {full}/filler 2>/dev/null"
    nowhere = {"NBRAY_RUNTIME_DIR": "", "XDG_RUNTIME_DIR": "", "TMPDIR": str(full)}
    out = run_with({full: "1m"}, WORKS, setup=setup, variables=nowhere)
    lines = out.splitlines()
    assert lines[-1] == "fine"
    places = [line.partition(" ")[2] for line in lines if line.startswith(("directory ", "spill "))]
    assert len(places) == 2
    assert not [place for place in places if place.startswith(str(full))]


def test_spill_directory_that_is_full_is_named(runtime_dir: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    program = "import nbray\ntry:\n    nbray.init(num_cpus=1)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    setup = f"! head -c 2m /dev/zero > {full}/filler 2>/dev/null"
    out = run_with({full: "1m"}, program, setup=setup, variables={"NBRAY_SPILL_DIR": str(full)})
    assert "NbrayError" in out and str(full) in out and "No space left on device" in out
