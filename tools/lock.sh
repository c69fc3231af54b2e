#!/usr/bin/env bash
# Writes constraints.txt: the exact versions that a fresh install of nbray with all its extras gets today.
# Run it with the oldest supported Python (what installs there installs on newer ones), then `make test`.
set -euo pipefail

python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check ".[test,lab,bench]"
{
    echo "# Exact versions of everything that nbray[test,demo,lab,bench] installs. Written by \`make lock\`"
    echo "# with Python $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); tested with 3.11, 3.12 and 3.13."
    "$folder/venv/bin/python" -m pip freeze --exclude nbray
} >"$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
