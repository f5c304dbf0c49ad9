"""ONNX Runtime and adapterpack's own runtime: they run the bundle as it is."""

from __future__ import annotations

from ...bundle import MODES
from .base import TARGETS, Target

ort = TARGETS.register(
    Target(
        "ort",
        "ONNX Runtime, and adapterpack's own run and serve",
        frozenset(MODES),
        "",
        lambda task: True,
        engine=True,
    )
)
