"""The rules of the house that a parser can see: imports, dead fields, forbidden words, sizes."""

import ast
import dataclasses
import functools
import importlib.util
import re

import pytest

from dmf import config, networks
from dmf.method.objectives import KINDS
from tests import ROOT

SOURCES = sorted(
    [*(ROOT / "dmf").rglob("*.py"), *(ROOT / "configs").glob("*.py"), ROOT / "main.py"]
)

# Bottom to top. A module imports modules of its own row and of rows above it in this list.
# Its row is the one that names it, or else the one that names its package.
LAYERS = (
    ("errors",),
    ("fields",),
    ("method", "metrics"),  # pure: arrays to arrays, arrays to numbers
    ("networks", "sharding", "processes"),
    ("storage.paths", "storage.atomic", "storage.manifest", "storage.records"),  # bytes and JSON
    ("logging",),
    ("data",),
    ("optim", "state"),
    ("config",),
    ("storage",),  # checkpoints and the files of others
    ("pretrained",),
    ("step",),
    ("evaluation",),
    ("run",),
    ("train",),
    ("measure",),
    ("convert",),  # the gates: only main imports them
    ("export",),
    ("main",),
)

# Library -> the files that may import it; a folder stands for all below it.
OWNERS = {
    "orbax": {"dmf/storage/checkpoint.py", "dmf/storage/readers/orbaxfile.py"},
    "clu": {"dmf/logging.py"},
    "tensorboard": set(),
    "tensorflow": set(),
    "tensorflow_datasets": {"dmf/data/"},
    "flax": {"dmf/networks/"},
    "optax": {
        *("dmf/optim.py", "dmf/state.py", "dmf/step.py"),
        *("dmf/run/context.py", "dmf/convert/align.py"),
    },
    "ml_collections": {"configs/", "dmf/config.py", "dmf/run/flags.py"},
    "absl": {"dmf/main.py", "dmf/run/flags.py"},
    "torch": {"dmf/convert/", "dmf/export/"},
    "pickle": {"dmf/storage/readers/unpickle.py"},  # with a closed table of names
    "zipfile": {
        "dmf/storage/readers/",
        "dmf/convert/check.py",
        "dmf/evaluation/",
        "dmf/data/images.py",
    },
    "msgpack": {"dmf/storage/readers/flaxfile.py"},
    "ml_dtypes": {"dmf/storage/readers/tree.py"},
    "safetensors": {"dmf/export/", "dmf/storage/readers/read.py"},
    "onnx": {"dmf/export/onnx.py"},
    "onnxruntime": {"dmf/export/onnx.py"},
    "jax2onnx": {"dmf/export/onnx.py"},
    "huggingface_hub": {"dmf/export/folder.py"},
    "PIL": {"dmf/evaluation/pictures.py", "dmf/data/images.py"},
    "array_record": {"dmf/data/"},
    "matplotlib": {"dmf/evaluation/pictures.py"},
    "sklearn": {"dmf/data/bundled.py", "dmf/metrics/labelled.py"},
}
# Package -> what its files may import besides the standard library.
PURE = {
    "dmf/method": {"jax", "numpy", "dmf.method", "dmf.errors", "dmf.fields"},
    "dmf/metrics": {
        *("jax", "numpy", "scipy", "sklearn", "threadpoolctl"),
        *("dmf.metrics", "dmf.errors"),
    },
}
PURE_STANDARD = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
# jax has no stable name for three things: collectives of small values between processes,
# Pallas' kernels, and topologies without devices.
EXPERIMENTAL = {"dmf/processes.py", "dmf/networks/attention.py", "dmf/measure/topologies.py"}


def loaded(name):
    path = ROOT / "launch" / "tables" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = loaded("house")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_every_module_has_a_layer_and_no_import_runs_against_them():
    imports = house.graph(ROOT, types=True)
    assert [name for name in imports if house.layer(name, LAYERS) is None] == []
    assert house.against(imports, LAYERS) == []
    assert house.layers_of(ROOT) == LAYERS


def test_the_house_stays_small_and_flat():
    top = [path for path in (ROOT / "dmf").glob("*.py") if path.stem != "__init__"]
    assert len(top) <= 12, top
    packages = [path for path in (ROOT / "dmf").iterdir() if (path / "__init__.py").exists()]
    assert len(packages) <= 10, packages
    chain = house.longest_chain(house.graph(ROOT))  # a cycle raises ValueError
    assert len(chain) <= 11, " > ".join(chain)


def written(root, files):
    for name, text in files.items():
        path = root / "dmf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.graph(root)


def test_the_figures_see_what_they_count(tmp_path):
    files = {
        "__init__.py": "",
        "low.py": "",
        "rooms/__init__.py": '"""No code."""',
        "rooms/a.py": "def late():\n    from dmf import high, low",
        "high.py": "import dmf.low\nif TYPE_CHECKING:\n    import dmf.rooms.a",
    }
    imports = written(tmp_path, files)
    expected = {"low": set(), "rooms.a": {"high", "low"}, "high": {"low"}}
    assert imports == expected
    assert house.graph(tmp_path, types=True)["high"] == {"low", "rooms.a"}
    assert house.longest_chain(imports) == ["rooms.a", "high", "low"]
    assert house.reach(imports, "rooms.a") == {"rooms.a", "high", "low"}
    assert house.against(imports, (("low",), ("rooms",), ("high",))) == ["rooms.a imports high"]
    assert house.against(imports, (("low",), ("high",), ("rooms",))) == []
    assert house.layer("nowhere", (("low",),)) is None
    imports = written(tmp_path, {"low.py": "from dmf.rooms import a"})
    with pytest.raises(ValueError, match="a cycle of imports"):
        house.longest_chain(imports)
    assert house.sentences("One two three four. Five six `a b` eight\n\nNine ten") == [4, 4]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_library_has_its_owner(path):
    for name in house.imported(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or any(relative(path).startswith(o) for o in owners), (
            f"{relative(path)} imports {name}"
        )


def test_every_owner_uses_its_library():
    used = {path: {name.split(".")[0] for name in house.imported(path)} for path in SOURCES}
    for library, owners in OWNERS.items():
        for owner in owners:
            files = [path for path in SOURCES if relative(path).startswith(owner)]
            assert any(library in used[path] for path in files), f"{owner} does not use {library}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_torch_is_imported_inside_functions_alone(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            assert "torch" not in [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "torch"


@pytest.mark.parametrize("package", PURE)
def test_pure_packages_import_mathematics_and_themselves_only(package):
    for path in (ROOT / package).glob("*.py"):
        for name in house.imported(path):
            first, second = f"{name}..".split(".")[:2]
            key = f"dmf.{second}" if first == "dmf" else first
            assert key in PURE[package] | PURE_STANDARD, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_forbidden_ways(path):
    text = path.read_text()
    for word in ("pmap", "optax._src", "import_module", "__import__", "globals()", "dmf_loss"):
        assert word not in text
    assert "jax.experimental" not in text or relative(path) in EXPERIMENTAL
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"


def config_fields():
    rooms = [config.Config, *(cls for cls, _ in networks.KINDS.values())]
    rooms += [
        f.default_factory
        for f in dataclasses.fields(config.Config)
        if f.default_factory is not dataclasses.MISSING
    ]
    return sorted({(room, f.name) for room in rooms for f in dataclasses.fields(room)}, key=str)


@functools.cache
def attributes_read():
    """The names of all attributes in the code of dmf."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "dmf").rglob("*.py"))
    return {n.attr for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize(("room", "name"), config_fields(), ids=lambda x: getattr(x, "__name__", x))
def test_every_config_field_is_read_somewhere(room, name):
    read = attributes_read()
    # A kind of stage names its arithmetic, and that is the name of a field of these two.
    chosen = room in (config.PrecisionConfig, config.AttentionConfig)
    assert name in read or chosen and name in {kind.arithmetic for kind in KINDS.values()}


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
