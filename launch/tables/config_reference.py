"""The config reference, docs/config.md: every field of every dataclass with type, default, what is allowed and its comment.

    python launch/tables/config_reference.py              prints the page
    python launch/tables/config_reference.py --write      writes docs/config.md
    python launch/tables/config_reference.py --check      exits with 1 where docs/config.md is another page

Types, defaults and comments are read from the source, what is allowed from the tables of dmf/config.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import sys
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dmf import config
from dmf.measure import tpu_plan

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Config reference

Made by `python launch/tables/config_reference.py --write` from the dataclasses; change it there.

Every field is a flag: `--config.curriculum.q=4`. A tuple is written `--config.run.score_steps="(1,2)"`. A config file sets some
fields and leaves the others at the defaults below; `WORKDIR/config.json` has all of them as they were. A value of another type,
outside of what is allowed, or a name that does not exist ends the command with one line that names the field.

**\\*** at a field: the paper states no value, or we do not know it. The default is then that of an official MeanFlow recipe,
read off a figure, or ours; the docstring of each file in [`configs/`](../configs) says which. A field without the mark is the
paper's (targets, equal stages, batch 1024, 96,000 steps, dagger), has no counterpart there, or is about this program alone."""


class Field(NamedTuple):
    """One line of a table; default None: there is none."""

    name: str
    type: str
    default: str | None
    comment: str


def fields_of(cls: type) -> list[Field]:
    """The fields of a dataclass as its source has them. comment: at its line, and those of the lines right above."""
    text = Path(inspect.getfile(cls)).read_text()
    comments = {
        t.start[0]: t
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }
    body = next(
        n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__
    ).body
    found = []
    for node in body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while (
                above in comments and not comments[above].line[: comments[above].start[1]].strip()
            ):
                above -= 1
            lines = [
                comments[n].string.lstrip("# ")
                for n in range(above + 1, (node.end_lineno or 0) + 1)
                if n in comments
            ]
            default = ast.get_source_segment(text, node.value) if node.value else None
            found.append(
                Field(
                    ast.unparse(node.target), ast.unparse(node.annotation), default, " ".join(lines)
                )
            )
    return found


def allowed(key: str) -> str:
    """What dmf/config.py lets a field be, "" where it is checked elsewhere."""
    if key in config.CHOICES:
        return ", ".join(f"`{choice}`" for choice in config.CHOICES[key])
    if key not in config.RANGES:
        return ""
    low, high = config.RANGES[key]
    least = "above 0" if low == config.LEAST else f"{low:g}" if low > -config.INF else "finite"
    least = "above 1" if 1 < low < 1.001 else least
    if high == config.INF:
        return f"at least {least}" if low > 1.001 or least in ("0", "1") else least
    return f"{least} to {'below 1' if high == config.BELOW_1 else f'{high:.0f}' if high > 1 else f'{high:g}'}"


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def rooms() -> dict[str, type]:
    """Path of a section -> its dataclass; each kind of network has its own."""
    found: dict[str, type] = {"config": config.Config}
    for f in dataclasses.fields(config.Config):
        if f.name == "network":
            found |= {f"config.network, kind {kind}": cls for kind, cls in config.NETWORKS.items()}
        elif isinstance(f.default_factory, type):
            found[f"config.{f.name}"] = f.default_factory
    return found


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def row(path: str, field: Field, sections: dict[str, type]) -> str:
    """One line of a table; a section's links to its table."""
    key = f"{path.partition(',')[0]}.{field.name}"
    below = [name for name in sections if name.partition(",")[0] == key]
    if below:
        links = ", ".join(f"[{name.removeprefix('config.')}](#{anchor(name)})" for name in below)
        return f"| `{field.name}` | section |  |  | {links} |"
    mark, comment = (
        (r" **\***", field.comment[1:].strip())
        if field.comment.startswith("*")
        else ("", field.comment)
    )
    cells = [
        f"`{field.type}`",
        "none" if field.default is None else f"`{field.default}`",
        allowed(key.removeprefix("config.")),
    ]
    return f"| `{field.name}`{mark} | {' | '.join(cell.replace('|', chr(92) + '|') for cell in (*cells, comment))} |"


def data_sets() -> str:
    """What the names of config.data.name stand for, as dmf/measure/tpu_plan.py has it."""
    lines = ["| `data.name` | images | classes | training images |", "|---|---|---|---|"]
    for name, (shape, classes, count) in tpu_plan.DATA.items():
        lines.append(f"| `{name}` | {' x '.join(map(str, shape))} | {classes} | {count:,} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    sections, parts = rooms(), [HEAD]
    for path, cls in sections.items():
        source = Path(inspect.getfile(cls)).relative_to(ROOT).as_posix()
        lines = ["| field | type | default | allowed | |", "|---|---|---|---|---|"]
        lines += [row(path, field, sections) for field in fields_of(cls)]
        where = f"`{cls.__name__}` in [`{source}`](../{source}):\n{summary(cls)}"
        parts += [
            f"## {path}",
            where,
            "\n".join(lines),
            *([data_sets()] if path == "config.data" else []),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser: Any = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/config.md")
    parser.add_argument(
        "--check", action="store_true", help="say whether docs/config.md is this page"
    )
    flags = parser.parse_args()
    if flags.write:
        PAGE.write_text(page())
    elif flags.check:
        if not PAGE.is_file() or PAGE.read_text() != page():
            sys.exit(
                "docs/config.md is not what the source says: expected python launch/tables/config_reference.py --write"
            )
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
