"""The shape of the package: its layers, without a circle; how large folders and files are; what is public;
the examples in docstrings.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import adapterpack

pytestmark = pytest.mark.fast

PACKAGE = Path(adapterpack.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def drawn_layers(page: str) -> tuple[str, ...]:
    """The names at the beginning of each line of the drawing in CONTRIBUTING, from the ground up."""
    drawing = page.partition("## How the code lies")[2].partition("\n    ")[2].partition("\n\n")[0]
    heads = [re.split(r" {2,}", line.strip())[0] for line in drawing.splitlines()]
    return tuple(name for head in heads for name in head.split(", "))


LAYERS = drawn_layers(CONTRIBUTING.read_text("utf-8"))
"""Each imports only from those before it."""
LIGHT = (*LAYERS[LAYERS.index("io") : LAYERS.index("torch_adapters")], "cli")
"""Packages that work where neither torch nor transformers is installed."""
HEAVY = {"torch", "transformers"}
ON_REQUEST = {"merging/fold/in_torch.py", "runtime/media/pictures.py"}
"""Files of light packages that are torch's, imported only where a device of torch is chosen; or that ask transformers
for the processor of pictures that are cut into tiles or patches.
"""


def modules(*packages: str) -> list[str]:
    """The dotted names of every module in these subpackages, read off the tree."""
    files = [
        file
        for package in packages
        for file in sorted((PACKAGE / package).rglob("*.py"))
        if file.relative_to(PACKAGE).as_posix() not in ON_REQUEST
    ]
    return [dotted(file) for file in files]


def dotted(file: Path) -> str:
    """The name under which a file of the package is imported."""
    return ".".join(("adapterpack", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def imports(file: Path) -> Iterator[str]:
    """The absolute names that a file imports, at its top, inside functions, or for type checkers alone."""
    here = ("adapterpack", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> the modules of adapterpack that it imports."""
    files = {dotted(file): file for file in PACKAGE.rglob("*.py")}
    offered = {
        f"{dotted(stub)}.{alias.name}": f"{dotted(stub)}.{node.module}"
        for stub in PACKAGE.glob("*/**/__init__.pyi")
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def known(name: str) -> str:
        name = offered.get(name, name)
        return name if name in files else known(name.rpartition(".")[0])

    return {
        module: frozenset(known(name) for name in imports(file) if name.split(".")[0] == "adapterpack")
        - {module}
        for module, file in files.items()
    }


def layer(module: str) -> str:
    """The layer of a module; the package itself, which names what is public, is above all of them."""
    return (*module.split("."), "")[1]


def test_every_layer_imports_only_from_those_below_it() -> None:
    """Imports inside functions and those for type checkers count as well; the command line alone may use the
    public names.
    """
    unknown = {layer(module) for module in graph()} - {*LAYERS, "", "__main__"}
    upward = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for name in names
        if layer(module) in LAYERS
        and (layer(name) not in LAYERS[: LAYERS.index(layer(module)) + 1])
        and not (layer(module) in ("cli", "demos") and layer(name) == "")
    ]
    assert unknown == set()
    assert sorted(upward) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The graph of imports has no circle: modules can be taken away one after another, each after those that
    import it.
    """
    left = {module: set(names) for module, names in graph().items()}
    while leaves := [module for module, names in left.items() if not names]:
        for module in leaves:
            del left[module]
        for names in left.values():
            names.difference_update(leaves)
    needed = set().union(*left.values()) if left else set()
    assert {module: sorted(names) for module, names in left.items() if module in needed} == {}


def test_the_light_packages_import_without_torch() -> None:
    """One fresh interpreter imports every module of the light packages; torch and transformers are still not
    there.
    """
    program = (
        "import importlib, sys\n"
        f"for name in {modules(*LIGHT)!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = sorted({HEAVY!r} & set(sys.modules))\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", LIGHT)
def test_the_light_packages_do_not_import_torch_when_called_either(package: str) -> None:
    """No import of torch or transformers stands in them, not even inside a function."""
    heavy = {
        file.relative_to(PACKAGE).as_posix()
        for file in (PACKAGE / package).rglob("*.py")
        for name in imports(file)
        if name.partition(".")[0] in HEAVY
    }
    assert heavy == {file for file in ON_REQUEST if file.startswith(f"{package}/")}


def stub() -> list[ast.ImportFrom]:
    """The imports of the stub that lists the public names."""
    return [
        node
        for node in ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
    ]


PUBLIC = {alias.name: node.module for node in stub() for alias in node.names}


def test_all_is_what_the_stub_lists() -> None:
    """__all__, dir() and the stub agree, and no name stands twice."""
    assert sorted(adapterpack.__all__) == sorted({"__version__", *PUBLIC})
    assert set(adapterpack.__all__) - {"__version__"} <= set(dir(adapterpack))
    assert len(PUBLIC) == sum(len(node.names) for node in stub())
    with pytest.raises(AttributeError, match="nonsense"):
        _ = adapterpack.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    """A name of the stub imports, and is the one that its module defines."""
    module = PUBLIC[name]
    expected = (
        importlib.import_module(f"adapterpack.{name}")
        if module is None
        else getattr(importlib.import_module(f"adapterpack.{module}"), name)
    )
    assert getattr(adapterpack, name) is expected


def test_no_public_function_shares_its_name_with_a_folder() -> None:
    """Importing from a folder ``x`` binds it to ``adapterpack.x``, which would replace a function of that
    name.
    """
    assert [name for name, module in PUBLIC.items() if module is not None and (PACKAGE / name).exists()] == []


@pytest.mark.parametrize(
    "name", [*modules(*LAYERS[: LAYERS.index("onnx_graph")]), "adapterpack.errors", "adapterpack.resources"]
)
def test_the_examples_in_docstrings_run(name: str) -> None:
    """Every doctest of the lower layers gives what it shows."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_examples_of_the_upper_layers_run() -> None:
    """Those of every module above, in one process, as most of their time is torch's import."""
    names = modules(*LAYERS[LAYERS.index("onnx_graph") :])
    shown = [
        name for name in names if ">>>" in Path(importlib.import_module(name).__file__ or "").read_text()
    ]
    assert {name for name in shown if doctest.testmod(importlib.import_module(name)).failed} == set()


def test_there_are_examples_to_run() -> None:
    """The parts that others build on show how they are used."""
    names = (
        "adapterpack.errors",
        "adapterpack.adapter_methods.core.base",
        "adapterpack.adapter_methods.registry",
        "adapterpack.io.atomic",
        "adapterpack.base.fingerprint",
        "adapterpack.io.safetensors",
    )
    counts = {name: doctest.testmod(importlib.import_module(name)).attempted for name in names}
    assert sum(counts.values()) >= 15
    assert all(counts.values())
