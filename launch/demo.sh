#!/bin/sh
# The digits demo: installs packages into .venv, then runs flow matching and the curriculum.
# It takes about four minutes on two cores after the installation. Further flags go to main.py:
# ./launch/demo.sh --config.seed=1 --workdir=runs/seed1
cd "$(dirname "$0")/.."
requirements="requirements.txt"
. launch/environment.sh
exec "$python" main.py --config=configs/digits.py --workdir=runs/digits "$@"
