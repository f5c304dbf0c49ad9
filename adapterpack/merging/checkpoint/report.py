"""The report of a merge: what changed, and how much of the adapters' change survived rounding to the output's
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...io import Json
from ...notebook import Shown
from ...readable import percent
from ..fold import TensorLoss, finite

MUCH = 0.25
"""A total relative error above this is worth a warning: a quarter of the change is then rounding noise."""
_WIDER = {"F8_E4M3": "bfloat16", "F8_E5M2": "bfloat16", "BF16": "float32", "F16": "float32"}


@dataclass(frozen=True)
class MergedPack:
    """One merged pack, the weight that multiplied its change, and the verdict on its base."""

    name: str
    id: str
    weight: float
    base: str


@dataclass(frozen=True)
class MergeReport(Shown):
    """What :func:`adapterpack.merge` did. ``dtype`` is the chosen one, or None where tensors kept theirs.

    ``base_content`` is known where every byte of the base was read. ``shard`` is this machine's share of the
    work, None for all of it; while ``jobs_missing`` jobs of other machines are not done, nothing is
    published. ``bytes_resumed`` were written by an earlier run.
    """

    out: str
    base_name: str
    base_structure: str
    base_probe: str
    base_content: str | None
    packs: tuple[MergedPack, ...]
    dtype: str | None
    tensors: int
    tensors_changed: int
    tensors_added: int
    bytes_written: int
    seconds: float
    losses: tuple[TensorLoss, ...]
    stochastic_rounding: int | None = None
    shard: str | None = None
    jobs_missing: int = 0
    bytes_resumed: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def relative_error(self) -> float:
        """The fold loss over all tensors: ``||S - D|| / ||D||``."""
        return relative_error(self.losses)

    @property
    def kept(self) -> float:
        """The projection of the stored change on the exact one, over all tensors: 1 is all of it."""
        return kept_share(self.losses)

    @property
    def requantized(self) -> tuple[float, float] | None:
        """For a quantized output the norm of its difference from the exact result, and that of the base's
        rounding, over all tensors; else None.
        """
        quantized = [loss for loss in self.losses if loss.grid]
        return (
            (math.hypot(*(loss.error for loss in quantized)), math.hypot(*(loss.grid for loss in quantized)))
            if quantized
            else None
        )

    @property
    def advice(self) -> str | None:
        """One sentence where much of the change was lost in rounding, else None."""
        return advice(self.losses, self.relative_error, self.kept)

    def worst(self, count: int = 5) -> list[TensorLoss]:
        """Returns the tensors that lost most, the worst first."""
        return sorted(
            self.losses, key=lambda loss: (math.isfinite(loss.error), -loss.relative_error, loss.tensor)
        )[:count]

    def to_json(self) -> Json:
        """Returns the report as ``merge --json`` prints it."""
        return {
            "kind": "merge",
            "out": self.out,
            **self.provenance(),
            "shard": self.shard,
            "jobs_missing": self.jobs_missing,
            "bytes_resumed": self.bytes_resumed,
            "seconds": self.seconds,
        }

    def provenance(self) -> Json:
        """Returns what the merge writes to the output folder: the report without path and time, so that equal
        inputs give equal bytes.
        """
        return {
            "base": {
                "name": self.base_name,
                "structure": self.base_structure,
                "probe": self.base_probe,
                "content": self.base_content,
            },
            "packs": [asdict(pack) for pack in self.packs],
            "dtype": self.dtype,
            "stochastic_rounding": self.stochastic_rounding,
            "tensors": self.tensors,
            "tensors_changed": self.tensors_changed,
            "tensors_added": self.tensors_added,
            "bytes_written": self.bytes_written,
            "fold_loss": {
                "relative_error": finite(self.relative_error),
                "kept": finite(self.kept),
                "worst": [loss.to_json() for loss in self.worst()],
                "tensors": [loss.to_json() for loss in self.losses],
            },
            "notes": list(self.notes),
            **(
                {}
                if self.requantized is None
                else {
                    "requantized": {"error": finite(self.requantized[0]), "grid": finite(self.requantized[1])}
                }
            ),
            "advice": self.advice,
        }


def one_line(report: Any) -> str:
    """Returns the report of a merge as a line."""
    packs = ", ".join(pack.name for pack in report.packs)
    return f"<{type(report).__name__} of {packs}, in {report.out}: {percent(report.kept)} of the change kept>"


def relative_error(losses: Sequence[TensorLoss]) -> float:
    """Returns the fold loss over tensors: ``||S - D|| / ||D||``."""
    change = math.hypot(*(loss.change for loss in losses))
    return math.hypot(*(loss.error for loss in losses)) / change if change else 0.0


def kept_share(losses: Sequence[TensorLoss]) -> float:
    """Returns the projection of the stored change on the exact one, over tensors: 1 means that all of it is
    kept.
    """
    energy = math.fsum(loss.change**2 for loss in losses)
    return math.fsum(loss.kept * loss.change**2 for loss in losses) / energy if energy else 1.0


def advice(losses: Sequence[TensorLoss], relative_error: float, kept: float) -> str | None:
    """Returns one sentence if the total error is above :data:`MUCH`, else None.

    Example:
        >>> advice([TensorLoss("w", "F64", 1.0, 0.5, 0.9, 1.0)], 0.5, 0.9)
        'Rounding to F64 stored the change with 50 % error (90 % of it kept): keep the adapter unmerged.'
    """
    strange = [loss.tensor for loss in losses if not math.isfinite(loss.error)]
    if strange:
        return (
            f"The fold of {strange[0]} is not finite or too large to measure: merge with safe to be sure of "
            "it."
        )
    if relative_error <= MUCH:
        return None
    worst = max(losses, key=lambda loss: loss.error)
    dtype = worst.dtype
    wider = "float16, which writes the base dequantized" if worst.grid else _WIDER.get(dtype)
    way_out = (f"merge with --dtype {wider}, or " if wider else "") + "keep the adapter unmerged"
    return (
        f"Rounding to {dtype} stored the change with {relative_error:.0%} error ({kept:.0%} of it kept): "
        f"{way_out}."
    ).replace("%", " %")
