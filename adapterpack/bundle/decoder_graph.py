"""Names of the engine's decoder graph and its special inputs, and the error for bundles that lack
the graph.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import Unsupported
from .manifest import Bundle

DECODER = "decoder"
"""The part name of the engine's decoder graph, which updates its KV caches in place. A bundle has it if its
manifest says ``decoder``.
"""
CACHE_LENGTHS = "seqlens_k"
LONGEST = "total_sequence_length"
LOGITS_POSITIONS = "logits_positions"
"""Inputs of that graph: the last position of each row's cache after a pass ``[batch]``, the length of the
longest row, and the positions of a pass for which it returns logits ``[batch, n]``.
"""
LAST_POSITIONS = "last_positions"
"""An input with the last position of each row, as far as it is known before the pass ``[batch, 1]``. Only
models with LongRoPE have it, where the length of a row changes the embeddings of all its positions.
"""
SOURCE_LENGTHS = "source_lengths"
"""An input with the number of encoder positions of each row ``[batch]``, if rows may differ in it."""


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    """Returns the part names of a bundle's graphs: those of its task, and the engine's if it has one."""
    return (*bundle.parts, *((DECODER,) if bundle.decoder else ()))


def cache_scale(cache: str) -> str:
    """Returns the name of the initializer with the quantization step of an int8 cache, ``[heads, 1,
    width]``.
    """
    return f"{cache}.scale"


def part_ranks(path: str) -> str:
    """Returns the name of the input with the widths of the parts of a shared ``down`` slot, ``[members]``."""
    return f"{path}.ranks"


def without_decoder(bundle: Bundle, folder: Path) -> Unsupported:
    """Makes the error for a bundle without a graph for the engine: says why, and which command writes a
    bundle with one.
    """
    reason = bundle.parity.get("decoder", {}).get("left_out")
    if reason is not None:
        return Unsupported(
            "the bundle has no graph for the engine",
            where=folder,
            found=reason,
            remedy=f"answer rows in batches: adapterpack run {shlex.quote(str(folder))} --input ROWS.jsonl",
        )
    words = ["adapterpack export", shlex.quote(bundle.base.name or "BASE")]
    words += [f"{shlex.quote(str(folder))}/adapters/*"] if bundle.adapters else []
    words += ["--mode folded"] if bundle.mode == "folded" else []
    words += [f"--quantize {bundle.quantization['scheme']}"] if bundle.quantization else []
    found = (
        "mode inputs, which has one adapter a run" if bundle.mode == "inputs" else "it was made without one"
    )
    return Unsupported(
        "the bundle has no graph for the engine",
        where=folder,
        found=found,
        remedy=f"export it again: {' '.join(words)} --static-cache -o NEW",
    )
