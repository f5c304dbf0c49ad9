"""What an installation holds: one ONNX Runtime, whatever extra is asked for, and no model hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions

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
