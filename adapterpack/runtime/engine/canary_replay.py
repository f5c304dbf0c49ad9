"""Replays the canary of a pack that is loaded while the engine runs, in a batch of its own."""

from __future__ import annotations

import numpy as np

from ...pack import canary
from ...pack.pack import Pack
from ...slots.precision import DEFAULT, precision
from ...tasks.session import Arrays
from ..canary_reasons import not_replayable
from ..open_bundle import OpenBundle
from .adapter_feeds import ResidentAdapter
from .adapter_reader import AdapterReader
from .row_batch import Row, RowBatch


def require_canary(bundle: OpenBundle, reader: AdapterReader, pack: Pack, adapter: ResidentAdapter) -> None:
    """Checks that base and adapter give what the pack's canary recorded. A pack without one passes. So does every pack on a quantized
    graph: nothing says by how much quantization moves these logits.

    Raises:
        BaseMismatch, NothingToDo, ParityError: see :func:`adapterpack.pack.canary.check`.
    """
    recorded = pack.manifest.canary
    if recorded is None or bundle.bundle.quantization is not None or not_replayable(bundle.bundle, pack) is not None:
        return
    rows = recorded.decoder_input_ids if bundle.task.has_encoder else recorded.input_ids
    batch = RowBatch[Row](bundle, reader, 1, max(map(len, rows or ())) + adapter.virtual)
    answers = [[_logits(batch, feed, one) for feed in canary.feeds(recorded)] for one in (None, adapter)]
    coarse = 0.0 if bundle.bundle.dtype == DEFAULT else precision(bundle.bundle.dtype).tolerance
    coarse = max(coarse, bundle.bundle.parity.get("decoder", {}).get("cache", {}).get("max_relative", 0.0))
    base = None if pack.full() else answers[0]  # the canary's base has the modules that the pack trained whole
    canary.check(canary.widened(recorded, coarse=coarse), base, answers[1], where=pack.name)


def _logits(batch: RowBatch[Row], feed: Arrays, adapter: ResidentAdapter | None) -> np.ndarray:
    source = {name: array for name, array in feed.items() if name != "decoder_input_ids"} if "decoder_input_ids" in feed else {}
    ids = feed["decoder_input_ids" if source else "input_ids"][0].tolist()
    row = Row(prompt=ids, adapter=adapter, source=source)
    batch.admit(row)
    logits: np.ndarray = batch.prefill(len(ids)).astype(np.float32)
    batch.remove(row)
    return logits
