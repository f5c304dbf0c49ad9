"""The names of the graph that the engine runs, and of what it reads besides tokens, caches and slots; the
error where it is missing.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import Unsupported
from .manifest import Bundle

DECODER = "decoder"
"""The decoder's graph that the engine runs, on caches that stay where they are; there where the bundle says
``decoder``.
"""
CACHE_LENGTHS, LONGEST, LOGITS_POSITIONS = "seqlens_k", "total_sequence_length", "logits_positions"
"""Inputs of that graph: the last position of each row's cache after a pass ``[batch]``, the length of the
longest row, and the positions of a pass whose logits it gives ``[batch, n]``.
"""
LAST_POSITIONS = "last_positions"
"""Its input that says where each row ends, as far as it is known before the pass ``[batch, 1]``; there where
the numbers of all positions depend on how long their row is.
"""
SOURCE_LENGTHS = "source_lengths"
"""Its input that says how many positions each row of an encoder has ``[batch]``, where they may differ."""


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    """The graphs of a bundle: those of its task's parts, and the engine's where there is one."""
    return (*bundle.parts, *((DECODER,) if bundle.decoder else ()))


def cache_scale(cache: str) -> str:
    """The constant of that graph that says what one step of an int8 cache is, ``[heads, 1, width]``."""
    return f"{cache}.scale"


def part_ranks(path: str) -> str:
    """The input of the engine's graph that says how wide the parts of a shared ``down`` slot are,
    ``[members]``.
    """
    return f"{path}.ranks"


def without_decoder(bundle: Bundle, folder: Path) -> Unsupported:
    """The error that a bundle has no graph for the engine: why, and the command that writes one that has
    it.
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
