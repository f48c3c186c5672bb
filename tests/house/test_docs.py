"""The README and the pages of docs/: what they quote, count and link to exists."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import re
import statistics
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from configs import methods
from dmf.convert.command import KINDS
from dmf.measure import cost
from dmf.measure.tpu_plan import DATA
from dmf.run import workdir
from tests import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def page(name):
    return (ROOT / "docs" / name).read_text()


@cache
def launched(name):
    """A script of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / "tables" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path):
    """The anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.M)
    return {
        launched("config_reference").anchor(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        for heading in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        file, _, name = link.partition("#")
        if "://" in link:
            continue
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name}: {link}"
        if name and target.suffix == ".md":
            assert name in anchors(target), f"{path.name}: {link}"
        assert not name or target.suffix == ".md", f"{path.name}: {link} names a line"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_name_behind_a_link_is_defined_in_its_file(path):
    for file, name, link in re.findall(r"\[`([\w/]+\.py):(\w+)`\]\(([\w./#]+)\)", path.read_text()):
        assert (path.parent / link).resolve() == ROOT / file
        assert re.search(rf"^(def |class )?{name}\b", (ROOT / file).read_text(), re.M), (
            f"{path.name}: {file}:{name}"
        )


def test_every_page_is_found_from_the_readme():
    index = (ROOT / "README.md").read_text().partition("\n## Pages\n")[2].partition("\n## ")[0]
    names = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(re.findall(r"\]\(docs/(\w+\.md)\)", index)) == sorted(names)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_begins_with_one_paragraph_and_a_command(path):
    title, what, *rest = path.read_text().split("\n\n")
    assert title.startswith("# ") and "\n" not in title
    assert (what[0].isalpha() or what[0] == "`") and len(what.split()) <= 60, what
    # config.md is made by a program, and its second paragraph names the command.
    first = f"{what}\n{rest[0]}"
    assert re.search(r"```sh|`python (launch|main)", first), f"{path.name}: no command"


def test_the_config_reference_is_what_the_source_says():
    made = launched("config_reference")
    assert made.PAGE.read_text() == made.page(), "python launch/tables/config_reference.py --write"


def test_every_config_field_has_a_comment_and_a_line_of_the_reference():
    made = launched("config_reference")
    text, sections = page("config.md"), {key.partition(",")[0] for key in made.rooms()}
    for path, cls in made.rooms().items():
        block = text[text.index(f"## {path}\n") :].partition("\n## ")[0]
        found = made.fields_of(cls)
        assert [field.name for field in found] == [f.name for f in dataclasses.fields(cls)]
        for field in found:
            assert field.comment.strip("* ") or f"{path}.{field.name}" in sections, (
                f"{path}.{field.name} has no comment"
            )
            assert f"\n| `{field.name}`" in block


def test_the_reference_says_what_a_field_may_be():
    allowed = launched("config_reference").allowed
    assert allowed("guard.factor") == "above 1" and allowed("run.keep_checkpoints") == "at least 2"
    assert allowed("optimizer.b1") == "0 to below 1" and allowed("times.t_mean") == "finite"
    assert allowed("attention.derivative") == "`xla`, `chunked`" and allowed("loss.p") == "0 to 2"


def test_what_the_paper_leaves_open_is_marked_and_what_it_states_is_not():
    text = page("config.md")
    for name in (
        "q",
        "stages",
        "p",
        "eps",
        "r_neq_t_fraction",
        "learning_rate",
        "halflife_images",
        "dropout",
        "interval_init",
    ):
        assert rf"| `{name}` **\*** |" in text
    for name in ("interval", "product_rule", "batch_size", "length"):
        assert f"| `{name}` |" in text


def texts(node, names):
    """All texts that an expression may give; what an f-string fills in is `names` of it, or \\0."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return texts(node.body, names) + texts(node.orelse, names)
    if not isinstance(node, ast.JoinedStr):
        return []
    parts = []
    for part in node.values:
        name = getattr(getattr(part, "value", None), "id", "")
        parts.append(
            names.get(name, ["\0"]) if not isinstance(part, ast.Constant) else [part.value]
        )
    return ["".join(found) for found in itertools.islice(itertools.product(*parts), 64)]


@cache
def messages():
    """Every text of the source, put together where a function builds one from named pieces."""
    found = []
    for path in [ROOT / "main.py", *(ROOT / "dmf").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for scope in (tree, *functions):
            names = {}
            for node in tree.body if scope is tree else ast.walk(scope):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    made = texts(node.value, names)
                    if made:
                        names.setdefault(node.targets[0].id, []).extend(made)
            for node in ast.walk(scope):
                found += texts(node, names)
    return list(dict.fromkeys(found))


def quoted():
    """The lines that troubleshooting.md and runs.md say the program prints."""
    for name in ("troubleshooting.md", "runs.md"):
        text = page(name)
        lines = [
            line
            for language, block in FENCE.findall(text)
            if not language
            for line in block.splitlines()
        ]
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        yield from lines + [
            code for code in inline if len(code.split()) > 3 and ("..." in code or " no " in code)
        ]


@pytest.mark.parametrize("line", list(quoted()))
def test_a_quoted_line_is_one_that_the_program_prints(line):
    # A line begins with who prints it: main.py, a converter's file, or the guard.
    rest = re.sub(
        r"^(error: (\.\.\.: (?=tensor|no tensor|the weights|forward))?|guard     |input     )",
        "",
        line,
    )
    parts = [re.escape(part) for part in rest.split("...")]
    assert max(map(len, parts)) >= 8 and any(
        re.search(".*".join(parts), text, re.S) for text in messages()
    ), rest


def test_the_beginnings_of_lines_are_the_programs():
    for start in ("error: \0", "guard     \0", "input     steps waited"):
        assert any(text.startswith(start) for text in messages())


def test_the_question_of_the_time_direction_tells_all_four_apart():
    (code,) = [
        block
        for language, block in FENCE.findall(page("troubleshooting.md"))
        if language == "python"
    ]
    names = {}
    exec(code, names)
    spread = 0.5  # standard deviation of Gaussian data, whose mean velocity at z is known

    def exact(z, t):
        t = t[:, None]
        return (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2) * z

    wrong = {
        "ours": exact,
        "1 - t": lambda z, t: exact(z, 1 - t),
        "-v": lambda z, t: -exact(z, t),
        "-v, 1 - t": lambda z, t: -exact(z, 1 - t),
    }
    x = spread * jax.random.normal(jax.random.key(0), (4096, 4))
    for name, v in wrong.items():
        found = names["directions"](v, x, jax.random.key(1))
        assert min(found, key=found.get) == name and found[name] < 0.7, (name, found)


def test_the_page_on_runs_names_every_field_that_is_free_or_fixed():
    text = page("runs.md")
    for name in (*workdir.FREE, *workdir.COMPUTED, *workdir.FIXED, *workdir.SWITCHES):
        assert name == "data." or f"`{name.rstrip(':')}`" in text, name


def test_the_memory_tables_are_the_stored_ones_and_the_states_are_counted_anew():
    made, stored = launched("memory_table"), json.loads(page("memory.json"))
    states = {name: made.state_of(made.config_of(name)) for name in made.STATES}
    assert states == stored["states"]
    assert made.state_table(states) in page("memory.md") and made.policy_table(
        stored["temporary_bytes"]
    ) in page("memory.md")
    for of in states.values():
        assert of["state"] == (12 + 4 * len(of["averages"])) * of["parameters"] + 8


def test_the_worked_example_of_memory_is_right():
    made = launched("memory_table")
    config = made.config_of("imagenet256")
    of, text = made.state_of(config), page("memory.md")
    height, width, _ = DATA[config.data.name][0]
    patch, share = config.network.patch, of["batch"] // 16
    kept = (
        config.batch_size
        // 16
        * height
        * width
        // patch**2
        * config.network.width
        * 2
        * config.network.depth
    )
    split = -(-of["state"] // 16)
    whole, parted = of["state"] + share, split + share
    assert made.size(cost.batch_shapes(config, DATA[config.data.name][0])) == of["batch"]
    rows = json.loads(page("tpu_plan.json"))["rows"]
    rows = {
        (r["topology"], r["mesh"][1]): r
        for r in rows
        if "imagenet" in r["config"] and r["kind"] in ("trajectory", "all_pairs")
    }
    v4, v5e = rows["v4-32", 1], rows["v5e-16", 16]
    assert 1 < v4["state_bytes"] / whole < 1.0003 and 1.015 < v5e["state_bytes"] / parted < 1.0155
    counted = (of["parameters"], of["state"], of["batch"], share, whole, split, parted, kept)
    planned = (
        v4["state_bytes"],
        v5e["hbm_bytes"],
        v5e["state_bytes"],
        v5e["temporary_bytes"],
        v5e["total_bytes"],
    )
    for number in (*counted, *planned):
        assert f"{number:,}" in text, number


def test_compiled_again_a_step_holds_what_the_table_says():
    # Within a tenth: XLA may choose other buffers for another CPU.
    made, stored = (
        launched("memory_table"),
        json.loads(page("memory.json"))["temporary_bytes"]["digits"]["discrete"],
    )
    policies = ("none", "blocks, scan")
    found = {
        policy: made.temporary(made.config_of("digits", **made.POLICIES[policy]), "discrete")
        for policy in policies
    }
    for policy, count in found.items():
        assert abs(count / stored[policy] - 1) < 0.1
    assert found["blocks, scan"] < 0.7 * found["none"]


def test_our_scores_on_the_page_of_methods_are_the_stored_ones():
    seeds = json.loads(page("digits_table.json"))["seeds"].values()
    cells = []
    for method in ("flow", "linear", "dagger", "meanflow"):
        values = [seed[method]["1"]["fd_hidden"] for seed in seeds]
        cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    assert f"| fd_hidden, one step | {' | '.join(cells)} |" in page("methods.md")


def test_every_method_has_its_line_in_the_table_of_methods():
    table = page("methods.md").partition("| name | what it is |")[2].partition("\n\n")[0]
    first = re.findall(r"^\| (.*?) \|", table, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(methods.METHODS)


def test_the_tests_that_a_method_is_to_extend_exist():
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page("method.md"))
    assert len(names) >= 7 and all(f"def {name}(" in source for name in names)


def test_the_licences_are_those_that_a_conversion_notes():
    files, _, text = page("weights.md").partition("\n## Licences\n")
    for half in (files, text):
        assert re.findall(r"^\| `(\w+)` \|", half, re.M) == list(KINDS)
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.licence} |" in text


def test_the_unit_of_change_is_that_of_the_page():
    assert (
        float(jnp.finfo(jnp.bfloat16).eps) == 2**-7 and float(jnp.finfo(jnp.float32).eps) == 2**-23
    )
