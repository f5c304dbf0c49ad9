"""mobius-onnx: decoder language models in seconds; weights keep their names and lie ready for MatMul."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..sitemap import onnxscript_scope
from .base import BaseGraph, Frontend


def _supports(config: Mapping[str, Any], task: str) -> bool:
    return task == "text-generation"


def _build(folder: Path, task: str) -> BaseGraph:
    import mobius as builder  # noqa: PLC0415 - heavy, and only this frontend needs it

    logging.getLogger("mobius").setLevel(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        package = builder.build(str(folder), task=task, execution_provider="default", dtype="f32")
    return BaseGraph(package["model"], onnxscript_scope, f"mobius-onnx {version('mobius-onnx')}")


mobius = Frontend("mobius", _supports, _build)
