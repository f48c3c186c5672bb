# shellcheck shell=sh
# Sourced by the other scripts. Makes .venv once, and names its interpreter in $python.
# The packages are those of the file in $requirements, in the exact versions that were tested.
# $accelerator may name an extra of jax: tpu, cuda12, cuda13.
# Needs only Python 3.11 to 3.13; PYTHON=... picks one.

set -eu

candidates=${PYTHON:-python3 python3.12 python3.11 python3.13 python}
known='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
for candidate in $candidates; do
    if "$candidate" -c "$known" 2>/dev/null; then
        found=$candidate
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "error: no Python from 3.11 to 3.13 among: $candidates; set PYTHON=/path/to/one" >&2
    exit 2
fi

python=.venv/bin/python
: "${requirements:?is set by the script that sources this one}"
stamp=.venv/$requirements${accelerator:+.$accelerator}.done
if [ ! -f "$stamp" ] || [ -n "$(find requirements*.txt requirements.lock -newer "$stamp")" ]; then
    what=$requirements${accelerator:+ and jax[$accelerator]}
    echo "installing $what into .venv (once, about a minute)" >&2
    if [ ! -x "$python" ] && ! "$found" -m venv .venv; then
        rm -f "$python" # it has no pip; the next start must not take it for a whole environment
        exit 1
    fi
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
        ${accelerator:+"jax[$accelerator]"} -c requirements.lock >&2
    touch "$stamp"
fi
