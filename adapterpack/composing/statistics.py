"""Reads and writes statistics of an adapter on data: one matrix for each site, for the rules that need data.

The file is safetensors, one float32 tensor for each site under its path; the metadata states the kind:

- ``moment`` ``[in, in]``: ``X^T X / rows`` of the inputs X of the site, with the adapter active;
- ``fisher`` ``[out, in]``: the mean over examples of the squared gradient of the loss by the weight of the
  site.

``adapterpack measure`` writes them; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, FormatError, NonFinite
from ..io import SafetensorsFile, all_finite, output_file, sha256_of
from ..io.safetensors import write
from ..pack import Pack
from ..paths import StrPath

FORMAT = "adapterpack-statistics-1"
KINDS = {
    "moment": "the second moments of every site's inputs",
    "fisher": "the squared gradients of every site's weight",
}


@dataclass(frozen=True)
class Statistics:
    """The statistics of one pack. ``matrices`` maps site paths to matrices; those of a file are views that
    read the file at each use.

    ``digest`` is the digest of the file; recipes identify statistics by it.
    """

    kind: str
    pack: str
    rows: int
    matrices: Mapping[str, np.ndarray]
    digest: str | None = None

    def at(self, path: str) -> np.ndarray | None:
        """Returns the matrix at a site, or None if the site was not measured."""
        return self.matrices.get(path)

    def write(self, out: StrPath) -> None:
        """Writes the file atomically.

        Raises:
            NonFinite: a matrix holds NaN or infinity.
            StorageError: the file system refuses.
        """
        for path, value in self.matrices.items():
            if not all_finite(value):
                raise NonFinite(
                    "what was measured is not finite",
                    where=path,
                    remedy="measure in float32, or on other data",
                )
        values = {path: np.ascontiguousarray(value, np.float32) for path, value in self.matrices.items()}
        with output_file(out, renews=FORMAT.encode()) as file:
            write(
                file, values, {"format": FORMAT, "kind": self.kind, "pack": self.pack, "rows": str(self.rows)}
            )


def read(path: StrPath) -> Statistics:
    """Opens a file of statistics; the matrices stay in the file until they are used.

    Raises:
        FormatError, StorageError: the file is not one of statistics, or cannot be read.

    Example:
        >>> import tempfile; path = Path(tempfile.mkdtemp()) / "moments.safetensors"
        >>> Statistics("moment", "sha256:" + "0" * 64, 8, {"q": np.eye(2)}).write(path)
        >>> read(path).kind, read(path).at("q").shape
        ('moment', (2, 2))
    """
    file = SafetensorsFile(path)
    about = file.metadata
    rows = file.metadata.get("rows", "")
    if (
        about.get("format") != FORMAT
        or about.get("kind") not in KINDS
        or not rows.isascii()
        or not rows.isdigit()
        or len(rows) > 18
    ):
        raise FormatError(
            "this file holds no statistics of an adapter",
            where=path,
            expected=FORMAT,
            found=about.get("format", "none"),
            remedy="write one with adapterpack measure",
        )
    for info in file.tensors.values():
        if info.dtype != "F32" or len(info.shape) != 2:
            raise FormatError(
                "statistics are matrices in float32",
                where=f"{path}, {info.name}",
                found=f"{info.dtype} {list(info.shape)}",
                remedy="write the file anew with adapterpack measure",
            )
    return Statistics(
        about["kind"],
        about.get("pack", ""),
        int(rows),
        {name: file.read(name) for name in file.tensors},
        f"sha256:{sha256_of(Path(path))}",
    )


def of_packs(
    statistics: Sequence[Statistics | StrPath] | None, packs: Sequence[Pack], wanted: str, rule: str
) -> list[Statistics] | None:
    """Returns the statistics of all packs in their order, for a rule that needs the kind ``wanted`` ("" for
    none).

    Raises:
        ConfigError: statistics are missing, too many or of another kind, or the rule does not use any.
        FormatError: a file does not contain statistics, or was measured on another pack.
    """
    if not wanted:
        if statistics:
            raise ConfigError(
                "this rule uses no data",
                where=f"rule {rule}",
                found=f"{len(statistics)} statistics",
                remedy="leave them out",
            )
        return None
    if statistics is None or len(statistics) != len(packs):
        raise ConfigError(
            f"this rule needs {KINDS[wanted]}, measured for every pack",
            where=f"rule {rule}",
            expected=f"{len(packs)} files",
            found=len(statistics or ()),
            remedy=f"adapterpack measure BASE PACK --data FILE --kind {wanted} -o FILE for each, and give "
            "them in the order of the packs",
        )
    loaded = [source if isinstance(source, Statistics) else read(source) for source in statistics]
    for measured, pack in zip(loaded, packs, strict=True):
        if measured.kind != wanted:
            raise ConfigError(
                "these statistics are of another kind",
                where=f"rule {rule}, pack '{pack.name}'",
                expected=wanted,
                found=measured.kind,
                remedy=f"measure with --kind {wanted}",
            )
        if measured.pack != pack.id:
            raise FormatError(
                "these statistics were measured of another pack",
                where=pack.where,
                expected=pack.id[:23],
                found=measured.pack[:23] or "none",
                remedy="give the files in the order of the packs, or measure again",
            )
    return loaded
