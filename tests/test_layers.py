"""The shape of the package: what imports what, how long files are, what is public, and that the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterpack
from adapterpack import _PUBLIC, _STAGES

pytestmark = pytest.mark.fast

PACKAGE = Path(adapterpack.__file__).parent
LIGHT = ("pack", "methods", "merge", "compose", "extract", "runtime", "hub", "cli")
"""Packages that work where neither torch nor transformers is installed."""
HEAVY = {"torch", "transformers"}
ON_REQUEST = {"merge/in_torch.py"}
"""Files of light packages that are torch's: read only where a device of torch is asked for."""
MAX_LINES = 400


def modules(*packages: str) -> list[str]:
    """The dotted names of every module in these subpackages, read off the tree."""
    files = [file for package in packages for file in sorted((PACKAGE / package).rglob("*.py"))
             if file.relative_to(PACKAGE).as_posix() not in ON_REQUEST]
    names = [".".join(("adapterpack", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def imports(file: Path) -> Iterator[str]:
    """The absolute names that a file imports, at its top or inside functions; what only type checkers read is left out."""
    here = ("adapterpack", *file.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(file.read_text("utf-8"))
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                   for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_light_packages_import_without_torch() -> None:
    """One fresh interpreter imports every module of the light packages; torch and transformers are still not there."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules(*LIGHT)!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = sorted({HEAVY!r} & set(sys.modules))\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", LIGHT)
def test_the_light_packages_do_not_import_torch_when_called_either(package: str) -> None:
    """No import of torch or transformers stands in them, not even inside a function."""
    found = {file.relative_to(PACKAGE).as_posix(): name for file in (PACKAGE / package).rglob("*.py") for name in imports(file)
             if name.partition(".")[0] in HEAVY}
    assert found.keys() == {file for file in ON_REQUEST if file.startswith(package)}


BELOW = {
    "methods": {"errors", "_stage", "methods"},
    "pack": {"errors", "resources", "methods", "pack"},
}
"""What the two lowest layers may use of adapterpack."""


@pytest.mark.parametrize("package", BELOW)
def test_dependencies_point_downwards(package: str) -> None:
    """methods knows errors alone, pack knows methods; neither knows a stage."""
    found = {(str(file.relative_to(PACKAGE)), name.split(".")[1]) for file in (PACKAGE / package).rglob("*.py") for name in imports(file)
             if name.startswith("adapterpack.")}
    assert {(file, name) for file, name in found if name not in BELOW[package]} == set()


def test_nothing_below_the_command_line_knows_it() -> None:
    """cli is at the top: no other package imports it."""
    found = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") for name in imports(file)
             if name.startswith("adapterpack.cli") and file.parent.name != "cli" and file.name != "__main__.py"]
    assert found == []


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    """At most 400 lines a file of the package; past that it is split."""
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text("utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


PRESENT = {name: module for name, module in _PUBLIC.items() if (PACKAGE / f"{module.replace('.', '/')}.py").exists()
           or (PACKAGE / module.replace(".", "/") / "__init__.py").exists()}


def test_all_is_what_the_package_offers() -> None:
    """__all__, dir() and the two tables agree, and no name stands twice."""
    assert sorted(adapterpack.__all__) == dir(adapterpack) == sorted({"__version__", "hub", *_STAGES, *_PUBLIC})
    assert {"load", "Pack", "LoRA", "AdapterpackError"} <= set(PRESENT)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adapterpack.nonsense


@pytest.mark.parametrize("name", PRESENT)
def test_every_public_name_is_there(name: str) -> None:
    """A name of __all__ imports and is the one its module defines."""
    assert getattr(adapterpack, name) is getattr(importlib.import_module(f"adapterpack.{PRESENT[name]}"), name)


@pytest.mark.parametrize("name", [name for name in _STAGES if (PACKAGE / name / "__init__.py").exists()])
def test_every_stage_is_a_package_that_is_called(name: str) -> None:
    """adapterpack.merge is the folder and the function at once, and shows the function's signature."""
    stage = getattr(adapterpack, name)
    assert callable(stage)
    module, function = stage.__dict__["_target"]
    if importlib.util.find_spec(module) is not None:
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", ["adapterpack.errors", "adapterpack.resources", *modules("pack", "methods")])
def test_the_examples_in_docstrings_run(name: str) -> None:
    """Every doctest of the pack layer, the methods and the errors gives what it shows."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run() -> None:
    """The parts that others build on show how they are used."""
    names = ("adapterpack.errors", *modules("pack", "methods"))
    counts = {name: doctest.testmod(importlib.import_module(name)).attempted for name in names}
    assert sum(counts.values()) >= 15
    assert all(counts[name] for name in ("adapterpack.errors", "adapterpack.adapter_methods.core.base", "adapterpack.adapter_methods.registry",
                                         "adapterpack.io.atomic", "adapterpack.base.fingerprint", "adapterpack.io.safetensors"))
