r"""Do two commits train to the same bits?

    python launch/tables/bits.py --checkout=OLD --out=old.json
    python launch/tables/bits.py --out=new.json --against=old.json

Each call runs the same short curricula, conversions and export through the main.py of a checkout.
It writes one SHA-256 per result. With --against it names every result that differs and ends with 1.

Runs: every kind of stage, with and without guidance, on DiT and U-Net, digits and mock latents.
Some runs have two devices. One loses its newest checkpoints and resumes from an older one.
Hashed: parameters, averages, optimiser, table of intervals, and scores without their seconds.
Conversions: small files of tests/golden, the weights that come out, and one export.

Both checkouts need the same packages; they are run by the Python that runs this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))
CONFIG = """import json
from pathlib import Path
from dmf.config import complete

def get_config(name):
    return complete(json.loads((Path(__file__).parent / f"{name}.json").read_text()))
"""
KINDS = ["trajectory", "discrete", "jvp", "guided_discrete", "guided_jvp"]
RUN = dict(
    log_every_steps=1,
    checkpoint_every_steps=3,
    keep_checkpoints=9,
    sample_rows=2,
    score_samples=64,
    score_steps=[1, 2],
    tensorboard=False,
)
DIT: dict[str, Any] = dict(
    batch_size=32,
    network=dict(kind="dit", depth=2, width=64, heads=2, patch=2, num_classes=10),
    data=dict(name="digits"),
    times=dict(r_neq_t_fraction=0.75),
    loss=dict(p=0.5),
    label_dropout=0.25,
    guidance=dict(omega=2.0, kappa=0.25, t_start=0.1, t_end=0.9),
    curriculum=dict(stages=5, kinds=KINDS, length=10.0, length_unit="steps", pretrain_length=2.0),
    optimizer=dict(warmup_steps=2, clip_norm=1.0, weight_decay=0.01),
    ema=dict(halflife_images=[50.0, 800.0], rampup_ratio=0.5, evaluate=50.0),
    guard=dict(every_steps=4, rows=32, action="jvp", factor=1e6),
    run=RUN,
)
UNET = dict(
    kind="unet",
    channels=16,
    channel_mult=[1],
    blocks=1,
    attention_resolutions=[8],
    dropout=0.3,
    augment_dim=6,
)
PLAIN = dict(stages=3, length=6.0, length_unit="steps", pretrain_length=2.0)
NONE = dict(omega=1.0, kappa=0.0, t_start=0.0, t_end=1.0)


def changed(**changes: Any) -> dict[str, Any]:
    """The DiT's run with some sections updated, others replaced. A network is always replaced."""
    out = dict(DIT)
    for key, value in changes.items():
        update = isinstance(value, dict) and key != "network"
        out[key] = {**DIT.get(key, {}), **value} if update else value
    return out


RUNS: dict[str, dict[str, Any]] = {
    "dit": DIT,
    "dit_own_unit": changed(loss=dict(tangent="own", residual_scale="unit", p=1.0), microbatches=2),
    "dit_ema_adaptive": changed(
        loss=dict(tangent="ema"),
        curriculum=dict(interval="adaptive", schedule="smooth"),
    ),
    "dit_alpha": changed(
        loss=dict(product_rule=0.0),
        curriculum=dict(interval="floor", stage_lengths=[1.0, 3.0, 2.0, 2.0, 2.0]),
        compute_dtype="bfloat16",
        scan_blocks=True,
        remat="blocks",
    ),
    "unet": changed(
        network=UNET,
        data=dict(flip=True, augment=0.5),
        label_dropout=0.0,
        guidance=NONE,
        times=dict(pairing="min"),
        curriculum=dict(**PLAIN, kinds=[], interval="linear"),
    ),
    "latents": changed(
        network=dict(kind="dit", depth=1, width=64, heads=2, patch=8, num_classes=1000),
        data=dict(name="imagenet256_latents", mock=True, flip=True),
        times=dict(r_neq_t_fraction=0.25),
    ),
    "mlp": changed(
        network=dict(kind="mlp", width=32, depth=2),
        label_dropout=0.0,
        guidance=NONE,
        curriculum=dict(
            **PLAIN, kinds=[], switch_ema="reset", switch_optimizer="reset", switch_warmup_steps=2
        ),
    ),
    "fsdp": changed(mesh=dict(fsdp=2)),
}
DEVICES = {"fsdp": 2}
CONVERSIONS = {"sit": "sit_tiny_io", "meanflow_unet": "pymf_tiny_io", "sd_vae": "sd_vae_tiny_io"}
GIVEN = {"sit": "heads=2", "meanflow_unet": "", "sd_vae": "groups=8"}


def main() -> int:
    """Runs the cases, writes their hashes and compares them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=HERE, help="default: this one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of another checkout")
    parser.add_argument("--only", default="", help="names of cases, comma-separated")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "bits_config.py").write_text(CONFIG)
        for name in [*RUNS, *CONVERSIONS]:
            if only and name not in only:
                continue
            print(f"{name} ...", flush=True)
            if name in RUNS:
                found |= trained(args.checkout, work, name)
            else:
                found |= converted(args.checkout, work, name)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    return compare(found, json.loads(args.against.read_text())) if args.against else 0


def trained(checkout: Path, work: Path, name: str) -> dict[str, dict[str, str]]:
    """The hashes of one run, and of the same run once its newest checkpoints are gone."""
    (work / f"{name}.json").write_text(json.dumps(RUNS[name]))
    workdir = work / "runs" / name
    count = DEVICES.get(name, 1)
    flags = [f"--config={work / 'bits_config.py'}:{name}", f"--workdir={workdir}"]
    call(checkout, flags, count)
    found = {name: hashes(workdir)}
    if name == "dit":
        for step in (workdir / "checkpoints").glob("[0-9]*"):
            if int(step.name) > 4:
                shutil.rmtree(step)
        call(checkout, flags, count)
        found[f"{name} resumed"] = hashes(workdir)
        out = work / "exported.safetensors"
        call(checkout, ["--mode=export", "--kind=dmf", f"--workdir={workdir}", f"--out={out}"])
        found["export"] = {"tensors": tensors(out)}
    return found


def converted(checkout: Path, work: Path, kind: str) -> dict[str, dict[str, str]]:
    """The hash of the weights that a conversion writes; its file is made from a stored recipe."""
    import numpy as np
    from safetensors.numpy import save_file

    from tests.conversion import recipe_weights

    source, out = work / f"{kind}.safetensors", work / kind
    save_file(recipe_weights(np.load(HERE / f"tests/golden/{CONVERSIONS[kind]}.npz")), source)
    flags = ["--mode=convert", f"--kind={kind}", f"--source={source}"]
    given = [f"--set={GIVEN[kind]}"] if GIVEN[kind] else []
    call(checkout, [*flags, *given, f"--out={out}", "--check=none"])
    return {f"converted {kind}": {"weights": digest(arrays(out))}}


def call(checkout: Path, flags: list[str], devices: int = 1) -> None:
    """main.py of the checkout; what it prints is shown where it fails."""
    environment = dict(
        os.environ,
        PYTHONPATH=str(checkout),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    command = [sys.executable, "main.py", *flags]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def hashes(workdir: Path) -> dict[str, str]:
    """One hash per part of the last checkpoint, and one of the scores."""
    steps = [p for p in (workdir / "checkpoints").glob("[0-9]*")]
    last = max(steps, key=lambda p: int(p.name))
    parts: dict[str, dict[str, Any]] = {}
    for path, value in arrays(last).items():
        parts.setdefault(path.split("'")[1], {})[path] = value
    found = {part: digest(values) for part, values in parts.items()}
    scores = workdir / "scores.jsonl"
    if scores.exists():
        rows = [json.loads(line) for line in scores.read_text().splitlines()]
        # The name of stage 0 has changed since the first of these commits.
        kept = [{k: v for k, v in r.items() if k not in ("seconds", "kind")} for r in rows]
        found["scores"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


def arrays(folder: Path) -> dict[str, Any]:
    """Path -> array of everything in a checkpoint, read by Orbax alone."""
    # As many devices as a run may have had, or Orbax cannot place what was split over them.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(DEVICES.values())}"
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load_checkpointables(folder)
    leaves = jax.tree_util.tree_leaves_with_path(dict(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def tensors(path: Path) -> str:
    """The hash of the tensors of a .safetensors file; its metadata holds dates."""
    from safetensors.numpy import load_file

    return digest(load_file(path))


def digest(values: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        total.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return total.hexdigest()


def compare(mine: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> int:
    """Prints a line per result; 1 where one differs."""
    differs = 0
    for name, parts in mine.items():
        other = theirs.get(name, {})
        bad = [part for part in {**parts, **other} if parts.get(part) != other.get(part)]
        differs += bool(bad)
        print(f"{name:20} {'differs: ' + ', '.join(bad) if bad else 'same, ' + ', '.join(parts)}")
    return int(differs > 0)


if __name__ == "__main__":
    sys.exit(main())
