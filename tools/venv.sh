#!/usr/bin/env bash
# Makes or adopts the virtual environment and installs nbray, editable, with the extras named.
#
#   tools/venv.sh DIRECTORY EXTRA...
#
# PYTHON=... chooses the interpreter. Where packages come from is pip's own business: its configuration files
# and PIP_* variables are left as they are.
set -euo pipefail

directory=$1
shift
extras=$(IFS=, && echo "$*")
checkout=$(pwd -P)

say() { printf '%s\n' "$*" >&2; }
die() {
    say "" "error: $1"
    shift
    for line in "$@"; do say "  $line"; done
    exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        recent "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.11 or newer (it says: $(version_of "$PYTHON" || echo nothing))." \
            "Give another one, for instance: make PYTHON=python3.12 ..."
        echo "$PYTHON"
        return
    fi
    # A name can exist and still not run: version managers put shims for every version they know.
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found (tried python3, python3.13, python3.12, python3.11, python)." \
        "Debian/Ubuntu: apt-get install python3.11 python3.11-venv     Fedora: dnf install python3.11" \
        "macOS: brew install python@3.12     anywhere: pyenv install 3.12, uv python install 3.12 or conda" \
        "A Python that is not on PATH: make PYTHON=/path/to/python ..."
}

ensure_venv_module() {
    local python=$1 package
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    package="python$(version_of "$python")-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "$python has no venv module: installing $package"
        { apt-get update -q && apt-get install -q -y --no-install-recommends "$package"; } >&2 || true
    fi
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$python cannot make virtual environments (its modules venv and ensurepip are missing)." \
            "Debian/Ubuntu: sudo apt-get install $package" \
            "Another Python: make PYTHON=/path/to/python ..."
}

record="$directory/.nbray-checkout"
if [ -e "$directory" ] && ! recent "$directory/bin/python"; then
    say "$directory is broken or older than Python 3.11: making it anew"
    rm -rf "$directory"
elif [ -f "$record" ] && [ "$(cat "$record")" != "$checkout" ]; then
    # Its scripts carry absolute paths, and the editable install points to the old place.
    say "$directory was made for $(cat "$record"): making it anew"
    rm -rf "$directory"
fi
if [ -e "$directory" ] && [ -n "${PYTHON:-}" ]; then
    wanted=$(version_of "$(find_python)")
    [ "$wanted" = "$(version_of "$directory/bin/python")" ] ||
        die "$directory has Python $(version_of "$directory/bin/python"), PYTHON=$PYTHON is $wanted." \
            "Use a second environment: make VENV=.venv$wanted PYTHON=$PYTHON ...   or remove $directory."
fi
if [ ! -e "$directory" ]; then
    python=$(find_python)
    ensure_venv_module "$python"
    say "making $directory with $("$python" --version)"
    "$python" -m venv "$directory"
fi
printf '%s\n' "$checkout" >"$record"

say "installing nbray${extras:+[$extras]} into $directory"
if ! "$directory/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"; then
    die "pip could not install what nbray${extras:+[$extras]} needs (see above)." \
        "Behind a proxy or with a private index: set PIP_INDEX_URL, PIP_PROXY or PIP_CERT as for any pip call." \
        "A Python for which constraints.txt has no wheels: make PYTHON=python3.12 VENV=.venv3.12 ..."
fi
