"""The notebook tests on other versions of ipykernel: ``make matrix``, or ``python tools/matrix.py 6.31.* -- -k interrupt``.

Each version gets a small environment of its own under the user's cache directory, which sees the packages of the environment that runs this script and
has only ipykernel, with what it needs, in front of them. Making one takes seconds; they are kept.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

VERSIONS = ("6.31.*", "7.3.*", "7.*")
"""What the design promises: the last 6, the 7 before the newest, the newest 7."""

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/notebook"


def environment(version: str, cache: Path) -> Path:
    """Its interpreter, with that ipykernel. Raises subprocess.CalledProcessError."""
    python = ".".join(map(str, sys.version_info[:2]))
    home = cache / f"ipykernel-{re.sub(r'[^0-9.]', '', version).strip('.')}-python{python}"
    interpreter = home / "bin" / "python"
    if not interpreter.exists():
        venv.create(home, with_pip=True)
    # Also anew each time: the environment behind it may be another one than last time.
    packages = next((home / "lib").glob("python*")) / "site-packages"
    (packages / "behind.pth").write_text("\n".join([*site.getsitepackages(), str(ROOT)]) + "\n")
    install = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "--upgrade", f"ipykernel=={version}"], check=True)
    return interpreter


def main() -> int:
    """Run the tests for each version; 1 if any of them fails."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions", nargs="*", default=VERSIONS, help=f"versions of ipykernel ({' '.join(VERSIONS)})"
    )
    chosen = parser.parse_args(words[:cut])
    options = words[cut + 1 :] or ["-q", TESTS]
    if all(option.startswith("-") or not Path(option).exists() for option in options):
        options.append(TESTS)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbray-matrix"
    results = []
    for version in chosen.versions:
        interpreter = environment(version, cache)
        found = subprocess.run(
            [str(interpreter), "-c", "import ipykernel, IPython; print(ipykernel.__version__, 'with IPython', IPython.__version__)"],
            check=True, capture_output=True, text=True, cwd=ROOT,
        ).stdout.strip()  # fmt: skip
        print(f"== ipykernel {found}", flush=True)
        began = time.monotonic()
        # -p no:cacheprovider: several environments would argue about one cache.
        status = subprocess.run(
            [str(interpreter), "-m", "pytest", "-p", "no:cacheprovider", *options], cwd=ROOT, check=False
        ).returncode
        results.append(
            f"{'passed' if status == 0 else 'FAILED'}  ipykernel {found}  ({time.monotonic() - began:.0f} s)"
        )
    print("\n".join(results))
    return int(any(result.startswith("FAILED") for result in results))


if __name__ == "__main__":
    sys.exit(main())
