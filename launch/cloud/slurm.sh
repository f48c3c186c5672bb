#!/bin/sh
#SBATCH --job-name=dmf
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
# A training run under Slurm. Each node has one process, which takes all GPUs of the job there.
# Call it from the repository's root:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 launch/cloud/slurm.sh [--dry-run] FLAGS
#
# FLAGS are main.py's, with a --workdir that all nodes see.
# Options of sbatch go before the script and win over the lines above.
#
# Slurm sends SIGTERM 300 seconds before the time limit, and on a preemption with grace time.
# The program then saves and leaves with status 0. If the run is not at its end, the job goes into
# the queue again and the same command resumes, at most DMF_REQUEUES (100) times.
# Slurm itself requeues after a failed node or a preemption without grace time.
# A program that fails ends the job with its status.
#
# DMF_CUDA=12|13|none is --cuda of launch/cloud/gpu.sh. DMF_PORT is where process 0 listens.
set -eu
root=${SLURM_SUBMIT_DIR:-.}
if [ ! -f "$root/launch/shell.sh" ]; then
    echo "error: $root/launch/shell.sh is missing: expected sbatch to be called in the repository's root" >&2
    exit 2
fi
cd "$root"
. launch/shell.sh
dry=''
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job: expected sbatch --nodes=1 --gpus-per-node=8 launch/cloud/slurm.sh FLAGS"
[ $# -gt 0 ] || fail "no flags of main.py: expected some, such as --config=configs/cifar10.py"

# One process is told nothing of others. The process' own number is known on its node alone.
tasks=${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}} # an older Slurm sets the first only where --ntasks is given
if [ "$tasks" -gt 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    [ -n "$first" ] || fail "scontrol show hostnames $SLURM_JOB_NODELIST names no node: expected those of the job"
    address=$first:${DMF_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # another one for another job on the same node
    # shellcheck disable=SC2016 # it is the node's shell that knows the number
    set -- "--export=ALL,JAX_COORDINATOR_ADDRESS=$address,JAX_NUM_PROCESSES=$tasks" \
        sh -c 'JAX_PROCESS_ID=$SLURM_PROCID; export JAX_PROCESS_ID; exec "$@"' dmf .venv/bin/python main.py "$@"
else
    set -- --export=ALL .venv/bin/python main.py "$@"
fi
set -- srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@"
if [ -n "$dry" ]; then
    quoted "$@"
    exit
fi

./launch/cloud/gpu.sh --cuda="${DMF_CUDA:-}" --install
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
trap '' TERM # Slurm tells the program itself; this shell has to see what it says
{
    "$@" && code=0 || code=$?
    echo "$code" >"$said/status"
} 2>&1 | tee "$said/output"
code=$(cat "$said/status")
[ "$code" -eq 0 ] || complain "the program failed (status $code of: $(quoted "$@"))"
if [ "$code" -ne 0 ] || ! grep -q '^stopped' "$said/output"; then # what main.py prints where it leaves before its end
    exit "$code"
fi

# A job that was cancelled, or that Slurm is requeueing by itself, runs no more.
now=$(squeue --noheader "--jobs=$SLURM_JOB_ID" --format=%T) || fail "squeue does not know job $SLURM_JOB_ID: expected its state"
if [ "$now" != RUNNING ]; then
    echo "job $SLURM_JOB_ID is ${now:-gone}: not put into the queue again"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${DMF_REQUEUES:-100}" ]; then
    fail "the run has not ended after ${SLURM_RESTART_COUNT:-0} requeues: expected an end within DMF_REQUEUES=${DMF_REQUEUES:-100}"
else
    echo "job $SLURM_JOB_ID goes on later: scontrol requeue $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID cannot be requeued: expected it to go on; submit the same command again"
fi
