"""The flags of the command line, how they are parsed, and how one flag is read.

dmf/help.txt says what they mean. `dmf.main` says which command reads which.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import config_dict, config_flags

from dmf.errors import DmfError, short
from dmf.fields import MOST, WIDEST, current_flags
from dmf.run import start
from dmf.storage import atomic, paths

if TYPE_CHECKING:
    from dmf.config import Config

FLAGS = flags.FLAGS

# The kinds of dmf.convert.kinds. They stand here too, as that file loads jax; a test compares both.
KINDS = {
    "sit": "SiT S/B/L/XL (PyTorch)",
    "meanflow_dit": "official MeanFlow on latents (Flax msgpack)",
    "meanflow_sit": "MeanFlow in SiT's layout (PyTorch), with an r_embedder or h_embedder",
    "imeanflow": "improved MeanFlow on latents (Flax msgpack)",
    "decoupled_dit": "Decoupled MeanFlow (PyTorch), published as DMF",
    "dit_dh": "DiT-DH in autoencoder features, teacher or MeanFlow student (PyTorch)",
    "meanflow_unet": "MeanFlow CIFAR-10 U-Net, or a flow model in the same network (PyTorch)",
    "edm": "EDM and ECT networks, VP DDPM++ or VE NCSN++ (pickle)",
    "rectified_flow": "rectified flow on CIFAR-10 (score_sde layout)",
    "torchcfm": "TorchCFM CIFAR-10 U-Net",
    "sd_vae": "Stable Diffusion autoencoder",
    "rae_decoder": "representation autoencoder: decoder, stat.pt and DINOv2 with registers",
    "fid_inception": "InceptionV3 for FID",
    "dinov2": "DINOv2 ViT-S/B/L for FD-DINOv2",
    "dmf": "a file that --mode=export wrote in our own layout",
}

# Of files and folders. ~ and $VARIABLES in them are replaced.
PATHS = (
    "workdir",
    "out",
    "vae",
    "protocol",
    "features",
    "reference",
    "source",
    "data_dir",
    "check",
)


class _ConfigFile(flags.ArgumentParser):
    """The parser of --config: the library's own, with all that a user's file may raise as a line.

    Raises DmfError with the file, its line and the error.
    """

    def __init__(self, parser: Any):
        self._parser = parser

    def parse(self, given: str) -> config_dict.ConfigDict:
        """The ConfigDict that get_config of the file returns. given: FILE or FILE:ARGUMENT."""
        file, colon, argument = given.partition(":")
        file = paths.expanded(file)
        try:
            found = self._parser.parse(file + colon + argument)
            if not isinstance(found, config_dict.ConfigDict):
                # The library hides the error of a file that cannot be read until it is used.
                getattr(found, "lock", None)
        except DmfError:
            raise
        except (Exception, SystemExit) as error:
            raise DmfError(f"--config={given}{_told(error, file)}") from error
        if not isinstance(found, config_dict.ConfigDict):
            raise DmfError(
                f"--config={given}: get_config() returned {found!r:.60}; expected a ConfigDict, "
                "as dmf.config.complete makes it"
            )
        return found


config_flags.DEFINE_config_file("config", None, "")
FLAGS["config"].parser = _ConfigFile(FLAGS["config"].parser)
flags.DEFINE_string("workdir", None, "")
flags.DEFINE_string("out", "", "")
flags.DEFINE_list("steps", ["1"], "")
# The keys of dmf.method.samplers, which loads jax too.
SAMPLERS = ("few_step", "euler", "heun", "few_step_on_host", "restart", "gamma")
flags.DEFINE_enum("sampler", "", ["", *SAMPLERS], "")
flags.DEFINE_list("ema", [], "")
flags.DEFINE_integer("count", 0, "", lower_bound=0, upper_bound=MOST)
flags.DEFINE_integer("seed", None, "", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_list("labels", [], "")
flags.DEFINE_float("guidance", None, "")
flags.DEFINE_list("guidance_interval", ["0", "1"], "")
flags.DEFINE_integer("guidance_channels", 0, "", lower_bound=0)
TIMES = ("uniform", "shifted", "edm")
flags.DEFINE_enum("times", "uniform", list(TIMES), "")
flags.DEFINE_bool("raw", False, "")
flags.DEFINE_string("vae", "", "")
flags.DEFINE_string("protocol", "", "")
flags.DEFINE_string("features", "", "")
flags.DEFINE_string("reference", "", "")
flags.DEFINE_bool("selfcheck", False, "")
flags.DEFINE_string("source", None, "")
flags.DEFINE_string("split", "train", "")
flags.DEFINE_string("data_dir", "", "")
flags.DEFINE_integer("size", None, "", lower_bound=1, upper_bound=WIDEST)
flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "")
flags.DEFINE_integer("batch", 16, "", lower_bound=1, upper_bound=WIDEST)
flags.DEFINE_enum("noise", "stored", ["stored", "redrawn"], "")
flags.DEFINE_string("keep", "1", "")
flags.DEFINE_bool("verify", False, "")
flags.DEFINE_enum("kind", None, list(KINDS), "")
flags.DEFINE_string("copy", "", "")
flags.DEFINE_list("drop", [], "")
flags.DEFINE_list("set", [], "")
flags.DEFINE_string("check", "auto", "")
flags.DEFINE_integer("align_steps", 0, "", lower_bound=0, upper_bound=MOST)
flags.DEFINE_string("upload", "", "")
flags.DEFINE_list("topology", [], "")
flags.DEFINE_bool("distributed", False, "")
flags.DEFINE_bool("allow_change", False, "")


def emas() -> list[float | None]:
    """The half-lives of --ema; [None] means the run's."""
    given = f"--ema={','.join(FLAGS.ema)}"
    try:
        values = [float(text) for text in FLAGS.ema]
    except ValueError as error:
        raise DmfError(f"{given}: expected half-lives in images, such as 0,1.774e6") from error
    if not all(0 <= value < float("inf") for value in values):
        raise DmfError(f"{given}: expected half-lives in images of at least 0")
    return [*values] or [None]


def ema() -> float | None:
    """The one half-life of --ema; None means the run's."""
    values = emas()
    if len(values) > 1:
        raise DmfError(
            f"--ema={','.join(FLAGS.ema)}: expected one half-life here; "
            "several need --mode=score with a --protocol"
        )
    return values[0]


def steps() -> list[int]:
    """The numbers of --steps."""
    if not FLAGS.steps or not all(map(_counts, FLAGS.steps)):
        given = f"--steps={','.join(FLAGS.steps)}"
        raise DmfError(f"{given}: expected positive whole numbers, such as 1,2,4")
    return [int(n) for n in FLAGS.steps]


def _counts(text: str) -> bool:
    """Whether a text is a whole number from 1 to `MOST`. Other scripts have digits too."""
    return text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) <= MOST


def labels() -> tuple[int, ...]:
    """The classes of --labels."""
    if not all(n.isascii() and n.isdigit() and len(n) < 10 for n in FLAGS.labels):
        given = ",".join(FLAGS.labels)
        raise DmfError(f"--labels={given:.60}: expected class numbers, such as 207 or 0,1,2")
    return tuple(map(int, FLAGS.labels))


def guidance() -> Any:
    """The `Contrast` of --guidance and its interval and channels; None without --guidance."""
    from dmf.method.guidance import Contrast

    scale = FLAGS.guidance
    if scale is None:
        for name in ("guidance_interval", "guidance_channels"):
            if FLAGS[name].present:
                raise DmfError(f"--{name} without --guidance: expected a scale, such as 4")
        return None
    if not 0 <= scale < math.inf:
        raise DmfError(f"--guidance={scale:g}: expected a finite scale of at least 0, such as 4")
    given = ",".join(FLAGS.guidance_interval)
    try:
        start, end = map(float, FLAGS.guidance_interval)
    except ValueError:
        start, end = 1.0, 0.0
    if not 0 <= start < end <= 1:
        raise DmfError(f"--guidance_interval={given:.60}: expected two times, such as 0.1,0.9")
    return Contrast(scale, start, end, FLAGS.guidance_channels)


def out(*suffixes: str) -> str:
    """The file of --out, or nothing. Raises DmfError where it does not end in one of `suffixes`.

    The suffix "" stands for a folder.
    """
    path = _writable("as --out")
    folder = not path.suffix and "" in suffixes
    wrong = path.suffix not in suffixes or (path.is_dir() and not folder)
    if FLAGS.out and (wrong or not path.parent.is_dir()):
        endings = " or ".join(suffix for suffix in suffixes if suffix)
        what = f"a file name ending in {endings}" + ", or a folder" * ("" in suffixes)
        raise DmfError(f"--out={FLAGS.out}: expected {what}, in a directory that exists")
    return FLAGS.out


def needed_out(what: str) -> str:
    """The local path of --out. Raises DmfError where none is given."""
    need("out", f" {what}")
    _writable(f"as --out of --mode={FLAGS.mode}")
    return FLAGS.out


def need(name: str, what: str = " it") -> Any:
    """The value of a flag. Raises DmfError where none is given."""
    if not FLAGS[name].value:
        where = f"with --mode={FLAGS.mode}; see --help"
        raise DmfError(f"--{name} is missing: expected{what} {where}")
    return FLAGS[name].value


def config_file() -> str:
    """The file that --config names."""
    return config_flags.get_config_filename(FLAGS["config"])


def config() -> Config:
    """The checked config. Raises DmfError for the first wrong value."""
    from dmf.config import parse

    if FLAGS.config is None:
        need("config")
    return parse(FLAGS.config.to_dict())


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with its errors and those of the config file as one line each."""
    argv[:] = current_flags(argv)  # in place: ml_collections reads sys.argv
    if file := start.last(argv, "config", "").partition(":")[0]:
        # A config may import its neighbours from `configs`.
        sys.path.append(str(Path(paths.expanded(file)).resolve().parent.parent))
    logging.set_verbosity(logging.ERROR)  # of the library, which we tell in our own words
    try:
        rest = FLAGS(argv)
        for name in PATHS:
            FLAGS[name].value = paths.expanded(FLAGS[name].value or "") or FLAGS[name].value
        return rest
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


def _told(error: BaseException, file: str) -> str:
    """ ", line N: error" of what the config file raised, which libraries may have wrapped."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, SyntaxError):
            other = "" if link.filename == file else f" of {link.filename}"
            return f", line {link.lineno}{other}: {short(link)}; expected Python"
        lines = [f.lineno for f in traceback.extract_tb(link.__traceback__) if f.filename == file]
        if lines:
            what = "it ends the program" if isinstance(link, SystemExit) else short(link)
            return f", line {lines[-1]}: {what}; expected get_config() to return a ConfigDict"
    if isinstance(chain[-1], OSError) and os.access(file, os.R_OK) and os.path.isfile(file):
        reason = str(chain[-1]).splitlines()[-1].strip()  # the library keeps the words alone
        return f": a file that it opens is missing ({reason}); expected it to be there"
    if isinstance(chain[-1], OSError):
        return ": cannot be read; expected a config file such as configs/digits.py"
    return f": {short(chain[-1])}; expected a file with get_config()"


def _writable(why: str) -> Path:
    """The local path of --out, whose name leaves room for that of the unfinished file."""
    path = paths.local(FLAGS.out, why)
    if len(os.fsencode(path.name)) > atomic.room():
        raise DmfError(
            f"--out={FLAGS.out:.60}...: expected a name of at most {atomic.room()} bytes"
        )
    return path
