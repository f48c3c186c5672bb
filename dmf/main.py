"""The command line: one row of COMMANDS per command, with its flags and their parser.

`python main.py` and the installed command `dmf` both call `run`. dmf/help.txt says what the
flags mean; --help prints it below the table of commands.
"""

from __future__ import annotations

import gc
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from dmf.errors import DmfError
from dmf.fields import current_flags
from dmf.run import sigterm
from dmf.storage import paths

if TYPE_CHECKING:
    from dmf.config import Config

# Parsers import what they call, so that --help loads no jax.
STARTED = time.monotonic()
STOP: sigterm.Stop | None = None
HELP = {"--help", "-help", "--helpshort", "--helpfull", "-h", "-?"}

# The kinds of dmf.convert.kinds. They stand here too, as that file loads jax; a test compares both.
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
    "dmf": "a file that --mode=export wrote in our own layout",
}

# dmf/help.txt says what they mean.
CONFIG = config_flags.DEFINE_config_file("config", None, "")
WORKDIR = flags.DEFINE_string("workdir", None, "")
OUT = flags.DEFINE_string("out", "", "")
STEPS = flags.DEFINE_list("steps", ["1"], "")
SAMPLERS = ("few_step", "euler", "heun", "few_step_on_host")  # dmf.method.samplers loads jax too
SAMPLER = flags.DEFINE_enum("sampler", "", ["", *SAMPLERS], "")
EMA = flags.DEFINE_list("ema", [], "")
COUNT = flags.DEFINE_integer("count", 0, "", lower_bound=0)
SEED = flags.DEFINE_integer("seed", None, "", lower_bound=0, upper_bound=2**32 - 1)
VAE = flags.DEFINE_string("vae", "", "")
PROTOCOL = flags.DEFINE_string("protocol", "", "")
FEATURES = flags.DEFINE_string("features", "", "")
REFERENCE = flags.DEFINE_string("reference", "", "")
SELFCHECK = flags.DEFINE_bool("selfcheck", False, "")
SOURCE = flags.DEFINE_string("source", None, "")
SPLIT = flags.DEFINE_string("split", "train", "")
DATA_DIR = flags.DEFINE_string("data_dir", "", "")
SIZE = flags.DEFINE_integer("size", None, "", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "")
BATCH = flags.DEFINE_integer("batch", 16, "", lower_bound=1)
VERIFY = flags.DEFINE_bool("verify", False, "")
KIND = flags.DEFINE_enum("kind", None, list(KINDS), "")
COPY = flags.DEFINE_string("copy", "", "")
SET = flags.DEFINE_list("set", [], "")
CHECK = flags.DEFINE_string("check", "auto", "")
ALIGN_STEPS = flags.DEFINE_integer("align_steps", 0, "", lower_bound=0)
UPLOAD = flags.DEFINE_string("upload", "", "")
TOPOLOGY = flags.DEFINE_list("topology", [], "")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "")
ALLOW_CHANGE = flags.DEFINE_bool("allow_change", False, "")


@dataclass(frozen=True)
class Command:
    """A row of the table: what the command does, the flags that it reads, and their parser.

    parse: reads the flags and returns the command as a function. Raises DmfError for a wrong flag.
    """

    about: str
    flags: tuple[str, ...]
    parse: Callable[[], Callable[[], Any]]


def _train() -> Callable[[], Any]:
    config, stop = _config(), STOP or sigterm.listen()
    name = _config_file().rpartition("/")[2].replace(".py", "").replace(":", "_").replace(",", "_")
    return partial(_start, config, WORKDIR.value or f"runs/{name}", stop)


def _start(config: Config, workdir: str, stop: sigterm.Stop) -> None:
    """Joins the other processes, then trains."""
    from dmf import processes

    processes.start(DISTRIBUTED.value)
    if processes.several():
        stop.share(processes.Board())
    if not processes.is_first():  # one process speaks for all; errors still go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from dmf.evaluation.boundary import RunJudge
    from dmf.run.workdir import keep_programs
    from dmf.train import train

    keep_programs(paths.at(workdir))
    train(config, workdir, STARTED, ALLOW_CHANGE.value, stop, RunJudge)


def _sample() -> Callable[[], Any]:
    from dmf.evaluation.sampling import write_samples as call

    path, steps, count = _need(WORKDIR), _steps(), COUNT.value or 64
    return partial(call, path, steps, count, SAMPLER.value, _out(".png"), _ema(), VAE.value)


def _score() -> Callable[[], Any]:
    of_run = ("workdir", "steps", "count", "sampler", "out", "ema")
    by_protocol = ("protocol", "features", "reference")
    if not PROTOCOL.value:
        from dmf.evaluation.sampling import write_scores

        _check_read(of_run, "a score without --protocol", ", or --protocol with it")
        path, steps = _need(WORKDIR), _steps()
        return partial(write_scores, path, steps, COUNT.value, SAMPLER.value, _out(".json"), _ema())
    from dmf.evaluation import scoring

    setting = _setting()
    if SELFCHECK.value:
        _check_read(("selfcheck", *by_protocol), "--selfcheck")
        return partial(scoring.self_check, setting)
    if SOURCE.value:
        read = ("source", "split", "data_dir", "count", "out", *by_protocol)
        _check_read(read, "the score of --source")
        call, data = scoring.score_images, (DATA_DIR.value, SPLIT.value)
        return partial(call, SOURCE.value, setting, _out(".json"), *data)
    _check_read((*of_run, "vae", "seed", *by_protocol), "the score of a checkpoint")
    path, out, drawn = _need(WORKDIR), _out(".json"), (SAMPLER.value, SEED.value, VAE.value)
    return partial(scoring.score_checkpoint, path, setting, _steps(), _emas(), *drawn, out)


def _reference() -> Callable[[], Any]:
    from dmf.evaluation.scoring import make_reference as call

    _need(PROTOCOL)
    source, out = _need(SOURCE), _needed_out("the .npz to write")
    return partial(call, source, _setting(), out, DATA_DIR.value, SPLIT.value, SIZE.value or 0)


def _encode() -> Callable[[], Any]:
    from dmf.convert.encode import encode, verify

    if VERIFY.value:
        return partial(verify, _needed_out("the directory of encoded latents"))
    source, out = _need(SOURCE), _needed_out("the directory to make")
    vae = _need(VAE, " the directory of a converted autoencoder (--mode=convert --kind=sd_vae)")
    call = partial(encode, vae, source, out, data_dir=DATA_DIR.value, split=SPLIT.value)
    return partial(call, size=SIZE.value or 256, batch=BATCH.value, dtype=DTYPE.value)


def _benchmark() -> Callable[[], Any]:
    from dmf.measure.benchmark import benchmark

    return partial(benchmark, _config(), _out(".json"))


def _plan() -> Callable[[], Any]:
    from dmf.measure.tpu_plan import plan

    topologies = _need(TOPOLOGY, " TPUs to compile for, such as v5e-16,")
    return partial(plan, _config(), topologies, _out(".json"), _config_file())


def _convert() -> Callable[[], Any]:
    from dmf.convert.command import convert, given

    kind, source, out = _need(KIND), _need(SOURCE), _needed_out("the directory to make")
    call = partial(convert, kind, source, out, copy=COPY.value, given=given(SET.value))
    return partial(call, check=CHECK.value, align_steps=ALIGN_STEPS.value)


def _export() -> Callable[[], Any]:
    from dmf.export.command import READS, export, form

    path = _need(WORKDIR)
    out = _needed_out("a .safetensors, .pt or .onnx file or a model folder to write")
    _check_read(READS[form(out)], form(out))
    call = partial(export, path, out, kind=KIND.value or "", upload=UPLOAD.value)
    return partial(call, ema=_ema(), steps=_steps(), sampler=SAMPLER.value)


DRAWN = ("workdir", "steps", "count", "sampler", "out", "ema", "vae")
JUDGED = ("protocol", "features", "reference", "seed", "selfcheck", "source", "split", "data_dir")
COMMANDS = {
    "train": Command(
        "train a generator, or go on training it",
        ("config", "workdir", "distributed", "allow_change"),
        _train,
    ),
    "sample": Command("draw a grid of samples", DRAWN, _sample),
    "score": Command("score a trained model, or images", (*DRAWN, *JUDGED), _score),
    "reference": Command(
        "make the reference statistics of a score",
        ("protocol", "features", "source", "split", "data_dir", "size", "count", "out"),
        _reference,
    ),
    "encode": Command(
        "store images as latents of an autoencoder",
        ("source", "split", "data_dir", "size", "vae", "dtype", "batch", "verify", "out"),
        _encode,
    ),
    "benchmark": Command("time the training steps side by side", ("config", "out"), _benchmark),
    "plan": Command("compile the steps for absent TPUs", ("config", "topology", "out"), _plan),
    "convert": Command(
        "make a checkpoint from a file of others",
        ("kind", "source", "out", "copy", "set", "check", "align_steps"),
        _convert,
    ),
    "export": Command(
        "write weights, ONNX or a model folder from a checkpoint",
        ("workdir", "kind", "out", "ema", "steps", "sampler", "upload"),
        _export,
    ),
}
MODE = flags.DEFINE_enum("mode", "train", list(COMMANDS), "")


def overview() -> str:
    """The text of --help: the commands with their flags, then dmf/help.txt."""
    lines = ["usage: python main.py --mode=COMMAND --FLAG=VALUE ...", ""]
    lines += [f"--mode={'|'.join(COMMANDS)} (default: train)", ""]
    for name, command in COMMANDS.items():
        names = " ".join(f"--{flag}" for flag in command.flags)
        lines.append(f"    {name:<16} {command.about}")
        lines.append(textwrap.fill(names, 96, initial_indent=" " * 21, subsequent_indent=" " * 21))
    lines += ["", "Kinds of weights:", ""]
    lines += [f"    {name:<16} {about}" for name, about in KINDS.items()]
    about = Path(__file__).with_name("help.txt").read_text(encoding="utf-8")
    return "\n".join([*lines, "", about.rstrip()])


def main(argv: list[str]) -> None:
    """Runs one command, after absl has read the flags. Raises DmfError for a wrong one."""
    if len(argv) > 1:
        wanted = "expected only flags, such as --config=configs/digits.py"
        raise DmfError(f"argument {argv[1]!r}: {wanted}")
    command = COMMANDS[MODE.value]
    for name in sorted({name for row in COMMANDS.values() for name in row.flags}):
        if flags.FLAGS[name].present and name not in command.flags:
            raise DmfError(
                f"--{name} with --mode={MODE.value}: expected none, this mode does not read it"
            )
    # Tracing makes very many objects that stay. Looking through them less often saves a fifth.
    gc.set_threshold(100_000, 50)
    logging.set_verbosity(logging.WARNING)
    command.parse()()


def _setting() -> Any:
    from dmf.evaluation.scoring import Setting

    return Setting(PROTOCOL.value, FEATURES.value, REFERENCE.value, COUNT.value)


def _emas() -> list[float | None]:
    """The half-lives of --ema; [None] means the run's."""
    given = f"--ema={','.join(EMA.value)}"
    try:
        values = [float(text) for text in EMA.value]
    except ValueError as error:
        raise DmfError(f"{given}: expected half-lives in images, such as 0,1.774e6") from error
    if not all(0 <= value < float("inf") for value in values):
        raise DmfError(f"{given}: expected half-lives in images of at least 0")
    return [*values] or [None]


def _ema() -> float | None:
    values = _emas()
    if len(values) > 1:
        raise DmfError(
            f"--ema={','.join(EMA.value)}: expected one half-life here; "
            "several need --mode=score with a --protocol"
        )
    return values[0]


def _steps() -> list[int]:
    if not STEPS.value or not all(n.isdigit() and int(n) > 0 for n in STEPS.value):
        given = f"--steps={','.join(STEPS.value)}"
        raise DmfError(f"{given}: expected positive whole numbers, such as 1,2,4")
    return [int(n) for n in STEPS.value]


def _check_read(read: tuple[str, ...], what: str, hint: str = "") -> None:
    """Refuses a flag of the command that this use of it would not read."""
    for name in COMMANDS[MODE.value].flags:
        if flags.FLAGS[name].present and name not in read:
            raise DmfError(f"--{name} with {what}: expected none, it would not be read{hint}")


def _out(suffix: str) -> str:
    path = paths.local(OUT.value, "as --out")
    if OUT.value and (path.suffix != suffix or not path.parent.is_dir()):
        what = f"a file name ending in {suffix}, in a directory that exists"
        raise DmfError(f"--out={OUT.value}: expected {what}")
    return OUT.value


def _needed_out(what: str) -> str:
    _need(OUT, f" {what}")
    paths.local(OUT.value, f"as --out of --mode={MODE.value}")
    return OUT.value


def _need(flag: flags.FlagHolder, what: str = " it") -> Any:
    if not flag.value:
        where = f"with --mode={MODE.value}; see --help"
        raise DmfError(f"--{flag.name} is missing: expected{what} {where}")
    return flag.value


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _config() -> Config:
    from dmf.config import parse

    if CONFIG.value is None:
        _need(CONFIG)
    try:
        return parse(CONFIG.value.to_dict())
    except OSError as error:  # absl notices a missing file when it first reads the config
        what = "cannot be read; expected a config file such as configs/digits.py"
        raise DmfError(f"--config={_config_file()}: {what}") from error


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its errors and those of the config file as one line each."""
    argv[:] = current_flags(argv)  # in place: ml_collections reads sys.argv
    sys.path += filter(None, [_configs_folder(argv)])
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, SyntaxError) as error:
        from dmf.config import check_path

        names = [text.partition("=")[0].lstrip("-") for text in argv]
        fields = [name for name in names if name.startswith("config.")]
        for path in fields:  # absl says little of an unknown field
            check_path(path)
        text = " ".join(str(error).replace("\\n", " ").split())
        # All other fields are known by now.
        unknown = [path for path in fields if path.startswith("config.network.")]
        if unknown and isinstance(error, AttributeError | KeyError):
            text = f"{', '.join(unknown)}: expected fields of this config's kind of network"
        raise DmfError(text) from error


def _configs_folder(argv: list[str]) -> str:
    """The folder above the config file's: a config may import its neighbours from `configs`."""
    for word, following in pairwise([*argv, ""]):
        name, given, file = word.lstrip("-").partition("=")
        if name == "config":
            return str(
                Path((file if given else following).partition(":")[0]).resolve().parent.parent
            )
    return ""


def run() -> None:
    """The whole program: reads the flags, runs the command, and ends with one line on an error."""
    global STOP
    if HELP & set(sys.argv[1:]):
        print(overview())
        return
    if all(text.endswith("train") for text in sys.argv if text.lstrip("-").startswith("mode")):
        STOP = sigterm.listen()  # reading the flags takes seconds
    try:
        app.run(main, flags_parser=_parse_flags)
    except DmfError as error:
        _stop(2, f"error: {error}")
    except KeyboardInterrupt:
        goes_on = MODE.value in ("train", "score", "reference", "encode")
        _stop(130, "interrupted" + "; the same command goes on from what is on disk" * goes_on)


def _stop(status: int, line: str) -> None:
    """Ends the process at once. An ordinary exit waits for other processes and compilations."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
