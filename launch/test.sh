#!/bin/sh
# All checks from nothing: packages into .venv, lint, types, tests. Further arguments go to pytest.
cd "$(dirname "$0")/.."
requirements="requirements-dev.txt"
. launch/environment.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
exec "$python" -m pytest -n 2 --dist worksteal "$@"
