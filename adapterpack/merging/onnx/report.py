"""The report of a merge into a graph: where each tensor is, and how much of the change survived rounding to
its stored dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ...io import Json
from ...notebook import Shown
from ..checkpoint import MergedPack, advice, kept_share, one_line, relative_error
from ..checkpoint.report import MUCH
from ..fold import TensorLoss, finite


class GraphTensor(NamedTuple):
    """One changed tensor: its loss, its initializers and the nodes that read them; ``quantized`` as in
    :class:`.fold.Folded`.
    """

    loss: TensorLoss
    initializers: tuple[str, ...]
    layouts: tuple[str, ...]
    nodes: tuple[str, ...]
    quantized: tuple[float, float] | None


@dataclass(frozen=True)
class GraphReport(Shown):
    """What :func:`adapterpack.merge` did to a graph. ``checks`` holds the results of the checker and the
    runtime.

    ``base_content`` is the fingerprint of the checkpoint or of the bundle's base, or None where the bundle
    does not know it.
    """

    out: str
    graph: str
    base_name: str
    base_structure: str
    base_content: str | None
    packs: tuple[MergedPack, ...]
    tensors: tuple[GraphTensor, ...]
    replaced: tuple[str, ...]
    initializers: int
    bytes_written: int
    seconds: float
    checks: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def losses(self) -> tuple[TensorLoss, ...]:
        """The fold loss of every changed tensor."""
        return tuple(tensor.loss for tensor in self.tensors)

    @property
    def relative_error(self) -> float:
        """The fold loss over all tensors: ``||S - D|| / ||D||``."""
        return relative_error(self.losses)

    @property
    def kept(self) -> float:
        """The projection of the stored change on the exact one, over all tensors: 1 is all of it."""
        return kept_share(self.losses)

    @property
    def quantized(self) -> tuple[float, float] | None:
        """The largest relative distance of quantized weights from the float ones, before the fold and after
        it.
        """
        pairs = [tensor.quantized for tensor in self.tensors if tensor.quantized is not None]
        return (max(one for one, _ in pairs), max(one for _, one in pairs)) if pairs else None

    @property
    def advice(self) -> str | None:
        """One sentence where much of the change was lost in rounding, else None."""
        if self.quantized is not None and self.relative_error > MUCH:
            return (
                "The steps of the quantized weights are large compared with the change: fold into the float "
                "graph and quantize the result, or keep the adapter unmerged."
            )
        return advice(self.losses, self.relative_error, self.kept)

    def to_json(self) -> Json:
        """Returns the report as ``merge --json`` prints it."""
        return {"kind": "merge-onnx", "out": self.out, **self.provenance(), "seconds": self.seconds}

    def provenance(self) -> Json:
        """Returns what the merge writes to the output folder: the report without path and time."""
        return {
            "graph": self.graph,
            "base": {"name": self.base_name, "structure": self.base_structure, "content": self.base_content},
            "packs": [asdict(pack) for pack in self.packs],
            "tensors": [_tensor(tensor) for tensor in self.tensors],
            "replaced": list(self.replaced),
            "initializers": self.initializers,
            "bytes_written": self.bytes_written,
            "fold_loss": {"relative_error": finite(self.relative_error), "kept": finite(self.kept)},
            "checks": dict(self.checks),
            "left_out": list(self.left_out),
            "advice": self.advice,
        }


def _tensor(tensor: GraphTensor) -> Json:
    values = {
        **tensor.loss.to_json(),
        "initializers": list(tensor.initializers),
        "layouts": list(tensor.layouts),
        "nodes": list(tensor.nodes),
    }
    if tensor.quantized is not None:
        values["quantization_error"] = {
            "before": finite(tensor.quantized[0]),
            "after": finite(tensor.quantized[1]),
        }
    return values
