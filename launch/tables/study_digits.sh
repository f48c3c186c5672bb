#!/bin/sh
# The study of docs/study.md from nothing: packages into .venv, then every run that is not there yet, its table and its plot.
# Two hours on two cores; may be stopped and started again. Further flags go to study.py: ./launch/tables/study_digits.sh --sets=digits
cd "$(dirname "$0")/../.."
requirements="requirements.txt"
. launch/environment.sh
exec "$python" launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md "$@"
