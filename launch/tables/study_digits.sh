#!/bin/sh
# The study of docs/study.md: installs packages into .venv, then makes the missing runs, the table
# and the plot. It takes two hours on two cores, and may be stopped and started again.
# Further flags go to study.py: ./launch/tables/study_digits.sh --sets=digits
cd "$(dirname "$0")/../.."
requirements="requirements.txt"
. launch/environment.sh
exec "$python" launch/tables/study.py \
    --out=docs/study.json --plot=docs/study.png --docs=docs/study.md "$@"
