"""Train, sample, score, time or plan a one-step generator; encode its data; bring weights in from PyTorch, and take them back.

    python main.py --config=configs/digits.py --workdir=runs/digits              train, or go on training
    python main.py --mode=sample --workdir=runs/digits --steps=1 --out=grid.png  a grid of samples
    python main.py --mode=score --workdir=runs/digits --steps=1,2,4,32           scores of a trained model
    python main.py --mode=reference --protocol=cifar10 --source=tfds:cifar10 --features=inception --out=cifar10.npz
    python main.py --mode=score --workdir=runs/cifar10 --protocol=cifar10 --features=inception --reference=cifar10.npz
    python main.py --mode=encode --source=tfds:imagenet2012 --vae=sd_vae --out=latents       images to latents on disk
    python main.py --mode=benchmark --config=configs/digits.py                   step times side by side
    python main.py --mode=plan --config=configs/imagenet256.py --topology=v5e-16 the steps compiled for TPUs that are not here
    python main.py --mode=convert --kind=sit --source=SiT-XL-2-256x256.pt --out=sit_xl2   a checkpoint from a PyTorch file
    python main.py --config=configs/imagenet256.py --config.init=sit_xl2 --config.data.data_dir=latents   the curriculum
    python main.py --mode=export --workdir=runs/imagenet256 --out=u.safetensors  torch-named weights of a checkpoint
    python main.py --mode=export --workdir=runs/digits --out=model --steps=1,4   a model folder to share; .onnx: ONNX
    python main.py --config=configs/cifar10.py --config.curriculum.q=4           any field of a config is a flag

Running a training command again resumes it; SIGTERM makes it save and end. Fields and their meaning: dmf/config.py.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from dmf.errors import DmfError
from dmf.run import sigterm
from dmf.storage import paths

if TYPE_CHECKING:
    from dmf.config import Config

STARTED = time.monotonic()
STOP: sigterm.Stop | None = None

# Kinds of weight files; dmf.convert.command has the same (a test compares them), but --help should load no jax.
KINDS = {
    "sit": "SiT S/B/L/XL (PyTorch)",
    "meanflow_dit": "official MeanFlow on latents (Flax msgpack)",
    "meanflow_unet": "MeanFlow CIFAR-10 U-Net, or a flow model in the same network (PyTorch)",
    "edm": "EDM and ECT networks, VP DDPM++ or VE NCSN++ (pickle)",
    "rectified_flow": "rectified flow on CIFAR-10 (score_sde layout)",
    "torchcfm": "TorchCFM CIFAR-10 U-Net",
    "sd_vae": "Stable Diffusion autoencoder",
    "fid_inception": "InceptionV3 for FID",
    "dinov2": "DINOv2 ViT-S/B/L for FD-DINOv2",
    "dmf": "a file that --mode=export has written in our own layout",
}
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional variant: configs/digits.py:linear."
)
NAMES = [
    "train",
    "sample",
    "score",
    "reference",
    "encode",
    "benchmark",
    "plan",
    "convert",
    "export",
]
MODE = flags.DEFINE_enum("mode", "train", NAMES, "What to do.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, or gs://BUCKET/FOLDER: written by train (default: runs/ and the config's name), read by sample, "
    "score and export, which also take a converted directory.",
)
STEPS = flags.DEFINE_list(
    "steps", ["1"], "Sampling steps, comma-separated (sample, score, export)."
)
COUNT = flags.DEFINE_integer(
    "count",
    0,
    "Number of images; default: 64 for sample; for score the config's, the protocol's or all of --source; all for reference.",
    lower_bound=0,
)
SAMPLER = flags.DEFINE_enum(
    "sampler", "", ["", "few_step", "euler", "heun"], "Default: the run's (sample, score, export)."
)
OUT = flags.DEFINE_string(
    "out",
    "",
    "What to write: PNG for sample (default: beside the weights), JSON for score (by protocol, default: scores_*.json beside "
    "the weights, or here with --source), benchmark and plan, .npz for reference, a directory for encode and convert, "
    "for export .safetensors or .pt (weights), .onnx (the sampler) or a model folder.",
)
EMA = flags.DEFINE_list(
    "ema",
    [],
    "Half-life in images of the average to take, 0 = raw weights; default: the run's; several, comma-separated, for score by a "
    "protocol (sample, score, export).",
)
VAE = flags.DEFINE_string(
    "vae",
    "",
    "Converted autoencoder's directory: latents to images, or back (sample, score, encode).",
)
PROTOCOL = flags.DEFINE_string(
    "protocol",
    "",
    "Rules of a score: cifar10, adm-imagenet256, meanflow-imagenet256, edm, edm2-dinov2, or a .json of your own; without it, "
    "digits are scored by their own (score, reference).",
)
FEATURES = flags.DEFINE_string(
    "features", "", "Directory of the protocol's converted feature network (score, reference)."
)
REFERENCE = flags.DEFINE_string(
    "reference",
    "",
    "Reference statistics: ours, ADM, EDM, EDM2, MeanFlow, clean-fid, dgm-eval (score).",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One process of a TPU pod, of Slurm or Open MPI; else see JAX_COORDINATOR_ADDRESS in README (train).",
)
ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_change",
    False,
    "Go on with another config than the run in --workdir had so far; noted there (train).",
)
TOPOLOGY = flags.DEFINE_list(
    "topology",
    [],
    "TPUs to compile for, comma-separated, such as v4-32,v5e-16, or in libtpu's names, such as v5e:4x4 (plan).",
)
SEED = flags.DEFINE_integer(
    "seed",
    None,
    "Of noise and drawn labels; default: the run's (score).",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Only hold every file of encoded latents in --out against its checksum (encode).",
)
BATCH = flags.DEFINE_integer(
    "batch", 16, "Images encoded at once, on each device (encode).", lower_bound=1
)
SELFCHECK = flags.DEFINE_bool(
    "selfcheck", False, "Only hold the features against known answers, and stop (score)."
)
SPLIT = flags.DEFINE_string(
    "split", "train", "Split of a tfds: source, such as validation (score, reference, encode)."
)
DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Where TFDS has prepared a tfds: source (score, reference, encode)."
)
SIZE = flags.DEFINE_integer(
    "size",
    None,
    "Centre crop to this size by ADM's rule; default: 256 for encode, none for reference.",
    lower_bound=1,
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of stored latents (encode).")
KIND = flags.DEFINE_enum(
    "kind",
    None,
    list(KINDS),
    "Kind of weights (convert), or layout to write (export; default: where they came from). "
    + "; ".join(f"{name}: {about}" for name, about in KINDS.items()),
)
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "File to convert: .pt, .pth, .bin, .ckpt, .pkl, .safetensors, Flax msgpack; or images to encode, to score in the place of "
    "a checkpoint's, or to make a reference of: a folder, an .npz with arr_0, or tfds:NAME.",
)
COPY = flags.DEFINE_string(
    "copy",
    "",
    "Which copy of the weights, where a file holds several; default: the kind's (convert).",
)
SET = flags.DEFINE_list(
    "set", [], "Fields of the network that the file does not tell, such as heads=4 (convert)."
)
UPLOAD = flags.DEFINE_string(
    "upload", "", "NAME/REPO of the Hugging Face Hub, for a copy of the model folder (export)."
)
CHECK = flags.DEFINE_string(
    "check",
    "auto",
    "Forward check: auto = against PyTorch where installed, none, or an .npz of inputs and outputs (convert).",
)
ALIGN_STEPS = flags.DEFINE_integer(
    "align_steps",
    0,
    "Steps of a short regression that gives a U-Net trained on log sigma or scaled times an embedding of the raw time; "
    "10000 is usual (convert).",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    """One mode, after the flags have been read."""
    if len(argv) > 1:
        raise DmfError(
            f"argument {argv[1]!r}: expected only flags, such as --config=configs/digits.py"
        )
    _check_flags()
    gc.set_threshold(
        100_000, 50
    )  # tracing makes very many objects that stay: looked through less often, .8 x the time
    logging.set_verbosity(logging.WARNING)
    MODES[MODE.value]()


def train() -> None:
    from dmf import processes

    config, stop = _config(), STOP or sigterm.listen()
    processes.start(DISTRIBUTED.value)
    if processes.several():
        stop.share(processes.Board())
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks for all; errors still go to stderr
    from dmf.run.workdir import keep_programs
    from dmf.train import train as run

    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = (
        WORKDIR.value or f"runs/{path.rpartition('/')[2].replace('.py', '').replace(':', '_')}"
    )
    keep_programs(paths.at(workdir))
    run(config, workdir, STARTED, ALLOW_CHANGE.value, stop)


def sample() -> None:
    from dmf.evaluation.sampling import write_samples

    write_samples(
        _need(WORKDIR, "workdir"),
        _steps(),
        COUNT.value or 64,
        SAMPLER.value,
        _out(".png"),
        _ema(),
        VAE.value,
    )


def score() -> None:
    what = (
        "own"
        if not PROTOCOL.value
        else "selfcheck"
        if SELFCHECK.value
        else "images"
        if SOURCE.value
        else "checkpoint"
    )
    _check_read(SCORE_FLAGS[what], SCORED[what], ", or --protocol with it" * (what == "own"))
    if what == "own":
        from dmf.evaluation.sampling import write_scores

        write_scores(
            _need(WORKDIR, "workdir"), _steps(), COUNT.value, SAMPLER.value, _out(".json"), _ema()
        )
        return
    from dmf.evaluation import scoring

    setting = _setting()
    if what == "selfcheck":
        scoring.self_check(setting)
    elif what == "images":
        scoring.score_images(
            _need(SOURCE, "source"), setting, _out(".json"), DATA_DIR.value, SPLIT.value
        )
    else:
        path, out = _need(WORKDIR, "workdir"), _out(".json")
        scoring.score_checkpoint(
            path, setting, _steps(), _emas(), SAMPLER.value, SEED.value, VAE.value, out
        )


def reference() -> None:
    from dmf.evaluation.scoring import make_reference

    if not PROTOCOL.value:
        raise DmfError("--protocol is missing: expected it with --mode=reference; see --help")
    source, out = _need(SOURCE, "source"), _needed_out("the .npz to write")
    make_reference(source, _setting(), out, DATA_DIR.value, SPLIT.value, SIZE.value or 0)


def encode() -> None:
    from dmf.convert.encode import encode as run
    from dmf.convert.encode import verify

    if VERIFY.value:
        verify(_needed_out("the directory of encoded latents"))
        return
    source, out = _need(SOURCE, "source"), _needed_out("the directory to make")
    if not VAE.value:
        raise DmfError(
            "--vae is missing: expected the directory of a converted autoencoder (--mode=convert --kind=sd_vae)"
        )
    run(
        VAE.value,
        source,
        out,
        size=SIZE.value or 256,
        batch=BATCH.value,
        dtype=DTYPE.value,
        data_dir=DATA_DIR.value,
        split=SPLIT.value,
    )


def benchmark() -> None:
    from dmf.measure.benchmark import benchmark as run

    run(_config(), _out(".json"))


def plan() -> None:
    from dmf.measure.tpu_plan import plan as run

    if not TOPOLOGY.value:
        raise DmfError(
            "--topology is missing: expected TPUs to compile for with --mode=plan, such as v5e-16; see --help"
        )
    run(
        _config(),
        TOPOLOGY.value,
        _out(".json"),
        config_flags.get_config_filename(flags.FLAGS["config"]),
    )


def convert() -> None:
    from dmf.convert.command import convert as run
    from dmf.convert.command import given

    kind, source, out = (
        _need(KIND, "kind"),
        _need(SOURCE, "source"),
        _needed_out("the directory to make"),
    )
    run(
        kind,
        source,
        out,
        copy=COPY.value,
        given=given(SET.value),
        check=CHECK.value,
        align_steps=ALIGN_STEPS.value,
    )


def export() -> None:
    from dmf.export.command import READS, form
    from dmf.export.command import export as run

    workdir, out = (
        _need(WORKDIR, "workdir"),
        _needed_out("a .safetensors, .pt or .onnx file or a model folder to write"),
    )
    _check_read(READS[form(out)], form(out))
    run(
        workdir,
        out,
        kind=KIND.value or "",
        ema=_ema(),
        steps=_steps(),
        sampler=SAMPLER.value,
        upload=UPLOAD.value,
    )


FLAGS = {
    "train": ("config", "workdir", "distributed", "allow_change"),
    "sample": ("workdir", "steps", "count", "sampler", "out", "ema", "vae"),
    "score": (
        "workdir",
        "steps",
        "count",
        "sampler",
        "out",
        "ema",
        "vae",
        "protocol",
        "features",
        "reference",
        "seed",
    )
    + ("selfcheck", "source", "split", "data_dir"),
    "reference": ("protocol", "features", "source", "split", "data_dir", "size", "count", "out"),
    "encode": ("source", "split", "data_dir", "size", "vae", "dtype", "batch", "verify", "out"),
    "benchmark": ("config", "out"),
    "plan": ("config", "topology", "out"),
    "convert": ("kind", "source", "out", "copy", "set", "check", "align_steps"),
    "export": ("workdir", "kind", "out", "ema", "steps", "sampler", "upload"),
}
# What a score is of -> how that is called, and the flags it reads.
SCORED = {
    "own": "a score without --protocol",
    "checkpoint": "the score of a checkpoint",
    "images": "the score of --source",
    "selfcheck": "--selfcheck",
}
SCORE_FLAGS = {
    "own": ("workdir", "steps", "count", "sampler", "out", "ema"),
    "checkpoint": (
        "workdir",
        "steps",
        "count",
        "sampler",
        "out",
        "ema",
        "vae",
        "protocol",
        "features",
        "reference",
        "seed",
    ),
    "images": ("source", "split", "data_dir", "count", "out", "protocol", "features", "reference"),
    "selfcheck": ("selfcheck", "protocol", "features", "reference"),
}
MODES = {
    **{"train": train, "sample": sample, "score": score, "reference": reference, "encode": encode},
    **{"benchmark": benchmark, "plan": plan, "convert": convert, "export": export},
}


def _setting() -> Any:
    from dmf.evaluation.scoring import Setting

    return Setting(PROTOCOL.value, FEATURES.value, REFERENCE.value, COUNT.value)


def _emas() -> list[float | None]:
    """The half-lives of --ema, [None] for the run's own."""
    try:
        values = [float(text) for text in EMA.value]
    except ValueError as error:
        raise DmfError(
            f"--ema={','.join(EMA.value)}: expected half-lives in images, such as 0,1.774e6"
        ) from error
    if not all(0 <= value < float("inf") for value in values):
        raise DmfError(f"--ema={','.join(EMA.value)}: expected half-lives in images of at least 0")
    return [*values] or [None]


def _ema() -> float | None:
    values = _emas()
    if len(values) > 1:
        raise DmfError(
            f"--ema={','.join(EMA.value)}: expected one half-life here; several need --mode=score with a --protocol"
        )
    return values[0]


def _needed_out(what: str) -> str:
    if not OUT.value:
        raise DmfError(f"--out is missing: expected {what} with --mode={MODE.value}; see --help")
    paths.local(OUT.value, f"as --out of --mode={MODE.value}")
    return OUT.value


def _steps() -> list[int]:
    if not STEPS.value or not all(n.isdigit() and int(n) > 0 for n in STEPS.value):
        raise DmfError(
            f"--steps={','.join(STEPS.value)}: expected positive whole numbers, such as 1,2,4"
        )
    return [int(n) for n in STEPS.value]


def _check_flags() -> None:
    """Refuses a flag that the mode would not read."""
    for name in sorted({name for names in FLAGS.values() for name in names}):
        if flags.FLAGS[name].present and name not in FLAGS[MODE.value]:
            raise DmfError(
                f"--{name} with --mode={MODE.value}: expected none, this mode does not read it"
            )


def _check_read(read: tuple[str, ...], what: str, hint: str = "") -> None:
    """Refuses a flag of the mode that this use of it would not read."""
    for name in FLAGS[MODE.value]:
        if flags.FLAGS[name].present and name not in read:
            raise DmfError(f"--{name} with {what}: expected none, it would not be read{hint}")


def _out(suffix: str) -> str:
    path = paths.local(OUT.value, "as --out")
    if OUT.value and (path.suffix != suffix or not path.parent.is_dir()):
        raise DmfError(
            f"--out={OUT.value}: expected a file name ending in {suffix}, in a directory that exists"
        )
    return OUT.value


def _config() -> Config:
    from dmf.config import parse  # imported after flag parsing, so that --help loads no jax

    values = _need(CONFIG, "config")
    try:
        return parse(values.to_dict())
    except OSError as error:  # a missing file is only noticed when the config is first read
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise DmfError(
            f"--config={path}: cannot be read; expected a config file such as configs/digits.py"
        ) from error


def _need(flag: flags.FlagHolder, name: str) -> Any:
    if flag.value is None:
        raise DmfError(f"--{name} is missing: expected it with --mode={MODE.value}; see --help")
    return flag.value


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its errors and those of the config file as one line each."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, SyntaxError) as error:
        from dmf.config import check_path

        fields = [
            a.partition("=")[0].lstrip("-") for a in argv if a.lstrip("-").startswith("config.")
        ]
        for path in fields:  # the flag parser says little of an unknown field
            check_path(path)
        text = " ".join(str(error).replace("\\n", " ").split())
        names = [
            path for path in fields if path.startswith("config.network.")
        ]  # all others are known by now
        if names and isinstance(error, AttributeError | KeyError):
            text = f"{', '.join(names)}: expected fields of this config's kind of network"
        raise DmfError(text) from error


def _stop(status: int, line: str) -> None:
    """Ends the process with one line, at once: an ordinary exit waits for other processes and for a program's compilation."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    if all(text.endswith("train") for text in sys.argv if text.lstrip("-").startswith("mode")):
        STOP = sigterm.listen()  # reading the flags takes seconds
    try:
        app.run(main, flags_parser=_parse_flags)
    except DmfError as error:
        _stop(2, f"error: {error}")
    except KeyboardInterrupt:
        goes_on = MODE.value in ("train", "score", "reference", "encode")
        _stop(130, "interrupted" + "; the same command goes on from what is on disk" * goes_on)
