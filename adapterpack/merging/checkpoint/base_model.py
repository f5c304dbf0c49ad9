"""A checkpoint as the base of a merge: reads its tensors, describes it in reports, and checks that packs
belong to it and that the output is outside of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...base import DequantizedCheckpoint, Verdict
from ...errors import ConfigError
from ...pack import Pack


class MergeBase(DequantizedCheckpoint):
    """A folder with a checkpoint; subclasses cover a GGUF file and a bundle's graph."""

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that the merge reads, into which it must not write."""
        return [self.folder]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the base for the report."""
        return ()

    def require(self, pack: Pack, content: bool | None = True, allow_structural: bool = False) -> Verdict:
        """Checks that this is the base of ``pack``, as :meth:`~adapterpack.pack.pack.Pack.require_base` does.

        Raises:
            BaseMismatch, SiteNotFound: it is not.
        """
        return pack.require_base(self, content=content, allow_structural=allow_structural)


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
