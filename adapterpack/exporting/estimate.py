"""Estimates the disk, the memory and the time that an export takes, from headers alone, before the first byte
is written.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..base import Checkpoint
from ..merging.checkpoint import require_space
from ..onnx_graph import PACKED
from ..quantizing.graphs import RoundingSetting
from ..readable import size
from ..slots import DEFAULT
from .arguments import ExportJob
from .frontends import ExportSource
from .proof.few_layers import list_kept
from .proof.plan import ProofPlan, count_numbers, sample

_OWN = 800 << 20
"""Bytes of memory of torch, ONNX Runtime and transformers."""
_BUILD = 16
_CODES = 40
_PASSES = 12
_ENGINE = 50
_PLACES = 12
"""Seconds of one core for 10^9 numbers, measured on Llama's shapes: to build and write a graph, to quantize
it, to prove one adapter, to prove the engine's graph, and to compare the places of weights.
"""


class ExportEstimate(NamedTuple):
    """What an export takes: bytes of the bundle, bytes that the disk must have room for in the bundle's
    folder and for a while in the folder of temporary files, bytes of memory, and seconds of one core.
    """

    bundle: int
    disk: int
    scratch: int
    memory: int
    seconds: float

    def describe(self) -> str:
        """Describes the estimate in a line."""
        return (
            f"a bundle of about {size(self.bundle)}; meanwhile {size(self.disk)} on its disk, "
            f"{size(self.scratch)} of temporary files, {size(self.memory)} of memory, "
            f"{max(1, round(self.seconds / 60))} min of one core"
        )

    def require_room(self, out: Path) -> None:
        """Checks that the disks have room.

        Raises:
            StorageError: one has less.
        """
        scratch = Path(tempfile.gettempdir()) / "scratch"
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        shared = parent.stat().st_dev == scratch.parent.stat().st_dev
        require_space(out, self.disk + (self.scratch if shared else 0))
        require_space(scratch, self.scratch)


def estimate(job: ExportJob, source: ExportSource, plan: ProofPlan) -> ExportEstimate:
    """Estimates the export of a source with this plan of its proof."""
    base = Checkpoint(source.folder)
    quantize = job.quantize
    extents = [info.shape for info in base.tensors.values()]
    numbers = count_numbers(base)
    stored = sum(info.nbytes for info in base.tensors.values())
    few = (
        0
        if plan.stack is None
        else sum(math.prod(base.tensors[name].shape) for name in list_kept(base, plan.stack))
    )
    itemsize = 4 if job.dtype == DEFAULT else 2
    bundle = floats = numbers * itemsize
    if quantize is not None:
        # the head has codes of its own; an embedding that is not tied to it stays float
        words = base.config.get("vocab_size")
        tables = [math.prod(shape) for shape in extents if len(shape) == 2 and shape[0] == words]
        head = max(tables, default=0)
        table = min(tables) if len(tables) > 1 else 0
        bundle = round(
            (numbers - head - table) * bytes_per_number(quantize.setting, itemsize)
            + head * (bytes_per_number(quantize.head_setting, itemsize) if quantize.setting else 2)
            + table * (itemsize if quantize.setting else 2)
        )
    packed = [sum(map(math.prod, map(pack.manifest.shape_of, pack.manifest.tensors))) for pack in job.packs]
    # each pack's own file, and in a bank a slot of the largest one's size for each
    slots = job.slots if job.request.mode == "bank" else 0
    bundle += 4 * sum(packed) + slots * max(packed, default=0) * itemsize
    adapters = 1 + (len(sample(source.packs)) if plan.stack else len(source.packs))
    proved = {"full": numbers, "layers": few + (0 if plan.direct else numbers), "none": 0}[plan.depth]
    work = (
        _BUILD * (numbers + few)
        + (_CODES * (numbers + few) if quantize is not None else 0)
        + _PASSES * proved * adapters
        + (_ENGINE * (numbers + few) if job.static_cache is not False else 0)
        + (_PLACES * numbers if plan.depth == "layers" and not plan.whole else 0)
    )
    # ONNX Runtime widens 16-bit floats, and the model of a few layers is there, too
    widened = 0 if quantize or itemsize == 4 or plan.depth == "none" else 8 * few or 4 * numbers
    return ExportEstimate(
        bundle,
        bundle if quantize is None or plan.direct else floats + bundle,
        # the graph of the few layers, and at first their checkpoint too, later the codes and a float table
        few * (itemsize + max(stored // max(numbers, 1), 2)),
        # one weight in two copies while it is written, then a session, which prepacks codes but maps floats
        # and large graphs
        _OWN
        + max(8 * max(map(math.prod, extents), default=0), min(bundle, PACKED) if quantize else 0, widened),
        work / 1e9,
    )


def bytes_per_number(setting: RoundingSetting | None, floats: int) -> float:
    """Returns the bytes that a product's weight takes for each of its numbers: codes, and a scale and a zero
    point for each block; None: halves.
    """
    if setting is None:
        return 2
    return setting.bits / 8 + (floats + setting.bits / 8) / (setting.block_size or math.inf)
