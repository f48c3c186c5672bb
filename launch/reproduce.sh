#!/bin/sh
# The command behind every number and picture of the README and of docs.
#
#   launch/reproduce.sh --list    all of them
#   launch/reproduce.sh NAME      make the environment and run the commands of that name
#   launch/reproduce.sh --dry-run NAME    only print them
set -eu
cd "$(dirname "$0")/.."
. launch/shell.sh

# name | what it shows | where it is stored | time | extra | command
# The extra is parity (requirements-parity.txt) or tpu (jax[tpu]).
# A name may have several commands; they run in this order.
entries() {
    cat <<'END'
demo | scores and pictures of the digits demo | docs/digits.png | 4 minutes on 2 cores | | python main.py --config=configs/digits.py --workdir=runs/digits
demo | | docs/digits.png | | | cp runs/digits/samples.png docs/digits.png
tests | that all checks pass, in under 20 minutes | | 20 minutes on 2 cores | | ./launch/test.sh
digits_table | docs/results.md: the table | docs/digits_table.json | | | python launch/tables/digits_table.py --seeds=0,1,2 --out=docs/digits_table.json
torch_fidelity | docs/scores.md: the differences to torch-fidelity, and the speed | docs/against_torch_fidelity.json | | parity | python launch/tables/against_torch_fidelity.py --count=5000
benchmark_digits | docs/performance.md: the digits' transformer | docs/benchmark_digits_cpu.json | | | python main.py --mode=benchmark --config=configs/digits.py --out=docs/benchmark_digits_cpu.json
benchmark_dit | docs/performance.md: four blocks of SiT-S/2 | docs/benchmark_dit_cpu.json | | | python main.py --mode=benchmark --config=configs/imagenet256.py:S --config.data.mock --config.batch_size=8 --config.network.depth=4 --out=docs/benchmark_dit_cpu.json
pytorch | docs/performance.md: PyTorch's time by ours | docs/against_pytorch.json | | parity | python launch/tables/against_pytorch.py --depth=4 --dit_batch=8 --channels=32 --blocks=1 --size=16 --unet_batch=8 --rounds=5 --out=docs/against_pytorch.json
pytorch | docs/performance.md: one-step generation, one output of three | docs/against_pytorch_sampling.json | | parity | python launch/tables/against_pytorch.py --sampling --depth=12 --width=768 --heads=12 --dit_batch=4 --rounds=21 --out=docs/against_pytorch_sampling.json
kills | docs/runs.md: the same bits after kills | docs/kills.json | 10 minutes on 2 cores | | python launch/tables/kills.py --kills=100 --out=docs/kills.json
edits | docs/runs.md: edits of the JSON of a run | docs/edits.json | 20 minutes on 2 cores | | python launch/tables/edits.py --count=400 --out=docs/edits.json
places | docs/runs.md: full disks and missing rights | docs/places.json | 8 minutes on 2 cores, as root | | python launch/tables/places.py --out=docs/places.json
start_times | docs/performance.md: first and later starts | docs/start_times.json | 5 minutes on 2 cores | | python launch/tables/start_times.py --out=docs/start_times.json
memory | docs/memory.md: what a run needs | docs/memory.json | | | python launch/tables/memory_table.py --out=docs/memory.json
tpu_plan | docs/scaling.md: SiT-XL/2 | docs/tpu_plan.json | | tpu | python main.py --mode=plan --out=docs/tpu_plan.json --topology=v5e-16,v4-32 --config=configs/imagenet256.py --config.compute_dtype=bfloat16 --config.scan_blocks --config.remat=blocks --config.mesh.fsdp=0
tpu_plan | the same, a copy of the state on each device | docs/tpu_plan.json | | tpu | python main.py --mode=plan --out=docs/tpu_plan.json --topology=v5e-16,v4-32 --config=configs/imagenet256.py --config.compute_dtype=bfloat16 --config.scan_blocks --config.remat=blocks
tpu_plan | the CIFAR U-Net | docs/tpu_plan.json | 2 to 4 minutes a row on 2 cores | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python main.py --mode=plan --out=docs/tpu_plan.json --topology=v5e-16,v4-32 --config=configs/cifar10.py --config.compute_dtype=bfloat16
tpu_plan | the same, its state split | docs/tpu_plan.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python main.py --mode=plan --out=docs/tpu_plan.json --topology=v5e-16,v4-32 --config=configs/cifar10.py --config.compute_dtype=bfloat16 --config.mesh.replica=1 --config.mesh.fsdp=0
tpu_table | docs/performance.md: programs for TPUs beside the official step | docs/tpu_table.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python launch/tables/tpu_table.py --cases=dit_b4_256 --topology=v5e-8 --depth=1 --out=docs/tpu_table.json
tpu_table | batch 1,024, and SiT-XL/2 with FSDP | docs/tpu_table.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python launch/tables/tpu_table.py --cases=dit_b4_1024,sit_xl2_256_fsdp --topology=v5e-8 --depth=1 --out=docs/tpu_table.json
tpu_table | a v4-8 | docs/tpu_table.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python launch/tables/tpu_table.py --cases=dit_b4_256 --topology=v4-8 --methods= --depth=1 --kinds=jvp,official --rows=split --out=docs/tpu_table.json
tpu_table | the same with 2 blocks | docs/tpu_table.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python launch/tables/tpu_table.py --cases=dit_b4_256 --topology=v5e-8 --depth=2 --out=docs/tpu_table.json
tpu_table | the same with 3 blocks | docs/tpu_table.json | | tpu | JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 python launch/tables/tpu_table.py --cases=dit_b4_256 --topology=v5e-8 --depth=3 --out=docs/tpu_table.json
study | docs/study.md: the study of variants | docs/study.json, docs/study.png | 1 hour 40 minutes on 2 cores | | python launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md
family | docs/family.md: each method from one flow model | docs/family.json, docs/family.png | 3 minutes a method on 2 cores | | python launch/tables/family.py --out=docs/family.json --picture=docs/family.png --docs=docs/family.md
toy | docs/family.md: two public benchmarks in the plane | docs/toy.json, docs/toy.png | 20 minutes a row of the checkerboard | | python launch/tables/toy.py --out=docs/toy.json --plot=docs/toy.png --docs=docs/family.md
END
}

# A field of every entry, from 1, of the entries of a name.
fields() {
    entries | awk -F ' *[|] *' -v name="$1" -v field="$2" '$1 == name { print $field }'
}

list() {
    entries | awk -F ' *[|] *' '
        $1 != before {
            printf "%s%s\n    %s", (NR > 1 ? "\n" : ""), $1, $2
            printf "%s%s\n", ($3 == "" ? "" : ": " $3), ($4 == "" ? "" : " (" $4 ")")
        }
        { print "    $ " $6; before = $1 }'
}

dry=''
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi
name=${1:---help}
case $name in
    --list) list && exit ;;
    --help | -h) usage launch/reproduce.sh && exit ;;
esac
names=$(entries | awk '{ print $1 }' | uniq | tr '\n' ' ')
[ -n "$(fields "$name" 1)" ] || fail "$name: expected one of ${names}or --list"
commands=$(mktemp)
fields "$name" 6 >"$commands"
trap 'rm -f "$commands"' EXIT
if [ -n "$dry" ]; then
    cat "$commands"
    exit
fi

extra=$(fields "$name" 5 | sed -n 1p)
requirements="requirements.txt"
# shellcheck disable=SC2034 # it is read by what is sourced
[ "$extra" != tpu ] || accelerator=tpu
. launch/environment.sh
if [ "$extra" = parity ]; then
    requirements="requirements-parity.txt"
    . launch/environment.sh
fi
PATH=$(pwd)/.venv/bin:$PATH
export PATH
exec 3<"$commands" # the commands keep their own input
while read -r command <&3; do
    printf '$ %s\n' "$command" >&2
    sh -c "$command" || fail "$name ends here (status $?): $command"
done
