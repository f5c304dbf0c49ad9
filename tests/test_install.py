"""What an installation holds: one ONNX Runtime, whatever extra is asked for, no model hub, and every file that the package reads."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.fast

EXTRAS = ("demo", "sign", "test", "cuda", "serve", "ray")


def closure(root: str, extras: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every (package, requirement) that installing ``root`` with ``extras`` asks for, followed through what is installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(root, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found: Distribution = distribution(name)
        except PackageNotFoundError:
            continue
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield name, requirement.name
                todo += [(requirement.name, inner) for inner in ("", *requirement.extras)]


def test_only_one_onnx_runtime_is_asked_for() -> None:
    """The packages ``onnxruntime`` and ``onnxruntime-gpu`` overwrite each other: nothing that we require may bring the second."""
    wanted = "onnxruntime" if sys.platform == "darwin" else "onnxruntime-gpu"
    asked = {(by, name) for by, name in closure("adapterpack", EXTRAS) if name.lower().replace("_", "-").startswith("onnxruntime")}
    assert {name for _, name in asked} == {wanted}, asked


def test_only_one_onnx_runtime_is_installed() -> None:
    """This very environment, made by the README's command, holds one of them."""
    installed = {found.metadata["Name"].lower().replace("_", "-") for found in distributions()}
    assert len(installed & {"onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"}) == 1


def test_torch_is_a_range_without_a_local_version() -> None:
    """``+cpu`` and exact pins would make the package uninstallable elsewhere."""
    torch = next(Requirement(text) for text in distribution("adapterpack").requires or () if Requirement(text).name == "torch")
    assert torch.specifier
    assert all(clause.operator == ">=" and "+" not in clause.version for clause in torch.specifier)


def test_the_wheel_has_every_file_that_the_package_reads(tmp_path: Path) -> None:
    """Modules, templates of pages and cards, schemas, the demo's data, and the mark of typed packages."""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])", str(tmp_path)],
                   cwd=root, env={**os.environ, "HATCH_BUILD_NO_HOOKS": "true"}, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    suffixes = {".py", ".jinja", ".typed"}
    package = {str(path.relative_to(root)) for path in (root / "adapterpack").rglob("*") if path.suffix in suffixes}
    shipped = {f"adapterpack/{path.relative_to(root)}" for path in (root / "schemas").glob("*.json")}
    assert "adapterpack/report/templates/page.html.jinja" in package
    assert (package | shipped) - names == set()
