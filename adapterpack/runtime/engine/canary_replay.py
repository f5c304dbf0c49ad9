"""Replays the canaries of packs on the engine's graph, in a batch of its own."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...pack import Pack, canary
from ...tasks import Arrays
from ..canary import Replay, Rows, image_in_text
from ..open_bundle import OpenBundle
from ..pipeline import run_parts
from .adapter_feeds import ResidentAdapter
from .adapter_reader import AdapterReader
from .model_runner import ModelRunner
from .requests import SequenceState


def replay_by_engine(bundle: OpenBundle, packs: Iterable[Pack]) -> dict[str, Replay]:
    """Runs the canaries of packs, which must have one, through a bundle's graph for the engine and returns
    their outputs by pack name.
    """
    reader = AdapterReader(bundle)
    return {pack.name: replay_resident(bundle, reader, pack, reader.read(pack)) for pack in packs}


def replay_resident(
    bundle: OpenBundle, reader: AdapterReader, pack: Pack, adapter: ResidentAdapter
) -> Replay:
    """Runs the canary of a pack whose values the engine holds as ``adapter``."""
    recorded = pack.manifest.canary
    assert recorded is not None
    feeds = list(canary.feeds(recorded, image_in_text(bundle, recorded)))
    tokens = "decoder_input_ids" if bundle.task.has_encoder else "input_ids"
    batch = ModelRunner(bundle, reader, 1, max(feed[tokens].shape[1] for feed in feeds) + adapter.virtual)

    def rows(one: ResidentAdapter | None) -> Rows:
        return [_logits(bundle, batch, feed, tokens, one) for feed in feeds]

    # A canary records the base with the modules that the pack trained in full, which a row without the
    # adapter lacks here; a folded adapter cannot be taken out at all.
    has_base = not pack.full() and bundle.bundle.mode != "folded"
    return Replay(recorded, rows(None) if has_base else None, rows(adapter))


def _logits(
    bundle: OpenBundle, batch: ModelRunner, feed: Arrays, tokens: str, adapter: ResidentAdapter | None
) -> np.ndarray:
    ids = feed[tokens][0].tolist()
    others = {name: array for name, array in feed.items() if name != tokens}
    if others and not bundle.task.has_encoder:
        name = adapter.name if adapter is not None and adapter.name in bundle.packs else None
        images = run_parts(bundle, feed, [name], parts=bundle.task.parts[:-1])
        row = SequenceState(prompt=ids, adapter=adapter, features=images)
    else:
        row = SequenceState(prompt=ids, adapter=adapter, source=others)
    batch.admit(row)
    logits: np.ndarray = batch.prefill(len(ids)).astype(np.float32)
    batch.remove(row)
    return logits
