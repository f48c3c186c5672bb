#!/bin/sh
# One Cloud TPU and one training run on all its workers.
#
#   launch/cloud/tpu.sh watch  NODE MACHINE --workdir=gs://BUCKET/RUN -- FLAGS
#                              create, setup and run as needed, until the run has ended
#   launch/cloud/tpu.sh create NODE MACHINE           a TPU VM; with --queued wait in the queue
#   launch/cloud/tpu.sh setup  NODE [--repo=URL [--ref=REF]]    this commit or another's, packages
#   launch/cloud/tpu.sh run    NODE --workdir=gs://BUCKET/RUN -- FLAGS
#                              start python main.py FLAGS on all workers, detached
#   launch/cloud/tpu.sh up     NODE MACHINE --workdir=... -- FLAGS       create, setup and run, once
#   launch/cloud/tpu.sh status NODE                   the node, and the program on each worker
#   launch/cloud/tpu.sh logs   NODE [--out=DIR]       the last lines of all workers, or all in DIR
#   launch/cloud/tpu.sh stop   NODE                   the program saves and leaves
#   launch/cloud/tpu.sh delete NODE
#
# NODE is --name=NAME --project=PROJECT --zone=ZONE, and --queued if it was made with --queued.
# MACHINE is --accelerator=TYPE (v5litepod-16) [--runtime=VERSION] [--queued] [--spot].
# Each may be an environment variable: DMF_NAME, DMF_PROJECT, DMF_ZONE, DMF_ACCELERATOR,
# DMF_RUNTIME, DMF_WORKDIR. FLAGS are main.py's. Further options:
#
#   --dry-run              print every command as it would be typed, run none
#   --delete-on-failure    delete the node if a step after its creation fails
#   --delete-when-done     (watch) delete the node when the run has ended
#   --every=60             (watch, create --queued) seconds between two looks
#   --retries=3            (watch) how many failures to bear: all crashes, and the failed calls
#                          since the program was last seen; preemptions do not count
#   --out=DIR              (watch) collect the workers' output at every look, a folder per start
#   --create-flag=FLAG     a flag of gcloud's create, such as --service-account=...; repeatable
#   --ssh-flag=FLAG        a flag of gcloud's ssh and scp, such as --internal-ip; repeatable
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/launch/shell.sh"
exec 3>&1 # where a dry run prints, also from inside $(...)

name=${DMF_NAME:-} project=${DMF_PROJECT:-} zone=${DMF_ZONE:-} workdir=${DMF_WORKDIR:-}
accelerator=${DMF_ACCELERATOR:-} runtime=${DMF_RUNTIME:-}
repo='' ref='' queued='' spot='' dry='' out='' create_flags='' ssh_flags=''
delete_on_failure='' delete_when_done='' every=60 retries=3
state=''     # of the node, as `look` has found it
pretended='' # what a dry run finds
making=''    # while gcloud makes a node
begun=''     # a node that was made here, and that is not yet in use
doubtful=''  # a creation failed: what it was about may be there all the same
sleeper=''

say() {
    if [ -n "$dry" ]; then printf '# %s\n' "$*" >&3; else printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; fi
}

# Runs a command, or prints it in a dry run. A failure is told in one line. Nothing reads the
# terminal, because a read would stop ssh in the background, and the watch with it.
call() {
    if [ -n "$dry" ]; then
        quoted "$@" >&3
        return
    fi
    if "$@" </dev/null 2>"$temp/said"; then return; else code=$?; fi
    why=$(grep -E 'ERROR|rror:|failed with|NOT_FOUND' "$temp/said" || tail -n 3 "$temp/said")
    complain "$(printf '%s' "$why" | tr -s '\n\t ' '   ' | cut -c 1-600) (status $code of: $(quoted "$@"))"
    return 1
}

tpus() {
    call gcloud compute tpus "$@" "--project=$project" "--zone=$zone" --quiet
}

# One word that gcloud knows of the node; NOT_FOUND where there is none.
ask() {
    if [ -n "$dry" ]; then
        tpus "$@"
        case $1-$pretended in
            queued-resources-READY) echo ACTIVE ;;
            queued-resources-PREEMPTED) echo SUSPENDED ;;
            *) echo "$pretended" ;;
        esac
        return
    fi
    tpus "$@" 2>"$temp/asked" && return
    grep -q -i -E 'NOT_FOUND|was not found' "$temp/asked" && echo NOT_FOUND && return
    cat "$temp/asked" >&2
    return 1
}

look() {
    state=ACTIVE
    if [ -n "$queued" ]; then
        state=$(ask queued-resources describe "$name" '--format=value(state.state)') || return 1
    fi
    [ "$state" != ACTIVE ] || state=$(ask tpu-vm describe "$name" '--format=value(state)')
}

pause() {
    [ -z "$dry" ] || return 0
    sleep "$every" & # in the background, so that a signal is heard at once
    sleeper=$!
    wait "$sleeper"
    sleeper=''
}

on_workers() {
    remote=$1
    shift
    set -- tpu-vm ssh "$name" --worker=all "--command=$remote" "$@"
    eval "tpus \"\$@\" $ssh_flags"
}

create() {
    say "creating $name: $accelerator, $runtime${queued:+, queued}${spot:+, spot}"
    begun='' doubtful='' making=yes # what is interrupted here may be there or not
    if [ -n "$queued" ]; then
        set -- queued-resources create "$name" "--node-id=$name" "--accelerator-type=$accelerator" "--runtime-version=$runtime"
    else
        set -- tpu-vm create "$name" "--accelerator-type=$accelerator" "--version=$runtime"
    fi
    eval "tpus \"\$@\" $spot $create_flags" && begun=$name
    making=''
    if [ -z "$begun" ]; then
        doubtful=yes
        return 1
    fi
    [ -z "$queued" ] || await
}

# Until a queued node is there.
await() {
    pretended=READY
    while look; do
        case $state in
            READY) return ;;
            PREEMPTED | TERMINATED | SUSPENDED | FAILED)
                complain "the node $name is $state: expected it to become READY"
                return 1
                ;;
        esac
        pause
    done
    return 1
}

# A git bundle carries the commit that is checked out here, so that every start notes its revision.
setup() {
    say "setting up all workers of $name"
    if [ -n "$repo" ]; then
        source=$(quoted "$repo" "${ref:-HEAD}")
    else
        [ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || say "uncommitted changes stay here: the workers get the last commit"
        bundle=$root/runs/$name.bundle source="../dmf.bundle HEAD"
        [ -n "$dry" ] || bundle=$root/runs/$name.$$.bundle # another process may copy its own
        call mkdir -p "$root/runs" && call git -C "$root" bundle create "$bundle" HEAD || return 1
        eval "tpus tpu-vm scp \"\$bundle\" \"\$name:dmf.bundle\" --worker=all $ssh_flags" || return 1
    fi
    on_workers "git init -q dmf && cd dmf && git fetch -q $source && git checkout -q --detach FETCH_HEAD && ./launch/cloud/worker.sh install tpu"
}

# A program that is not on all workers is on none; another one that runs there is left alone.
run() {
    say "starting the program on all workers of $name"
    on_workers "cd dmf && ./launch/cloud/worker.sh start $(quoted "$@")" && begun='' && return
    on_workers "cd dmf && ./launch/cloud/worker.sh stop $(quoted "$@")"
    return 1
}

remove() {
    say "deleting $name"
    if [ -n "$queued" ]; then
        tpus queued-resources delete "$name" --force || return 1
    else
        tpus tpu-vm delete "$name" || return 1
    fi
    begun=''
}

fresh() {
    create && setup && run "$@"
}

# `look`, and if the node is there, what its workers say, as lines in $workers and one word in $all.
survey() {
    look || return 1
    workers='' all=none
    [ "$state" = READY ] || return 0
    # shellcheck disable=SC2016 # it is the worker that knows its name
    workers=$(on_workers 'if cd dmf 2>/dev/null; then ./launch/cloud/worker.sh status; else echo "worker $(uname -n): none"; fi') || return 1
    [ -z "$dry" ] || workers='worker 0: ended'
    words="|$(printf '%s\n' "$workers" | sed -n 's/^\(worker [^ ]*\): failed 2:.*/\1: refused/; s/^worker [^ ]*: \([a-z]*\).*/\1/p' | tr '\n' '|')"
    # $all is the first of these that some worker says. A worker that runs will end soon if others
    # do not run. If one fails otherwise, the others' status 2 only follows from it.
    for all in running lost failed refused halted stopped none ended unknown; do
        case $words in *"|$all|"*) return ;; esac
    done
}

collect() {
    [ -n "$out" ] && [ "$all" != none ] || return 0
    call mkdir -p "$out/$folder"
    on_workers 'cd dmf && ./launch/cloud/worker.sh log' "--output-directory=$out/$folder"
}

# One look and what follows from it. Returns 0 to go on, 1 after a failure that may pass, 2 where it will not, 3 at the end.
attend() {
    survey || return 1
    say "$name is $state${workers:+; $(printf '%s' "$workers" | tr '\n' ';')}"
    [ -z "$workers" ] || collect || : # it says so itself; the run matters more than its output
    case $state in
        NOT_FOUND) again fresh "$@" ;;
        PREEMPTED | TERMINATED | SUSPENDED) again renew "$@" ;;
        FAILED | STOPPED) return 2 ;;
        READY) mind "$@" ;;
    esac
}

renew() {
    say "if it was preempted: a node cannot be started again, so another takes its place and the run goes on from its work directory"
    remove && fresh "$@"
}

again() {
    folder=$((folder + 1))
    "$@" && return
    # A zone without free TPUs is waited for, however long.
    ! grep -q -i 'no more capacity' "$temp/said" 2>/dev/null || return 0
    return 1
}

# The node is there: what about the program?
mind() {
    case $all in
        running)
            begun='' tries=$crashes # failed calls are counted anew, crashes are not
            return 0
            ;;
        ended) return 3 ;;
        halted | refused) return 2 ;; # by tpu.sh stop; or an error that the same command would meet again
        stopped) again run "$@" ;;
        none) setup && again run "$@" ;;
        failed | lost | unknown) # started again, and counted
            crashes=$((crashes + 1))
            [ "$tries" -lt "$retries" ] && again run "$@"
            return 1
            ;;
    esac
}

watch() {
    tries=0 crashes=0 folder=0
    while [ -n "$out" ] && [ -d "$out/$((folder + 1))" ]; do folder=$((folder + 1)); done
    pretended=PREEMPTED
    while :; do
        attend "$@"
        case $? in
            0) ;;
            1) tries=$((tries + 1)) ;;
            2)
                begun=$name
                complain "$name is $state${workers:+, $(printf '%s' "$workers" | tr '\n' ';')}: expected a run that goes on"
                return 1
                ;;
            *) break ;;
        esac
        if [ "$tries" -gt "$retries" ]; then
            [ "$state" = NOT_FOUND ] || begun=$name
            complain "gave up on $name, which is $state${workers:+, $(printf '%s' "$workers" | tr '\n' ';')}: expected at most --retries=$retries failures"
            return 1
        fi
        [ -z "$dry" ] || say "then every $every seconds, until all workers say that it has ended:"
        pretended=READY
        pause
    done
    say "the run has ended"
    [ -z "$delete_when_done" ] || remove
}

status() {
    pretended=READY
    survey || return 1
    [ -n "$dry" ] || printf '%s: %s\n%s\n' "$name" "$state" "$workers" | sed '/^$/d'
}

logs() {
    if [ -z "$out" ]; then
        on_workers 'cd dmf && ./launch/cloud/worker.sh log 50'
        return
    fi
    call mkdir -p "$out" && on_workers 'cd dmf && ./launch/cloud/worker.sh log' "--output-directory=$out" || return 1
    say "the output of each worker is in $out"
}

# However the script ends: nothing of its own goes on, and a node that it made for nothing is deleted or named.
finish() {
    ended=$?
    trap '' INT TERM
    [ -z "$sleeper" ] || kill "$sleeper" 2>/dev/null
    if [ "$ended" -ne 0 ] && [ "$ended" -le 128 ] && [ -n "$doubtful" ] && [ -z "$begun" ]; then
        look 2>/dev/null
        [ "$state" = NOT_FOUND ] || making=yes
    fi
    if [ "$ended" -ne 0 ] && [ -n "$begun$making" ]; then
        if [ -z "$delete_on_failure" ] || [ -z "$begun" ] || ! remove; then
            complain "the TPU $name ${making:+may exist}${begun:+exists} in $zone and costs money; delete it: $(
                quoted launch/cloud/tpu.sh delete "--name=$name" "--project=$project" "--zone=$zone" ${queued:+--queued}
            )"
        fi
    elif [ "$ended" -gt 128 ] && [ "$verb" = watch ]; then
        say "nobody watches over $name now, which is left as it is; the same command does so again"
    fi
    [ -n "$dry" ] || rm -f "$root/runs/$name.$$.bundle"
    rm -rf "$temp"
    exit "$ended"
}

need() {
    eval "value=\$$1"
    [ -n "$value" ] || fail "--$1 is missing: expected it, such as --$1=$2, or DMF_$(printf '%s' "$1" | tr '[:lower:]' '[:upper:]'), with $verb"
}

# What every node has, and what this verb needs besides.
check() {
    need name dmf && need project my-project && need zone us-west4-a
    case $name in -* | *[!A-Za-z0-9_-]*) fail "--name=$name: expected letters, digits and hyphens, as Google Cloud takes them" ;; esac
    case $verb in create | up | watch)
        need accelerator v5litepod-16
        if [ -z "$runtime" ]; then
            case $accelerator in
                v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
                v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
                v5p-*) runtime=v2-alpha-tpuv5 ;;
                v6e-*) runtime=v2-alpha-tpuv6e ;;
                *) fail "--accelerator=$accelerator: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a number, or --runtime with it" ;;
            esac
        fi
        ;;
    esac
    case $verb in run | up | watch)
        need workdir gs://my-bucket/run
        case $workdir in
            gs://?*/?* | /*) ;;
            *) fail "--workdir=$workdir: expected gs://BUCKET/NAME or the absolute path of a disk that all workers share; others are lost with the node" ;;
        esac
        ;;
    esac
    for value in "$every" "$retries"; do
        case $value in '' | *[!0-9]*) fail "$value: expected a whole number for --every and --retries" ;; esac
    done
    [ -z "$ref" ] || [ -n "$repo" ] || fail "--ref=$ref without --repo: expected both; without them this checkout's commit is taken"
    [ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is missing: expected the Google Cloud SDK in PATH"
}

verb=${1:-help}
[ $# -eq 0 ] || shift
while [ $# -gt 0 ]; do
    case $1 in
        --name=* | --project=* | --zone=* | --workdir=* | --accelerator=* | --runtime=* | --repo=* | --ref=* | --out=* | --every=* | --retries=*)
            option=${1%%=*}
            value=${1#*=}
            eval "${option#--}=\$value"
            ;;
        --queued) queued=yes ;;
        --dry-run) dry=yes ;;
        --delete-on-failure) delete_on_failure=yes ;;
        --delete-when-done) delete_when_done=yes ;;
        --spot) spot=--spot ;;
        --create-flag=*) create_flags="$create_flags $(quoted "${1#*=}")" ;;
        --ssh-flag=*) ssh_flags="$ssh_flags $(quoted "${1#*=}")" ;;
        --)
            shift
            break
            ;;
        *) fail "$1: expected an option of launch/cloud/tpu.sh, or flags of main.py after --; see launch/cloud/tpu.sh help" ;;
    esac
    shift
done
case $verb in
    help | --help | -h) usage "$0" && exit ;;
    create | setup | run | up | watch | status | logs | stop | delete) ;;
    *) fail "$verb: expected create, setup, run, up, watch, status, logs, stop or delete; see launch/cloud/tpu.sh help" ;;
esac
check
case $verb in run | up | watch)
    [ $# -gt 0 ] || fail "no flags of main.py: expected them after --, such as -- --config=configs/cifar10.py"
    mode=train before=''
    for word in "$@"; do
        case $word in --mode=* | -mode=*) mode=${word#*=} ;; esac
        case $before in --mode | -mode) mode=$word ;; esac
        before=$word
    done
    case $mode in
        train) set -- "--workdir=$workdir" --distributed "$@" ;; # which only training knows
        *) set -- "--workdir=$workdir" "$@" ;;
    esac
    ;;
esac
temp=$(mktemp -d)
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
case $verb in
    create) create && begun='' ;;
    up) fresh "$@" ;;
    stop) on_workers 'cd dmf && ./launch/cloud/worker.sh stop' ;;
    delete) remove ;;
    *) "$verb" "$@" ;;
esac
