"""The config reference, docs/config.md: type, default, allowed values and comment of each field.

    python launch/tables/config_reference.py              prints the page
    python launch/tables/config_reference.py --write      writes docs/config.md
    python launch/tables/config_reference.py --check      exits with 1 where docs/config.md differs

Types, defaults and comments are read from the source; the metadata of a field say what is allowed.
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

from dmf import config, fields, networks
from dmf.measure import tpu_plan

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Config reference

`python launch/tables/config_reference.py --write` makes this page from the dataclasses. Change a
field there, not here.

Every field is a flag: `--config.curriculum.q=4`. A tuple is written
`--config.run.score_steps="(1,2)"`. A config file sets some fields; the others keep the defaults
below. `WORKDIR/config.json` holds all fields of a run.

A command ends with one line that names the field in each of these cases:

- a value of another type
- a value that is not allowed
- a name that does not exist

**\\*** marks a field for which the paper states no value, or whose value we do not know. Its
default comes from an official MeanFlow recipe or from a figure, or it is ours. The docstring of
each file in [`configs/`](../configs) says which.

A field without the mark is one of these:

- the paper's: targets, equal stages, batch 1024, 96,000 steps, dagger
- without a counterpart in the paper
- about this program alone"""


class Field(NamedTuple):
    """One line of a table; default None: there is none."""

    name: str
    type: str
    default: str | None
    comment: str


def fields_of(cls: type) -> list[Field]:
    """The fields of a dataclass as its source has them.

    A field's comment is what stands on its own lines, after the lines right above it.
    """
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
            default = default_of(node.value, text) if node.value else None
            found.append(
                Field(
                    ast.unparse(node.target), ast.unparse(node.annotation), default, " ".join(lines)
                )
            )
    return found


def default_of(value: ast.expr, text: str) -> str | None:
    """The default as the source has it; of `limited` and `choice` it is the first argument."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("limited", "choice"):
        value = value.args[0]
    if ast.unparse(value) == "REQUIRED":
        return None
    return ast.get_source_segment(text, value)


def allowed(key: str) -> str:
    """What the metadata of a field allow, "" where it is checked elsewhere. key: loss.p, say."""
    section, _, name = f"config.{key}".rpartition(".")
    metadata = {f.name: f.metadata for f in dataclasses.fields(rooms()[section])}[name]
    if fields.CHOICES in metadata:
        return ", ".join(f"`{choice}`" for choice in metadata[fields.CHOICES])
    return numbers(metadata[fields.RANGE]) if fields.RANGE in metadata else ""


def numbers(allowed: fields.Range) -> str:
    """A range in the words of the tables, such as "above 0 to 1"."""
    low, high, _ = allowed
    named = {fields.LEAST: "above 0", fields.ABOVE_1: "above 1", -fields.INF: "finite"}
    if high == fields.INF:
        return named.get(low, f"at least {low:g}")
    least = named.get(low, f"{low:g}")
    most = "below 1" if high == fields.BELOW_1 else f"{high:.0f}" if high > 1 else f"{high:g}"
    return f"{least} to {most}"


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def rooms() -> dict[str, type]:
    """Path of a section -> its dataclass; each kind of network has its own."""
    found: dict[str, type] = {"config": config.Config}
    for f in dataclasses.fields(config.Config):
        if f.name == "network":
            kinds = networks.KINDS.items()
            found |= {f"config.network, kind {kind}": cls for kind, (cls, _) in kinds}
        elif isinstance(f.default_factory, type):
            found[f"config.{f.name}"] = f.default_factory
    return found


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def row(path: str, field: Field, sections: dict[str, type]) -> str:
    """One line of a table; a section's links to its table."""
    key = f"{path}.{field.name}"
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
    escaped = [cell.replace("|", r"\|") for cell in (*cells, comment)]
    return f"| `{field.name}`{mark} | {' | '.join(escaped)} |"


def data_sets() -> str:
    """The table of data sets, by the shapes in dmf/measure/tpu_plan.py."""
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
                "docs/config.md is not what the source says: expected python "
                "launch/tables/config_reference.py --write"
            )
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
