"""The rules of the house that a parser can see: who may import what, no dead config, no forbidden words, a true map."""

import ast
import dataclasses
import re

import pytest

from dmf import config
from tests import ROOT

SOURCES = sorted(
    [*(ROOT / "dmf").rglob("*.py"), *(ROOT / "configs").glob("*.py"), ROOT / "main.py"]
)
OWNERS = {
    "orbax": {"dmf/storage/checkpoint.py"},
    "clu": {"dmf/logging.py"},
    "tensorboard": set(),
    "tensorflow": set(),
    "tensorflow_datasets": {"dmf/data/"},
    "flax": {"dmf/networks/"},
    "optax": {"dmf/optim.py", "dmf/state.py", "dmf/step.py", "dmf/convert/align.py"},
    "ml_collections": {"dmf/config.py", "main.py"},
    "absl": {"main.py"},
    "torch": {"dmf/convert/", "dmf/export/"},
    "pickle": set(),  # it runs what a file names
    "pickletools": {"dmf/storage/readers/unpickle.py"},
    "zipfile": {
        "dmf/storage/readers/torchfile.py",
        "dmf/convert/command.py",
        "dmf/metrics/",
        "dmf/data/images.py",
    },
    "ml_dtypes": {"dmf/storage/readers/span.py"},
    "safetensors": {"dmf/export/"},
    "onnx": {"dmf/export/onnx.py"},
    "onnxruntime": {"dmf/export/onnx.py"},
    "jax2onnx": {"dmf/export/onnx.py"},
    "huggingface_hub": {"dmf/export/folder.py"},
    "PIL": {"dmf/evaluation/pictures.py", "dmf/data/images.py"},
    "array_record": {"dmf/data/"},
    "matplotlib": {"dmf/evaluation/pictures.py"},
    "sklearn": {"dmf/data/digits.py", "dmf/data/photos.py", "dmf/metrics/"},
}
# What has no other home in jax: collectives of small values between processes, Pallas' kernels, topologies without devices.
EXPERIMENTAL = {"dmf/processes.py", "dmf/networks/attention.py", "dmf/measure/tpu_plan.py"}
PURE = {"adaptive", "flow", "curriculum", "guidance", "objectives", "sample"}
PURE_MAY_IMPORT = {
    "__future__",
    "collections",
    "dataclasses",
    "math",
    "typing",
    "jax",
    "numpy",
    "dmf",
}


def imports(path):
    """Top-level names of every module that a file imports, wherever it stands, with its dotted path."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_library_has_its_owner(path):
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or any(relative(path).startswith(o) for o in owners), (
            f"{relative(path)} imports {name}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_torch_is_imported_inside_functions_alone_and_the_gates_by_main_alone(path):
    for node in ast.parse(path.read_text()).body:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [getattr(node, "module", "")]
        )
        assert "torch" not in [(name or "").split(".")[0] for name in names]
    for name in imports(path):
        gate = name.startswith(("dmf.convert", "dmf.export"))
        gate = gate and not name.startswith(
            "dmf.convert.files"
        )  # the safe readers serve whoever opens others' files
        assert not gate or relative(path).startswith(("main.py", "dmf/convert/", "dmf/export/")), (
            f"{relative(path)} imports {name}"
        )


@pytest.mark.parametrize("room", sorted(PURE))
def test_the_mathematics_imports_jax_and_itself_only(room):
    for name in imports(ROOT / "dmf" / f"{room}.py"):
        assert name.split(".")[0] in PURE_MAY_IMPORT
        if name.startswith("dmf."):
            assert name.split(".")[1] in PURE | {"errors"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_forbidden_ways(path):
    text = path.read_text()
    for word in ("pmap", "optax._src", "import_module", "__import__", "globals()", "dmf_loss"):
        assert word not in text
    assert "jax.experimental" not in text or relative(path) in EXPERIMENTAL
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"


def config_fields():
    rooms = [config.Config, *config.NETWORKS.values()]
    rooms += [
        f.default_factory
        for f in dataclasses.fields(config.Config)
        if f.default_factory is not dataclasses.MISSING
    ]
    return sorted({(room, f.name) for room in rooms for f in dataclasses.fields(room)}, key=str)


@pytest.mark.parametrize(("room", "name"), config_fields(), ids=lambda x: getattr(x, "__name__", x))
def test_every_config_field_is_read_somewhere(room, name):
    read = set()
    for path in (ROOT / "dmf").rglob("*.py"):
        read |= {
            n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        }
    # These are read by the kind's name, which is what their fields are called.
    by_kind = room in (config.PrecisionConfig, config.AttentionConfig)
    assert name in read or by_kind and name in {"flow", "trajectory", "discrete", "jvp"}


def test_files_and_functions_stay_readable():
    for path in SOURCES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, relative(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{relative(path)}:{node.name}"


def test_every_public_function_says_what_it_does():
    for path in (ROOT / "dmf").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or path.name == "__init__.py", relative(path)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{relative(path)}:{node.name}"


def test_the_readme_map_names_every_room_that_exists_and_no_other():
    text = (ROOT / "README.md").read_text()
    block = text.partition("\n## Map\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+/|[\w/]+\.py)`", block))
    rooms = {f"dmf/{p.parent.name}/" for p in (ROOT / "dmf").glob("*/__init__.py")}
    modules = {relative(p) for p in (ROOT / "dmf").glob("*.py") if p.stem != "__init__"}
    around = {"main.py", "configs/", "launch/", "notebooks/", "docs/", "tests/"}
    assert named == rooms | modules | around


def test_the_table_of_equations_names_functions_without_lines():
    text = (ROOT / "docs" / "method.md").read_text()
    table = text.partition("| equation |")[2].partition("\n\n")[0]
    rows = table.strip().splitlines()[2:]
    assert len(rows) >= 20
    for row in rows:
        found = re.search(r"\[`(dmf/[\w/]+\.py):(\w+)`\]\(\.\./(dmf/[\w/]+\.py)\)", row)
        assert found and found[1] == found[3], row
        code = (ROOT / found[1]).read_text()
        assert re.search(rf"^(def |class )?{found[2]}\b", code, re.M), row


def test_the_files_of_a_step_are_the_same_in_the_readme_and_the_notebook():
    from tests.test_one_step import STEP  # what a traced step enters

    text = (ROOT / "README.md").read_text()
    block = text.partition("\n## One training step\n")[2].partition("\n## ")[0]
    here = re.findall(r"^\| `([\w/.]+)` \|", block, re.M)
    notebook = (ROOT / "notebooks" / "a_step.ipynb").read_text()
    assert here == re.findall(r'"\| `([\w/.]+)` \|', notebook)
    assert sorted(name.removeprefix("dmf/").rstrip("/") for name in here) == STEP
