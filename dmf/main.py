"""The command line: one row of COMMANDS per command, with its flags and their parser.

`python main.py` and the installed command `dmf` both call `run`. `dmf.run.flags` defines the
flags. dmf/help.txt says what they mean; --help prints it below the table of commands.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, logging
from absl.flags import DEFINE_enum

from dmf.errors import DmfError
from dmf.run import flags, sigterm, start
from dmf.run.flags import FLAGS
from dmf.storage import paths

if TYPE_CHECKING:
    from dmf.config import Config

# Parsers import what they call, so that --help loads no jax.
STARTED = time.monotonic()
HELP = {"--help", "-help", "--helpshort", "--helpfull", "-h", "-?"}


@dataclass(frozen=True)
class Command:
    """A row of the table: what the command does, the flags that it reads, and their parser.

    parse: reads the flags and returns the command as a function. Raises DmfError for a wrong flag.
    """

    about: str
    flags: tuple[str, ...]
    parse: Callable[[], Callable[[], Any]]


def _train() -> Callable[[], Any]:
    if FLAGS.workdir == "":  # so says a shell whose variable is not set
        raise DmfError("--workdir= is empty: expected a directory, or no such flag for runs/CONFIG")
    config, stop = flags.config(), start.begin(sys.argv)
    name = flags.config_file().rpartition("/")[2].replace(".py", "")
    name = name.replace(":", "_").replace(",", "_")
    return partial(_start, config, FLAGS.workdir or f"runs/{name}", stop)


def _start(config: Config, workdir: str, stop: sigterm.Stop) -> None:
    """Joins the other processes, then trains."""
    from dmf import processes

    processes.start(FLAGS.distributed)
    processes.find_devices()
    if processes.several():
        stop.share(processes.Board())
    if not processes.is_first():  # one process speaks for all; errors still go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from dmf.evaluation.boundary import RunJudge
    from dmf.method.objectives import AUTO
    from dmf.run import programs
    from dmf.train import train

    programs.keep(paths.at(workdir))
    if config.rows == AUTO:
        from dmf.measure.layout import settled

        config = settled(config, paths.at(workdir))
    train(config, workdir, STARTED, FLAGS.allow_change, stop, RunJudge)


def _sample() -> Callable[[], Any]:
    from dmf.evaluation.draw import Choice, write_samples

    path, out, ema = flags.need("workdir"), flags.out(".png", ".npz", ""), flags.ema()
    labels, guidance, raw = flags.labels(), flags.guidance(), FLAGS.raw
    choice = Choice(FLAGS.sampler, FLAGS.seed, labels, guidance, FLAGS.times, FLAGS.vae, raw)
    return partial(write_samples, path, flags.steps(), FLAGS.count or 64, out, ema, choice)


def _score() -> Callable[[], Any]:
    of_run = ("workdir", "steps", "count", "sampler", "out", "ema")
    by_protocol = ("protocol", "features", "reference")
    if not FLAGS.protocol:
        from dmf.evaluation.sampling import write_scores

        _check_read(of_run, "a score without --protocol", ", or --protocol with it")
        path, out, ema = flags.need("workdir"), flags.out(".json"), flags.ema()
        return partial(write_scores, path, flags.steps(), FLAGS.count, FLAGS.sampler, out, ema)
    from dmf.evaluation import scoring

    setting = _setting()
    if FLAGS.selfcheck:
        _check_read(("selfcheck", *by_protocol), "--selfcheck")
        return partial(scoring.self_check, setting)
    if FLAGS.source:
        read = ("source", "split", "data_dir", "count", "out", *by_protocol)
        _check_read(read, "the score of --source")
        call, data = scoring.score_images, (FLAGS.data_dir, FLAGS.split)
        return partial(call, FLAGS.source, setting, flags.out(".json"), *data)
    _check_read((*of_run, "vae", "seed", *by_protocol), "the score of a checkpoint")
    path, steps, emas = flags.need("workdir"), flags.steps(), flags.emas()
    drawn = (FLAGS.sampler, FLAGS.seed, FLAGS.vae)
    return partial(scoring.score_checkpoint, path, setting, steps, emas, *drawn, flags.out(".json"))


def _reference() -> Callable[[], Any]:
    from dmf.evaluation.scoring import make_reference as call

    flags.need("protocol")
    source, out = flags.need("source"), flags.needed_out("the .npz to write")
    return partial(call, source, _setting(), out, FLAGS.data_dir, FLAGS.split, FLAGS.size or 0)


def _encode() -> Callable[[], Any]:
    from dmf.convert.encode import encode, verify

    if FLAGS.verify:
        return partial(verify, flags.needed_out("the directory of encoded latents"))
    source, out = flags.need("source"), flags.needed_out("the directory to make")
    what = " the directory of a converted autoencoder (--mode=convert, kind sd_vae or rae_decoder)"
    vae = flags.need("vae", what)
    call = partial(encode, vae, source, out, data_dir=FLAGS.data_dir, split=FLAGS.split)
    return partial(call, size=FLAGS.size or 256, batch=FLAGS.batch, dtype=FLAGS.dtype)


def _pairs() -> Callable[[], Any]:
    from dmf.convert import pairs
    from dmf.evaluation.draw import Choice

    if FLAGS.verify:
        _check_read(("verify", "out"), "--verify")
        return partial(pairs.verify, flags.needed_out("the directory of pairs"))
    path, out = flags.need("workdir"), flags.needed_out("the directory to make")
    count = flags.need("count", " how many pairs to draw,")
    steps = flags.steps() if FLAGS["steps"].present else [pairs.STEPS]
    if len(steps) > 1:
        raise DmfError(f"--steps={','.join(FLAGS.steps)}: expected one number for pairs")
    labels, guidance = flags.labels(), flags.guidance()
    choice = Choice(FLAGS.sampler, FLAGS.seed, labels, guidance, FLAGS.times)
    call = partial(pairs.write_pairs, path, out, count, ema=flags.ema(), choice=choice)
    return partial(call, steps=steps[0], noise=FLAGS.noise, dtype=FLAGS.dtype, keep=FLAGS.keep)


def _benchmark() -> Callable[[], Any]:
    from dmf.measure.benchmark import benchmark

    return partial(benchmark, flags.config(), flags.out(".json"))


def _plan() -> Callable[[], Any]:
    from dmf.measure.tpu_plan import plan

    topologies = flags.need("topology", " TPUs to compile for, such as v5e-16,")
    return partial(plan, flags.config(), topologies, flags.out(".json"), flags.config_file())


def _convert() -> Callable[[], Any]:
    from dmf.convert.command import convert, given

    kind, source = flags.need("kind"), flags.need("source")
    out = flags.needed_out("the directory to make")
    call = partial(convert, kind, source, out, copy=FLAGS.copy, drop=FLAGS.drop)
    call = partial(call, given=given(FLAGS.set))
    return partial(call, check=FLAGS.check, align_steps=FLAGS.align_steps)


def _export() -> Callable[[], Any]:
    from dmf.export.command import READS, export, form

    path = flags.need("workdir")
    out = flags.needed_out("a .safetensors, .pt or .onnx file or a model folder to write")
    _check_read(READS[form(out)], form(out))
    call = partial(export, path, out, kind=FLAGS.kind or "", upload=FLAGS.upload)
    return partial(call, ema=flags.ema(), steps=flags.steps(), sampler=FLAGS.sampler)


DRAWN = ("workdir", "steps", "count", "sampler", "out", "ema", "vae")
GUIDED = ("guidance", "guidance_interval", "guidance_channels")
SAMPLED = (*DRAWN, "seed", "labels", *GUIDED, "times", "raw")
JUDGED = ("protocol", "features", "reference", "seed", "selfcheck", "source", "split", "data_dir")
COMMANDS = {
    "train": Command(
        "train a generator, or go on training it",
        ("config", "workdir", "distributed", "allow_change"),
        _train,
    ),
    "sample": Command("draw samples: a grid, single images or an array", SAMPLED, _sample),
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
    "pairs": Command(
        "store pairs of noise and sample that a checkpoint makes",
        (
            *("workdir", "out", "count", "steps", "sampler", "ema", "seed", "labels", *GUIDED),
            *("times", "noise", "dtype", "keep", "verify"),
        ),
        _pairs,
    ),
    "benchmark": Command("time the training steps side by side", ("config", "out"), _benchmark),
    "plan": Command("compile the steps for absent TPUs", ("config", "topology", "out"), _plan),
    "convert": Command(
        "make a checkpoint from a file of others",
        ("kind", "source", "out", "copy", "drop", "set", "check", "align_steps"),
        _convert,
    ),
    "export": Command(
        "write weights, ONNX or a model folder from a checkpoint",
        ("workdir", "kind", "out", "ema", "steps", "sampler", "upload"),
        _export,
    ),
}
DEFINE_enum("mode", "train", list(COMMANDS), "")


def overview() -> str:
    """The text of --help: the commands with their flags, then dmf/help.txt."""
    lines = ["usage: python main.py --mode=COMMAND --FLAG=VALUE ...", ""]
    lines += [f"--mode={'|'.join(COMMANDS)} (default: train)", ""]
    for name, command in COMMANDS.items():
        names = " ".join(f"--{flag}" for flag in command.flags)
        lines.append(f"    {name:<16} {command.about}")
        lines.append(textwrap.fill(names, 96, initial_indent=" " * 21, subsequent_indent=" " * 21))
    lines += ["", "Kinds of weights:", ""]
    lines += [f"    {name:<16} {about}" for name, about in flags.KINDS.items()]
    about = Path(__file__).with_name("help.txt").read_text(encoding="utf-8")
    return "\n".join([*lines, "", about.rstrip()])


def main(argv: list[str]) -> int:
    """Runs one command, after absl has read the flags; returns the exit status.

    Raises DmfError for a wrong flag.
    """
    if len(argv) > 1:
        wanted = "expected only flags, such as --config=configs/digits.py"
        raise DmfError(f"argument {argv[1]!r}: {wanted}")
    command = COMMANDS[FLAGS.mode]
    for name in sorted({name for row in COMMANDS.values() for name in row.flags}):
        if FLAGS[name].present and name not in command.flags:
            raise DmfError(
                f"--{name} with --mode={FLAGS.mode}: expected none, this mode does not read it"
            )
    # Tracing makes very many objects that stay. Looking through them less often saves a fifth.
    gc.set_threshold(100_000, 50)
    logging.set_verbosity(logging.WARNING)
    call = command.parse()
    if FLAGS.mode != start.TRAIN:  # which joins the other processes before
        from dmf import processes

        processes.find_devices()
    call()
    return start.begin(sys.argv).status


def _setting() -> Any:
    from dmf.evaluation.scoring import Setting

    return Setting(FLAGS.protocol, FLAGS.features, FLAGS.reference, FLAGS.count)


def _check_read(read: tuple[str, ...], what: str, hint: str = "") -> None:
    """Refuses a flag of the command that this use of it would not read."""
    for name in COMMANDS[FLAGS.mode].flags:
        if FLAGS[name].present and name not in read:
            raise DmfError(f"--{name} with {what}: expected none, it would not be read{hint}")


def run() -> None:
    """The whole program: reads the flags, runs the command, and ends with one line on an error."""
    start.begin(sys.argv)
    if HELP & set(sys.argv[1:]):
        print(overview())
        return
    try:
        app.run(main, flags_parser=flags.parse)
    except DmfError as error:
        _stop(2, f"error: {error}")


def _stop(status: int, line: str) -> None:
    """Ends the process at once. An ordinary exit waits for other processes and compilations."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
