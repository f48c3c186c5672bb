"""Prints the figures of the house for a checkout: its size, its imports and its English.

    python launch/tables/house.py                        this checkout
    python launch/tables/house.py --checkout=../before   another one, to compare

Files are read as text. Nothing of the checkout is imported or run.
The order of the layers is `LAYERS` in the checkout's tests/house/test_house.py.
A checkout without that table gets no figure for it.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG_FILE, WIDE_LINE, LONG_SENTENCE = 400, 100, 30
# A sentence ends with a point before a capital letter, an empty line, a list item or "name: ".
SENTENCE_END = re.compile(r"[.!?:;][\"')]*\s+(?=[A-Z\"(*])|\n\s*\n|\n\s*(?=[-*] |[\w., ]+: )")
Graph = dict[str, set[str]]  # module -> the modules that it imports
Layers = tuple[tuple[str, ...], ...]  # bottom to top


def modules(root: Path) -> dict[str, Path]:
    """Module -> file, named below `dmf`; a package without code is left out."""
    found = {}
    for path in sorted((root / "dmf").rglob("*.py")):
        parts = path.relative_to(root / "dmf").with_suffix("").parts
        if path.name == "__init__.py":
            if all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body):
                continue
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imported(path: Path, types: bool = True) -> Iterator[str]:
    """Dotted names of all that a file imports, also inside functions.

    types: with the imports that only a type checker reads.
    """
    ahead: list[ast.AST] = [ast.parse(path.read_text())]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif types or not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING":
            ahead += ast.iter_child_nodes(node)


def graph(root: Path, types: bool = False) -> Graph:
    """Module -> the modules of dmf that it imports by name; `types` as in `imported`."""
    found = modules(root)
    out: Graph = {}
    for name, path in found.items():
        out[name] = set()
        for target in imported(path, types):
            if target.startswith("dmf."):
                target = target.removeprefix("dmf.")
                owner = target if target in found else target.rpartition(".")[0]
                out[name] |= {owner} & found.keys() - {name}
    return out


def reach(imports: Graph, start: str) -> set[str]:
    """The modules that are read when `start` is imported, `start` among them."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            packages = (name[:i] for i, letter in enumerate(name) if letter == ".")
            ahead += [*imports[name], *(p for p in packages if p in imports)]
    return seen


def longest_chain(imports: Graph) -> list[str]:
    """The longest chain of imports, from the top down. Raises ValueError for a cycle."""
    path: list[str] = []

    @cache
    def below(name: str) -> tuple[str, ...]:
        if name in path:
            raise ValueError(f"a cycle of imports: {' > '.join([*path[path.index(name) :], name])}")
        path.append(name)
        deepest = max((below(n) for n in sorted(imports[name])), key=len, default=())
        path.pop()
        return (name, *deepest)

    return list(max((below(name) for name in imports), key=len))


def layer(name: str, layers: Layers) -> int | None:
    """The row of a module: the one that names it, or else its nearest package."""
    rows = {entry: row for row, entries in enumerate(layers) for entry in entries}
    while name and name not in rows:
        name = name.rpartition(".")[0]
    return rows.get(name)


def against(imports: Graph, layers: Layers) -> list[str]:
    """The imports that run from a lower layer to a higher one, as text."""
    found = []
    for name, targets in imports.items():
        for target in sorted(targets):
            low, high = layer(name, layers), layer(target, layers)
            if low is not None and high is not None and low < high:
                found.append(f"{name} imports {target}")
    return found


def layers_of(root: Path) -> Layers | None:
    """The table `LAYERS` of a checkout, or None where it has none."""
    path = root / "tests" / "house" / "test_house.py"
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^LAYERS = (\(.*?^\))", text, re.M | re.S)
    return ast.literal_eval(found[1]) if found else None


def prose(markdown: str) -> str:
    """Markdown without its code blocks."""
    return re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)


def sentences(text: str) -> list[int]:
    """The number of words of every sentence; indented lines, tables and headings do not count."""
    kept = [line for line in text.splitlines() if not re.match(r"    |[|<#!]", line)]
    plain = re.sub(r"`[^`]*`", "Code", "\n".join(kept))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    counts = [len(part.split()) for part in SENTENCE_END.split(plain)]
    return [count for count in counts if count > 2]


def docstrings(paths: Iterable[Path]) -> Iterator[str]:
    """Every docstring of the files, without its indentation."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def functions(paths: Iterable[Path]) -> list[int]:
    """The lines of every function of the files."""
    trees = (ast.walk(ast.parse(path.read_text())) for path in paths)
    nodes = (node for tree in trees for node in tree if isinstance(node, ast.FunctionDef))
    return [(node.end_lineno or 0) - node.lineno + 1 for node in nodes]


def percent_90(values: list[int]) -> int:
    """The value that 90 % of the values do not exceed."""
    return sorted(values)[int(0.9 * (len(values) - 1))]


def figures(root: Path) -> Iterator[tuple[str, str]]:
    """(what, figure) of a checkout, in the order in which they are printed."""
    top = [path for path in (root / "dmf").iterdir() if path.suffix == ".py"]
    packages = [path for path in (root / "dmf").iterdir() if any(path.glob("*.py"))]
    yield "modules + packages at the top of dmf/", f"{len(top) - 1} + {len(packages)}"
    imports, layers = graph(root), layers_of(root)
    yield "modules reached from dmf.train", f"{len(reach(imports, 'train'))} of {len(imports)}"
    chain = longest_chain(imports)
    yield "longest chain of imports", f"{len(chain)}: {' > '.join(chain)}"
    found = None if layers is None else against(graph(root, types=True), layers)
    text = "no table of layers" if found is None else "; ".join([str(len(found)), *found])
    yield "imports against the layers", text
    code = [*(root / "dmf").rglob("*.py"), *(root / "configs").glob("*.py"), root / "main.py"]
    lines = {path: path.read_text().splitlines() for path in code}
    yield "files over 400 lines", str(sum(len(of) > LONG_FILE for of in lines.values()))
    wide = sum(len(line) > WIDE_LINE for of in lines.values() for line in of)
    yield "lines over 100 columns", str(wide)
    sizes = functions(code)
    middle = f"{statistics.median(sizes):g} / {percent_90(sizes)} / {max(sizes)}"
    yield "lines of a function: median / 90 % / most", middle
    readme = prose((root / "README.md").read_text())
    yield "words of the README", f"{len(readme.split()):,}"
    counts = sentences(readme)
    middle = f"{statistics.median(counts):g} / {percent_90(counts)}"
    yield "words of its sentences: median / 90 %", middle
    long = sum(n > LONG_SENTENCE for text in docstrings(code) for n in sentences(text))
    yield "docstring sentences over 30 words", str(long)


def main() -> None:
    """Prints a table of the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the folder of a checkout")
    for what, figure in figures(parser.parse_args().checkout.resolve()):
        print(f"{what:<44}{figure}")


if __name__ == "__main__":
    main()
