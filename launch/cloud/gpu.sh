#!/bin/sh
# The program on NVIDIA GPUs. One process drives all GPUs of a host; several hosts make one run.
#
#   launch/cloud/gpu.sh FLAGS                                                      this host alone
#   launch/cloud/gpu.sh --coordinator=HOST:PORT --processes=2 --process=0 FLAGS    on every host
#
# FLAGS are main.py's. HOST is where process 0 runs. PORT is a free port that the others reach.
# Every host has another --process, counted from 0.
# JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID may be set instead of the three.
# Options, before FLAGS:
#
#   --cuda=12|13|none   the CUDA whose packages go into .venv; none leaves .venv as it is
#                       (default: 13 where the driver is 580 or newer, else 12)
#   --install           make .venv, run nothing
#   --dry-run           print the command, run nothing
set -eu
cd "$(dirname "$0")/../.."
. launch/shell.sh

coordinator=${JAX_COORDINATOR_ADDRESS:-} processes=${JAX_NUM_PROCESSES:-} process=${JAX_PROCESS_ID:-}
cuda=${DMF_CUDA:-} dry='' install=''
while [ $# -gt 0 ]; do
    case $1 in
        --coordinator=*) coordinator=${1#*=} ;;
        --processes=*) processes=${1#*=} ;;
        --process=*) process=${1#*=} ;;
        --cuda=*) cuda=${1#*=} ;;
        --install) install=yes ;;
        --dry-run) dry=yes ;;
        --help | -h) usage launch/cloud/gpu.sh && exit ;;
        *) break ;;
    esac
    shift
done
[ "${1:-}" != -- ] || shift
[ $# -gt 0 ] || [ -n "$install" ] || fail "no flags of main.py: expected some, such as --config=configs/cifar10.py; see launch/cloud/gpu.sh --help"

if [ -n "$coordinator$processes$process" ]; then
    case $coordinator in
        ?*:[0-9]*) ;;
        *) fail "--coordinator=$coordinator: expected HOST:PORT of process 0, with --processes and --process" ;;
    esac
    case $processes in '' | *[!0-9]* | 0) fail "--processes=$processes: expected their number, with --coordinator and --process" ;; esac
    case $process in '' | *[!0-9]*) fail "--process=$process: expected this host's number, from 0, with --coordinator and --processes" ;; esac
    [ "$process" -lt "$processes" ] || fail "--process=$process: expected a number below --processes=$processes"
    set -- env "JAX_COORDINATOR_ADDRESS=$coordinator" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$process" \
        .venv/bin/python main.py "$@"
else
    set -- .venv/bin/python main.py "$@"
fi
if [ -n "$dry" ]; then
    quoted "$@"
    exit
fi

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/\..*//p') || true
if [ -z "$cuda" ]; then
    case $driver in
        '' | *[!0-9]*) fail "no NVIDIA GPU: nvidia-smi names no driver; expected one, or --cuda=12, --cuda=13 or --cuda=none" ;;
    esac
    if [ "$driver" -ge 580 ]; then cuda=13; else cuda=12; fi
fi
# shellcheck disable=SC2034 # both are read by what is sourced
case $cuda in
    12 | 13)
        requirements="requirements.txt" accelerator=cuda$cuda
        . launch/environment.sh
        ;;
    none) [ -x .venv/bin/python ] || fail "$(pwd)/.venv is missing: expected it with --cuda=none" ;;
    *) fail "--cuda=$cuda: expected 12, 13 or none" ;;
esac
[ -n "$install" ] || exec "$@"
