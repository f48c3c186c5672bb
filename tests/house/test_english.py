"""The English of this repository, measured: short sentences and lines for a tired reader.

A sentence ends at . ! ? : or ; before a capital letter, at an empty line, and before a list item or
a line such as "name: what it is". Inline code and an address count as one word. Code blocks, tables
and indented formulas do not count.
"""

import ast
import io
import re
import statistics
import tokenize
from functools import cache

import pytest

from tests import ROOT

LONGEST, WIDTH = 30, 100  # words of a sentence, columns of a line
README_WORDS, README_LINES = 1100, 140
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    ROOT / "main.py",
    *(path for room in ("dmf", "configs") for path in sorted((ROOT / room).rglob("*.py"))),
    *sorted((ROOT / "launch").rglob("*.py")),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ITEM = r"[-*|#>]\s|\d+\.\s|[\w., ]+: "  # the beginning of a list item, or of an argument
END = re.compile(rf"(?<=[.!?:;])\s+(?=[A-Z`\"(*])|\n\s*\n|\n\s*(?={ITEM})")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def sentences(text):
    """The sentences of a text, as lists of words."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # Inline code is one word; a capital letter lets a sentence begin with it.
    text = re.sub(r"`[^`]*`", "Code", text)
    text = re.sub(r"https?://\S+|arXiv \d+\.\d+", "link", text)
    return [part.split() for part in END.split(text) if len(part.split()) > 2]


def prose(path):
    """The lines of a Markdown page without code blocks, tables, pictures and formulas."""
    lines, fenced = [], False
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced, line = not fenced, ""
        skipped = fenced or line.startswith(("|", "<", "![", "    "))
        lines.append("" if skipped else line)
    return lines


def remarks(path):
    """Docstrings without formulas, and comments: those of following lines as one text."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node) or ""
            yield "\n".join(line for line in doc.splitlines() if not line.startswith("    "))
    last, block = -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            if not (alone and token.start[0] == last + 1):
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("#* "))
            last = token.start[0] if alone else -1
    yield " ".join(block)


def too_long(texts):
    """The sentences above `LONGEST` words, with their counts."""
    found = (words for text in texts for words in sentences(text))
    return [f"{len(words)}: {' '.join(words)}" for words in found if len(words) > LONGEST]


def lengths(path):
    return sorted(len(words) for words in sentences("\n".join(prose(path))))


@cache
def pages_of_docs():
    return sorted(n for path in (ROOT / "docs").glob("*.md") for n in lengths(path))


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= README_WORDS
    assert len(text.splitlines()) <= README_LINES


def test_the_sentences_of_the_readme_are_short():
    found = lengths(ROOT / "README.md")
    assert len(found) > 20
    assert statistics.median(found) <= 16
    assert found[int(0.9 * (len(found) - 1))] <= 30


def test_the_sentences_of_the_pages_are_short():
    assert len(pages_of_docs()) > 400
    assert statistics.median(pages_of_docs()) <= 14


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_no_sentence_of_a_page_is_too_long(path):
    assert too_long(["\n".join(prose(path))]) == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_no_sentence_of_a_docstring_or_comment_is_too_long(path):
    assert too_long(remarks(path)) == []


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_the_lines_of_code_are_narrow(path):
    lines = path.read_text().splitlines()
    wide = [i for i, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert wide == [], f"lines {wide} have more than {WIDTH} columns"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_the_lines_of_a_page_are_narrow(path):
    wide = [i for i, line in enumerate(prose(path), 1) if len(line) > WIDTH]
    assert wide == [], f"lines {wide} have more than {WIDTH} columns"


def test_the_count_finds_what_it_should():
    long = " ".join(["word"] * (LONGEST + 1))
    assert too_long([f"{long}."]) and not too_long([long[5:]])
    assert not too_long([f"Short one here. A{long[5:]}."])
    assert [len(words) for words in sentences("One two three. `A b` is four words.")] == [3, 4]
    assert len(sentences("First of three words:\n- the second of them\n1. and the third")) == 3
    assert len(sentences("x, y: the images in a batch\nz: what is at t")) == 2
