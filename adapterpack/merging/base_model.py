"""A checkpoint as the base of a merge: what is read of it, what a report says of it, and whether the packs
belong to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from ..base.compatibility import Verdict
from ..base.repeated_layers import RepeatedLayers
from ..pack.pack import Pack


class MergeBase(DequantizedCheckpoint):
    """A folder with a checkpoint; a GGUF file and a bundle's graph are subclasses."""

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read; no output may be written into them."""
        return [self.folder]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the base for the report."""
        return ()

    def require(self, pack: Pack, content: bool | None = True, allow_structural: bool = False) -> Verdict:
        """Checks that this is the base of ``pack``: see :meth:`~adapterpack.pack.pack.Pack.require_base`.

        Raises:
            BaseMismatch, SiteNotFound: it is not.
        """
        return pack.require_base(self, content=content, allow_structural=allow_structural)


class RepeatedBase(RepeatedLayers, MergeBase):
    """A folder with a checkpoint whose blocks are repeated in ranges ``ends``, start and end in turn: all of
    them are written out.

    Raises:
        BaseMismatch: it has no such blocks.
        Unsupported: it is quantized, or nothing says that its blocks compute the same at another place.
    """

    def __init__(self, folder: str | os.PathLike[str], ends: Sequence[int]) -> None:
        super().__init__(folder, ends)
        self.require_alike()

    @property
    def notes(self) -> tuple[str, ...]:
        """How many blocks there are now."""
        return (f"the {self.count} blocks of the base are written out as {len(self.order)}",)
