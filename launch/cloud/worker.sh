#!/bin/sh
# One host of a run: its packages, and one training program, detached from the terminal.
# launch/cloud/tpu.sh calls this on every worker of a TPU. By hand it serves on any host.
#
#   launch/cloud/worker.sh install [tpu|cuda12|cuda13]
#                          make .venv with the tested packages, and Python where it is too old
#                          (tpu: with the packages for gs://)
#   launch/cloud/worker.sh start FLAGS
#                          start python main.py FLAGS; the same again while it runs does nothing
#   launch/cloud/worker.sh status
#                          print worker HOST: none, running, ended, stopped, halted, lost or
#                          failed STATUS
#   launch/cloud/worker.sh log [LINES]
#                          print all output, or the last lines after the host's name
#   launch/cloud/worker.sh stop [FLAGS]
#                          send SIGTERM: the program saves and leaves; with FLAGS only a program
#                          that was started with them
#
#   ended     the run came to its end
#   stopped   somebody else sent SIGTERM (a preemption), or `stop FLAGS` did; the same start resumes
#   halted    `stop` without FLAGS
#   lost      the host was started anew
#
# ~/dmf.run keeps the output of every start: log, log.1, log.2 and so on.
# DMF_STATE names another folder.
set -eu
cd "$(dirname "$0")/../.."
. launch/shell.sh
state=${DMF_STATE:-$HOME/dmf.run}
PATIENCE_S=${DMF_STOP_S:-600} # for which a program may save before it is killed

boot() {
    cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

alive() {
    [ -f "$state/holder" ] && [ ! -f "$state/status" ] && [ "$(cat "$state/boot")" = "$(boot)" ] &&
        kill -0 "$(cat "$state/holder")" 2>/dev/null
}

# What has become of the program, in a word or three.
verdict() {
    if [ ! -f "$state/command" ]; then
        echo none
    elif alive; then
        echo running
    elif [ ! -f "$state/status" ]; then
        echo lost
    elif [ -f "$state/asked" ]; then
        echo halted
    elif [ "$(cat "$state/status")" -ne 0 ]; then
        printf 'failed %s: %s\n' "$(cat "$state/status")" "$(grep -v '^ *$' "$state/log" | tail -n 1 | cut -c 1-300)"
    elif grep -q '^stopped' "$state/log"; then # what main.py prints where it leaves before its end, with status 0
        echo stopped
    else
        echo ended
    fi
}

# Python as a release of its own, where the host's is too old: TPU images have 3.10.
find_python() {
    if [ -n "${PYTHON:-}" ] || python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        return
    fi
    [ -x "$HOME/dmf.uv/bin/uv" ] || python3 -m pip install --quiet --disable-pip-version-check --target "$HOME/dmf.uv" uv
    "$HOME/dmf.uv/bin/uv" python install --quiet 3.12
    PYTHON=$("$HOME/dmf.uv/bin/uv" python find --managed-python 3.12)
}

start() {
    command=$(quoted python main.py "$@")
    mkdir -p "$state"
    exec 9>"$state/lock"
    # A second start waits for the first one, and then finds its program.
    ! command -v flock >/dev/null || flock 9
    if alive; then
        [ "$(cat "$state/command")" = "$command" ] || fail "$(cat "$state/command") is running; expected it stopped before another is started"
        echo "worker $(uname -n): running already"
        return
    fi
    [ -x .venv/bin/python ] || fail "$(pwd)/.venv is missing: expected ./launch/cloud/worker.sh install before"
    if [ -f "$state/log" ]; then
        kept=1
        while [ -f "$state/log.$kept" ]; do kept=$((kept + 1)); done
        mv "$state/log" "$state/log.$kept"
    fi
    rm -f "$state/status" "$state/asked" "$state/program"
    printf '%s\n' "$command" >"$state/command"
    boot >"$state/boot"
    nohup setsid ./launch/cloud/worker.sh hold "$@" </dev/null >"$state/log" 2>&1 9>&- &
    echo $! >"$state/holder"
    printf 'worker %s: started %s\n' "$(uname -n)" "$command"
}

# Waits for the program, and keeps its exit status. A group of its own: what stops a terminal does not reach it.
hold() {
    trap '' HUP
    # shellcheck disable=SC2016 # it is the inner shell that knows the program's number
    sh -c 'echo $$ >"$0/program"; exec .venv/bin/python main.py "$@"' "$state" "$@" && code=0 || code=$?
    echo "$code" >"$state/status.new"
    mv "$state/status.new" "$state/status"
}

stop() {
    if ! alive || { [ $# -gt 0 ] && [ "$(cat "$state/command")" != "$(quoted python main.py "$@")" ]; }; then
        echo "worker $(uname -n): $(verdict)"
        return
    fi
    [ $# -gt 0 ] || touch "$state/asked" # with FLAGS it is undone what was begun, and may be started again
    while alive && [ ! -s "$state/program" ]; do sleep 0.1; done # started a moment ago
    kill -TERM "$(cat "$state/program")" 2>/dev/null || true
    waited=0
    while alive; do
        [ "$waited" -lt "$PATIENCE_S" ] || kill -KILL "$(cat "$state/program")" 2>/dev/null || true
        sleep 1
        waited=$((waited + 1))
    done
    echo "worker $(uname -n): $(verdict), status $(cat "$state/status" 2>/dev/null || echo unknown)"
}

verb=${1:-help}
[ $# -eq 0 ] || shift
case $verb in
    install)
        find_python
        # shellcheck disable=SC2034 # both are read by what is sourced
        requirements="requirements.txt" accelerator=${1:-}
        . launch/environment.sh
        if [ "$accelerator" = tpu ]; then # whose work directory is in a bucket
            requirements="requirements-gcs.txt" accelerator=''
            . launch/environment.sh
        fi
        echo "worker $(uname -n): installed"
        ;;
    start) start "$@" ;;
    hold) hold "$@" ;;
    status) echo "worker $(uname -n): $(verdict)" ;;
    log)
        [ -f "$state/log" ] || fail "$state/log is missing: expected a program that was started"
        if [ $# -eq 0 ]; then cat "$state/log"; else tail -n "$1" "$state/log" | sed "s/^/$(uname -n): /"; fi
        ;;
    stop) stop "$@" ;;
    help | --help | -h) usage launch/cloud/worker.sh ;;
    *) fail "$verb: expected install, start, status, log or stop; see launch/cloud/worker.sh --help" ;;
esac
