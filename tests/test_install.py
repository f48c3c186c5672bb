"""What is installed: each package that dmf imports is declared once, and no more is needed."""

import ast
import re
import sys
import tomllib

from tests import ROOT

# Import name -> name of the package, where they differ.
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}
# Import name -> the declared package that brings it.
BROUGHT = {"google": "tensorflow-datasets", "fsspec": "etils"}
# Files may use these where they are installed; the code says so where they are not.
OPTIONAL = {"torch", "onnx", "onnxruntime", "jax2onnx", "huggingface_hub", "tensorflow"}


def declared(name):
    """The packages of a requirements file."""
    lines = (ROOT / name).read_text().splitlines()
    return {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"\w", line)}


def imported():
    """The top-level names that a file of dmf imports."""
    names = set()
    for path in (ROOT / "dmf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"dmf"}


def test_requirements_name_every_import():
    packages = declared("requirements.txt")
    needed = {BROUGHT.get(name, PACKAGES.get(name, name)) for name in imported() - OPTIONAL}
    assert needed <= packages, needed - packages
    assert not {"tensorflow", "tensorflow-cpu", "tensorboard", "torch"} & packages


def test_pyproject_reads_the_requirements_and_repeats_none():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert project["project"]["scripts"] == {"dmf": "dmf.main:run"}
    assert set(project["project"]["dynamic"]) == {"dependencies", "optional-dependencies"}
    files = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    names = [name for entry in files for name in entry["file"]]
    found = [package for name in names for package in declared(name)]
    assert len(found) == len(set(found))


def test_the_package_that_pip_builds_has_every_file_of_dmf():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["packages"]["find"]["include"] == ["dmf*"]
    files = [path for path in (ROOT / "dmf").rglob("*") if "__pycache__" not in path.parts]
    code = {path.parent for path in files if path.suffix == ".py"}
    # setuptools finds a folder of code by its __init__.py alone.
    assert all((folder / "__init__.py").exists() for folder in code)
    others = [p.relative_to(ROOT / "dmf") for p in files if p.is_file() and p.suffix != ".py"]
    assert sorted(map(str, others)) == tool["package-data"]["dmf"]


def test_the_lock_holds_every_requirement():
    text = (ROOT / "requirements.lock").read_text()
    locked = {line.partition("==")[0].replace("_", "-") for line in text.splitlines()}
    for name in ("requirements.txt", "requirements-tensorflow.txt", "requirements-dev.txt"):
        assert {package.replace("_", "-") for package in declared(name)} <= locked
