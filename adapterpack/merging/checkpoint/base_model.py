"""A checkpoint as the base of a merge: what is read of it, what a report says of it, and whether the packs
belong to it.
"""

from __future__ import annotations

from pathlib import Path

from ...base.codecs.dequantized_checkpoint import DequantizedCheckpoint
from ...base.compatibility import Verdict
from ...pack.pack import Pack


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
