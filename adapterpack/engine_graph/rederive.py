"""Derives the engine's graph of a bundle again after its ordinary graph has changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..bundle.manifest import GRAPH, Bundle
from ..onnx_graph.sandboxed_check import try_opening
from .int8_cache import quantize_cache
from .parity import with_decoder


def rederive(bundle: Bundle, folder: Path, before: Bundle) -> Bundle:
    """Derives the engine's graph from the ordinary graph in ``folder`` and returns the manifest of the
    unpublished ``bundle`` with it. The caches keep the dtype that they had ``before``.

    Raises:
        OutOfLimits, FormatError: ONNX Runtime cannot open what is in ``folder``.
        ParityError: the engine's graph disagrees with the ordinary one, or int8 caches move the logits too
            far.
    """
    try_opening(folder / GRAPH, sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))
    rows = {key: before.parity[key] for key in ("long_rows",) if key in before.parity}
    made = dataclasses.replace(bundle, decoder=True, parity={**bundle.parity, **rows})
    made.write(folder, draft=True)
    report = with_decoder(folder, lambda text: None)
    if "cache" in before.parity.get("decoder", {}):
        report["cache"] = quantize_cache(folder)
    return dataclasses.replace(made, parity={**made.parity, "decoder": report})
