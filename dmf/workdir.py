"""What a work directory says of its run: the config, the data and the origin of the weights that its checkpoints belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmf import checkpoint
from dmf.config import Config, differences, parse, to_dict
from dmf.errors import DmfError

CONFIG, ORIGIN, DATA = "config.json", "origin.json", "data.json"
# Logging may change, and data and the flow model may have moved; a resumed run reads the latter no more. How the step is
# computed changes its values by rounding alone, and the devices may be others.
FREE = ("config.run.", "config.data.data_dir:", "config.init:")
COMPUTED = ("config.mesh.", "config.attention.", "config.remat:", "config.scan_blocks:")


def claim(workdir: Path, config: Config, origin: dict[str, Any] | None, about: dict[str, Any], fresh: bool) -> None:
    """Makes the work directory and ties it to config and data; one that holds another run's checkpoints is refused.

    origin: where the weights of config.init came from, if they were converted; about: `data.identity` of the data; fresh: the
    directory holds no checkpoint yet. Raises DmfError.
    """
    path, mine = workdir / CONFIG, to_dict(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if fresh:
            (workdir / ORIGIN).unlink(missing_ok=True)
            for file, values in ((workdir / ORIGIN, origin), (workdir / DATA, about), (path, mine)):
                if values is not None:
                    partial = file.with_suffix(".tmp")
                    partial.write_text(json.dumps(values, indent=2) + "\n")
                    partial.replace(file)
        theirs = to_dict(parse(checkpoint.without_kernel(json.loads(path.read_text()))))  # new fields have their defaults
        seen = json.loads((workdir / DATA).read_text()) if (workdir / DATA).is_file() else about
    except OSError as error:
        raise DmfError(f"--workdir={workdir} cannot be written: {error.strerror}; expected a writable directory") from error
    except ValueError as error:
        raise DmfError(f"{path} is not the JSON of a config: {error}; expected what dmf wrote there") from error
    changed = [d for d in differences(theirs, mine) if not d.startswith((*FREE, *COMPUTED))] + differences(seen, about, "data")
    if changed:
        raise DmfError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(changed)}; expected the same config, or "
            "another directory"
        )


def origin(workdir: Path) -> dict[str, Any] | None:
    """What was written beside the weights the run started from, where they were converted."""
    path = workdir / ORIGIN
    return json.loads(path.read_text()) if path.is_file() else None
