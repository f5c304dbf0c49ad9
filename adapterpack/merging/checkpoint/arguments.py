"""Checks the output that all kinds of merges share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError


def require_outside(out: Path, inputs: Sequence[Path]) -> None:
    """Raises ConfigError if the output would be inside a folder that is read."""
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                "the output would lie inside an input, and inputs are never changed",
                where=out,
                found=folder,
                remedy="choose a folder outside it",
            )
