#!/bin/sh
# The digits demo from nothing: packages into .venv, then flow matching and the curriculum; about four minutes on two cores.
# Further flags go to main.py: ./launch/demo.sh --config.seed=1 --workdir=runs/seed1
cd "$(dirname "$0")/.."
requirements="requirements.txt"
. launch/environment.sh
exec "$python" main.py --config=configs/digits.py --workdir=runs/digits "$@"
