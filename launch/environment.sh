# shellcheck shell=sh
# Sourced by the other scripts: makes .venv with the exact tested packages of the file named in $requirements, once, and
# names its interpreter in $python. $accelerator, where it is set, is the extra of jax that goes with it: tpu, cuda12, cuda13;
# $also another file of requirements.
# Needs only Python 3.11 to 3.13; PYTHON=... picks one.

set -eu

for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        found=$candidate
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "error: no Python from 3.11 to 3.13 among: ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; set PYTHON=/path/to/one" >&2
    exit 2
fi

python=.venv/bin/python
: "${requirements:?is set by the script that sources this one}"
stamp=.venv/$requirements${accelerator:+.$accelerator}${also:+.$also}.done
if [ ! -f "$stamp" ] || [ -n "$(find "$requirements" requirements.txt requirements.lock ${also:+"$also"} -newer "$stamp")" ]; then
    echo "installing $requirements${accelerator:+ and jax[$accelerator]} into .venv (once, about a minute)" >&2
    [ -x "$python" ] || "$found" -m venv .venv
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ${also:+-r "$also"} \
        ${accelerator:+"jax[$accelerator]"} -c requirements.lock >&2
    touch "$stamp"
fi
